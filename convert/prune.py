"""Heads and MLP channels that do nothing, taken out: the model computes what it did, with fewer weights. Exact, no calibration."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compiler.errors import ConversionError
from ..compiler.ir.head_merge import Heads
from .calibrate import batches
from .channels import Mlp, dead_channels, find_mlps, keep_channels, restate_width, watched
from .flow import Flow, trace
from .linears import check_unshared, refuse_int8
from .observe import Inputs, evaluating, probe_calls, random_inputs
from .probe import SAME, cast, first_tensor, isolated, settled, sharpened
from .report import PruneReport, PrunedLayer
from .sites import Site, find_sites, owners, read, restate, restate_configs, write
from .undo import configs_of, taken_back

_SAME_OUTPUT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # sums in another order; a live head or channel is far more


@dataclass(frozen=True)
class _Kept:
    """What stays of an attention: KV heads, and for each of them as many query heads."""

    site: Site
    groups: list[int]
    heads: list[list[int]]


def prune(model: nn.Module, structured: bool = False, inputs: Tensor | Mapping[str, Tensor] | None = None) -> PruneReport:
    """Take out attention heads with W_O,h W_V,h = 0 and MLP channels that are zero or that nobody reads, in place. **Exact**; all or nothing.

    A KV head goes with the last of its query heads. A layer's code gives every KV head as many query heads (n_rep), so the fullest one decides and
    the others keep dead ones to fill up. One head and one channel always stay.

    structured: False: every layer gets as small as it can; layers may then differ, which the config of a Hugging Face model cannot say: report.reloads is
                False and the model lives in memory alone.
                True: all layers keep equal numbers (KV heads, n_rep, channels), those of the fullest; the config says so, and the checkpoint reloads
                wherever its config states the head dim apart from the number of heads (Llama's and most since; not BERT's, GPT-2's, OPT's or MPT's, whose MLPs alone reload: report.why_not).
    inputs:     what the model is tried on, as in to_gqa's calibration: tokens, another tensor that it takes, or its keyword arguments. None: random tokens. Its numbers decide nothing.
    Heads and channels are found by what the model does when it runs (flow.py), in whatever modules, as nn.Linear or GPT-2's Conv1D, queries, keys and values in one layer or three. Linear layers whose channels
    are read all at once (by a norm, say), latent attention and cross attention stay: report.left_out.
    W_O,h W_V,h counts as zero where it is below what rounding the weights makes of zero. A bias of the values counts as a column of W_V.

    Optimizers hold the old parameters: make them after pruning. Raises ConversionError, naming the layer where it is one's, and leaves the model as it was, if
    there is nothing that could be pruned (no attention, no MLP found), if weights are quantised, sharded or shared, or if the smaller model computes something
    else: heads that know their number (ALiBi, sinks), a norm over all of them.
    """
    refuse_int8(model, ": what is dead was decided when it was rounded", "prune first, then quantize_")
    before = sum(p.numel() for p in model.parameters())
    with evaluating(model), torch.no_grad():
        flow: list[Flow] = []  # seen once what is known by its names is known to be sound
        trial = random_inputs(model) if inputs is None else batches(model, inputs)[0]
        sites = find_sites(model, turned=False, watch=lambda: flow.append(trace(model, trial)) or flow[0])
        mlps = find_mlps(model, flow[0])
        if not sites and not mlps:
            raise ConversionError(f"{type(model).__name__} has no attention and no MLP whose heads and channels could be told apart"
                                  + "".join(f"; {name}: {why}" for name, why in [*flow[0].left_out.items()][:3]), cure="convert/flow.py says how they are found: between linear layers, channel by channel")
        check_unshared(model, [(mlp.name, mlp.module, mlp.children) for mlp in mlps])
        cross: dict[str, str] = {}
        calls = probe_calls(model, sites, trial, cross)
        sites = [settled(site, calls[site.name]) for site in sites if site.name in calls]
        silent = watched(model, mlps, trial)
        channels = [(mlp, ~dead_channels(mlp, silent.get(mlp.key))) for mlp in mlps]
        kept = _equal_heads(sites, [_live(site) for site in sites], structured)
        widths = _equal_widths(channels, structured)
        for layer in kept:
            if len(sum(layer.heads, [])) < layer.site.heads:
                _check_heads(layer, calls[layer.site.name])
        _swap(model, kept, [(mlp, _filled(live, n)) for (mlp, live), n in zip(channels, widths)], trial)
    layers = [PrunedLayer(x.site.name, "heads", x.site.heads, len(sum(x.heads, [])), x.site.kv_heads, len(x.groups)) for x in kept]
    layers += [PrunedLayer(mlp.name or mlp.key, "channels", mlp.width, n) for mlp, n in zip(mlps, widths)]
    return PruneReport(layers, before, sum(p.numel() for p in model.parameters()), structured, *_reloads(model), flow[0].left_out | cross | _latent(flow[0], sites, cross))


def _latent(flow: Flow, sites: list[Site], known) -> dict[str, str]:
    """The attentions that were seen and are no sites."""
    names = {f"{s.name}.{s.output}".lstrip(".") for s in sites} | {*known}
    return {a.output: "an attention whose queries, keys and values are not one linear layer each, or one for all (latent or shared KV)" for a in flow.attentions if a.output not in names}


# ---------------------------------------------------------------- what does nothing


def _live(site: Site) -> list[list[int]]:
    """For every KV head its query heads whose o v is not zero."""
    heads = read(site, site.module)
    eps = torch.finfo(site.dtype).eps
    norm = torch.linalg.matrix_norm
    values = heads.v.repeat_interleave(heads.n_rep, 0)
    alive = ~(norm(heads.o @ values) <= 4 * eps * norm(heads.o) * norm(values))  # NaN is alive
    alive |= ~(heads.q.isfinite().all((1, 2)) & heads.k.isfinite().all((1, 2)).repeat_interleave(heads.n_rep))  # scores of NaN times zero are no zero
    return [[h for h in range(j * heads.n_rep, (j + 1) * heads.n_rep) if alive[h]] for j in range(site.kv_heads)]


def _equal_heads(sites: list[Site], lives: list[list[list[int]]], structured: bool) -> list[_Kept]:
    """As many KV heads, and query heads for each, as the fullest needs: of the layer, or of all layers that are alike (structured)."""
    needs = {}
    for site, live in zip(sites, lives):
        place = (site.heads, site.kv_heads, site.d, site.dv) if structured else site.name
        groups, n_rep = needs.get(place, (1, 1))
        needs[place] = max(groups, sum(map(bool, live))), max(n_rep, *map(len, live))
    result = []
    for site, live in zip(sites, lives):
        groups, n_rep = needs[(site.heads, site.kv_heads, site.d, site.dv) if structured else site.name]
        chosen = _fill([j for j, heads in enumerate(live) if heads], range(site.kv_heads), groups)
        old = site.heads // site.kv_heads
        result.append(_Kept(site, chosen, [_fill(live[j], range(j * old, (j + 1) * old), n_rep) for j in chosen]))
    return result


def _equal_widths(channels: list[tuple[Mlp, Tensor]], structured: bool) -> list[int]:
    """How many channels stay: at least one, those of the fullest of equal width if structured."""
    live = [max(1, int(alive.sum())) for _, alive in channels]
    return [max(n for n, (other, _) in zip(live, channels) if other.width == mlp.width) for mlp, _ in channels] if structured else live


def _fill(live: list[int], everyone, n: int) -> list[int]:
    """`live`, with the first of the others up to n, in order."""
    return sorted([*live, *[x for x in everyone if x not in live][: n - len(live)]])


def _filled(alive: Tensor, n: int) -> Tensor:
    """Numbers of n channels, the live ones among them, in order."""
    return torch.argsort(~alive, stable=True)[:n].sort().values


# ---------------------------------------------------------------- taking it out


def _chosen(heads: Heads, layer: _Kept) -> Heads:
    order = sum(layer.heads, [])
    return replace(heads, q=heads.q[order], k=heads.k[layer.groups], v=heads.v[layer.groups], o=heads.o[order])


def _check_heads(layer: _Kept, call) -> None:
    """Run a float64 copy of the module, its scores spread out, with and without the dead heads. Raises ConversionError."""
    site, twin = layer.site, isolated(layer.site.module, torch.float64)
    args, kwargs = cast(call.args, torch.float64), cast(call.kwargs, torch.float64)
    heads = sharpened(read(site, twin), call.x)
    write(site, twin, heads)
    expected = first_tensor(twin(*args, **kwargs))
    try:
        write(site, twin, _chosen(heads, layer))
        restate_configs(site, twin, len(layer.groups), len(sum(layer.heads, [])))
        error = torch.linalg.vector_norm(first_tensor(twin(*args, **kwargs)) - expected)
    except Exception as failure:
        raise ConversionError(f"its code does not run with fewer heads, whose number is known outside of it (ALiBi, a bias of positions): {failure}", where=site.name, cure="such attention is not pruned") from failure
    if not error <= SAME * torch.linalg.vector_norm(expected):
        raise ConversionError("without its dead heads it computes something else: its heads know their number (ALiBi, sinks), or a norm runs over all of them", where=site.name,
                              cure="such attention is not pruned")


def _swap(model: nn.Module, kept: list[_Kept], channels: list[tuple[Mlp, Tensor]], trial: Inputs) -> None:
    """Write everything, and the configs where all layers agree; take it back if the model then does not run, or computes something else."""
    places = [(x.site.name, x.site.module, x.site.children) for x in kept] + [(mlp.name, mlp.module, mlp.children) for mlp, _ in channels]
    configs = configs_of(model, [name for name, _, _ in places])
    expected = _result(model, trial)
    try:
        with taken_back([*configs, *(m for _, module, children in places for m in owners(module, children))], [module.get_submodule(child) for _, module, children in places for child in children]):
            for layer in kept:
                if len(sum(layer.heads, [])) < layer.site.heads:
                    write(layer.site, layer.site.module, _chosen(read(layer.site, layer.site.module), layer))
            for mlp, numbers in channels:
                if len(numbers) < mlp.width:
                    keep_channels(mlp, numbers)
            for config in configs:
                if len({(len(x.groups), len(sum(x.heads, []))) for x in kept}) == 1:
                    restate(config, kept[0].site, len(kept[0].groups), len(sum(kept[0].heads, [])))
                if len({len(numbers) for _, numbers in channels}) == 1:
                    restate_width(config, channels[0][0].width, len(channels[0][1]))
            error = torch.linalg.vector_norm((_result(model, trial) - expected).double())
            if not error <= _SAME_OUTPUT[expected.dtype] * torch.linalg.vector_norm(expected.double()):
                raise ConversionError(f"without dead heads and channels {type(model).__name__} computes something else, it was left as it was",
                                      cure="a norm, a gate or a table over all of them stands in between: such a model is not pruned")
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(f"{type(model).__name__} does not run with fewer heads or channels, it was left as it was: {error}",
                              cure="if it reads the numbers from a config that all layers share, pass structured=True") from error


def _result(model: nn.Module, inputs: Inputs) -> Tensor:
    return next(x for x in tree_leaves(model(*inputs.args, **(inputs.kwargs or {}))) if isinstance(x, Tensor) and x.is_floating_point())


def _reloads(model: nn.Module) -> tuple[bool | None, str]:
    """Does a model made anew from the config have weights of these shapes? None where it has no config, or cannot be made from it alone. And a weight that has not."""
    if getattr(model, "config", None) is None:
        return None, ""
    try:
        with torch.device("meta"):
            again = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # some other class's arguments, of which nothing can be said; or sizes that its config forbids
        return (None, "") if isinstance(error, TypeError) else (False, f"no model can be made from it, {error}")
    made, here = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (again, model))
    wrong = next((f"a model made from it has {n} {[*made[n]] if n in made else 'not at all'}, this one {[*shape]}" for n, shape in here.items() if made.get(n) != shape), "")
    return not wrong, wrong
