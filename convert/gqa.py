"""MHA to GQA: fewer KV heads, in place, without training. Sources: Ainslie et al., GQA, arXiv 2305.13245; Align heads, arXiv 2412.20677."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..compiler.errors import ConversionError, OptionError
from ..compiler.ir.head_groups import group_heads
from ..compiler.ir.head_merge import METHODS, Heads, merge_layer, ratio, refit_output, similarity
from .flow import Flow, trace
from .linears import matrix, refuse_int8
from .observe import Inputs, Stop, calibration_inputs, evaluating, hooked, probe_calls, random_inputs, run
from .probe import Gauge, attention_received, cast, find_gauge, isolated, settled
from .report import ConversionReport, LayerReport
from .sites import Site, find_sites, owners, read, restate, restate_configs, write
from .undo import configs_of, taken_back


@dataclass(frozen=True)
class Plan:
    """The arguments of `to_gqa`, and what the probe found of every layer."""

    num_kv_heads: int
    method: str
    max_residual: float | None
    refit: bool
    seed: int
    gauges: dict[str, Gauge]


@dataclass(frozen=True)
class Fit:
    """A layer's new projections in the weights' dtype (None: it stays as it is), and the line of the report."""

    site: Site
    heads: Heads | None
    report: LayerReport


def to_gqa(model: nn.Module, num_kv_heads: int, calibration: Tensor | Mapping[str, Tensor] | None = None, method: str = "data",
           max_residual: float | None = None, *, refit: bool | None = None, seed: int = 0) -> ConversionReport:
    """Merge the KV heads of every attention layer into `num_kv_heads` (1: MQA), in place; the KV cache shrinks by as much.

    **Lossy**, unless the heads are redundant up to the gauge (then exact): expect a perplexity that training has to bring down again, see
    docs/accuracy.md. All or nothing: on any error the model is as it was.

    model:        self attention with linear projections, Hugging Face or not, found by structure (sites.py); called as model(tokens).
    num_kv_heads: divides the present number of KV heads.
    calibration:  tokens [B, T] int64 on the model's device, or the model's keyword arguments as tensors with the batch in dim 0: a few
                  thousand tokens of the text the model is for. All run as one batch. None: the weights alone decide.
    method:       "data": the best low-rank merge of what scores and output feel; "aligned": heads turned onto each other, then averaged;
                  "mean": neighbours averaged as they are, from which the GQA paper starts its training.
    max_residual: layers with a larger residual (report.LayerReport) stay as they are; the model then has layers of several sizes.
    refit:        ridge fit of the output projection to the calibration tokens; None: for "data", if there is calibration. It finds work for heads that are dead: prune before.
    seed:         of the annealing that groups more than 14 heads.

    Optimizers hold the old parameters: make them after converting. Raises ConversionError, naming the layer, if one cannot be converted or
    the calibration does not fit; OptionError for an unknown method.
    """
    if method not in METHODS:
        raise OptionError.unknown("method", method, METHODS)
    if type(num_kv_heads) is not int or num_kv_heads < 1:
        raise ConversionError(f"num_kv_heads is {num_kv_heads!r}, expected an int of at least 1")
    if refit and calibration is None:
        raise ConversionError("refit=True needs calibration tokens", cure="pass calibration=tokens")
    refuse_int8(model, ": merging would round its weights a second time", "to_gqa first, then quantize_")
    inputs = None if calibration is None else calibration_inputs(model, calibration)
    # Random tokens also where there is calibration: text can be one token over and over, and then every layout looks right.
    trial = inputs.map(lambda x: x[:2]) if inputs and inputs.kwargs else random_inputs(model)
    sites = find_sites(model, watch=lambda: _watched(model, trial))
    for site in sites:
        if site.kv_heads % num_kv_heads:
            raise ConversionError(f"{num_kv_heads} KV heads do not divide its {site.kv_heads}", where=site.name,
                                  cure=f"choose one of {', '.join(str(n) for n in range(1, site.kv_heads + 1) if site.kv_heads % n == 0)}")
    with evaluating(model), torch.no_grad():
        calls = probe_calls(model, sites, trial)
        sites = [settled(site, calls[site.name]) for site in sorted(sites, key=lambda site: [*calls].index(site.name))]  # in order of execution
        refit = (method == "data" and calibration is not None) if refit is None else refit
        plan = Plan(num_kv_heads, method, max_residual, refit, seed, {s.name: find_gauge(s, calls[s.name]) for s in sites})
        fits = [_limited(_fit(site, plan), plan) for site in sites] if inputs is None else _fit_calibrated(model, sites, inputs, plan)
        _swap(model, fits, num_kv_heads, trial)
    return ConversionReport([fit.report for fit in fits], method, num_kv_heads, inputs.tokens if inputs else 0)


def _watched(model: nn.Module, trial: Inputs) -> Flow:
    with evaluating(model), torch.no_grad():
        return trace(model, trial)


def _fit(site: Site, plan: Plan, second_moment: Tensor | None = None) -> Fit:
    """The merge, decided by the weights and E[x x^T] [E, E] alone (None: the identity); float64 heads, not limited yet."""
    heads, gauge = read(site, site.module, plan.gauges[site.name].pairs), plan.gauges[site.name]
    if second_moment is None:
        second_moment = torch.eye(heads.q.shape[-1], dtype=torch.float64, device=heads.q.device)
    size = site.kv_heads // plan.num_kv_heads
    free = plan.method != "mean" and gauge.permutes and 1 < plan.num_kv_heads < site.kv_heads
    groups = (group_heads(similarity(heads, second_moment).tolist(), plan.num_kv_heads, plan.seed) if free
              else [list(range(i, i + size)) for i in range(0, site.kv_heads, size)])
    if size == 1:
        return Fit(site, None, _layer(site, [[i] for i in range(site.kv_heads)], 0.0, 0.0, 0.0, True, "as it was"))
    merged, keys, values = merge_layer(heads, second_moment, groups, plan.method)
    note = "neighbours only: heads have a bias or sink of their own" if not gauge.permutes and plan.method != "mean" and plan.num_kv_heads > 1 else ""
    return Fit(site, merged, _layer(site, groups, keys, values, max(keys, values), True, note))


def _layer(site: Site, groups: list[list[int]], keys: float, values: float, residual: float, converted: bool, note: str) -> LayerReport:
    return LayerReport(site.name, site.heads, site.kv_heads, len(groups), tuple(map(tuple, groups)), keys, values, residual,
                       site.kv_bytes(), site.kv_bytes(len(groups)), converted, note)


def _limited(fit: Fit, plan: Plan) -> Fit:
    """Skip the layer if its residual is too large; else its heads in the dtype they will have."""
    old, site = fit.report, fit.site
    if fit.heads is None:
        return fit
    if plan.max_residual is not None and not old.residual <= plan.max_residual:
        note = f"skipped: residual over {plan.max_residual:g}"
        return Fit(site, None, _layer(site, [[i] for i in range(site.kv_heads)], old.key_error, old.value_error, old.residual, False, note))
    dtype = site.dtype
    return replace(fit, heads=replace(fit.heads, **{name: getattr(fit.heads, name).to(dtype) for name in "qkvo"}))


def _fit_calibrated(model: nn.Module, sites: list[Site], inputs: Inputs, plan: Plan) -> list[Fit]:
    """One forward with the batch twice: the first half as the model is, the second through the layers fitted so far. A layer is fitted when
    it is reached, on the inputs the layers before give it now, its output projection towards what the unchanged model has there: SmolLM2 with
    3 KV heads merged to 1 has perplexity 50 so, 94 with the unchanged layer on the same inputs as the target, 82 without refit."""
    both, fits = inputs.map(lambda x: torch.cat([x, x])), []
    seen: dict[str, Tensor] = {}
    second = lambda x: _tokens(x[len(x) // 2:], inputs.keep)
    first = lambda x: _tokens(x[: len(x) // 2], inputs.keep)

    def fit_and_continue(site: Site, args: tuple, kwargs: dict, output: object) -> object:
        x, target, same_input = second(seen["x"]).double(), first(seen["y"]), second(seen["y"])
        twin = isolated(site.module, torch.promote_types(seen["x"].dtype, torch.float32))
        args, kwargs = (cast(given, site.linear(site.output, twin).weight.dtype) for given in (args, kwargs))
        queries = seen["x"].new_ones(seen["x"].shape[:2]) if inputs.keep is None else torch.cat([inputs.keep, inputs.keep])
        # Keys that are looked at count more, half by attention and half evenly: the first token takes most of it in trained models, is one of
        # hundreds in a plain mean, and a head that loses it is lost (perplexity 82 against 112 without).
        share = second(attention_received(site, twin, args, kwargs, queries)).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1) * ((1 + share / share.mean()) / 2).sqrt()
        fit = _fit(site, plan, x.mT @ x / len(x))
        if fit.heads is None:
            fits.append(fit)
            return output
        write(site, twin, fit.heads)
        restate_configs(site, twin, plan.num_kv_heads)
        out = site.linear(site.output, twin)
        if plan.refit:
            def refit(module, given):
                goal = target.double() - (0 if module.bias is None else module.bias.double())
                matrix(module).copy_(refit_output(second(given[0]).double(), goal, matrix(module).double())[0])
            out.register_forward_pre_hook(refit)
        out.register_forward_hook(lambda module, given, result: seen.__setitem__("new", result))
        new = twin(*args, **kwargs)
        residual = ratio(second(seen["new"]).double() - same_input.double(), same_input.double())
        refitted = matrix(out).double().unflatten(1, (site.heads, site.dv)).transpose(0, 1)
        fit = _limited(Fit(site, replace(fit.heads, o=refitted), replace(fit.report, residual=residual)), plan)
        fits.append(fit)
        if fit.heads is None:
            return output
        half = len(seen["x"]) // 2
        return tree_map(lambda old, now: torch.cat([old[:half], now[half:].to(old.dtype)]) if isinstance(old, Tensor) and old.shape[:1] == (2 * half,) else old, output, new)

    with hooked() as keep:
        for site in sites:
            def after(module, args, kwargs, output, site=site):
                result = fit_and_continue(site, args, kwargs, output)
                if site is sites[-1]:
                    raise Stop
                return result

            keep(site.linear(site.k.child).register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0])))
            keep(site.linear(site.output).register_forward_hook(lambda module, args, output: seen.__setitem__("y", output)))
            keep(site.module.register_forward_hook(after, with_kwargs=True))
        run(model, both)
    return fits


def _tokens(x: Tensor, keep: Tensor | None) -> Tensor:
    """[B, T, D] -> [N, D], padding left out."""
    return x.flatten(0, -2) if keep is None else x[keep]


def _swap(model: nn.Module, fits: list[Fit], num_kv_heads: int, trial: Inputs) -> None:
    """Write every layer, and the configs if all layers have one size now; take everything back if the model then does not run."""
    configs = configs_of(model, [fit.site.name for fit in fits])
    uniform = all(fit.report.kv_heads_after == num_kv_heads for fit in fits)
    try:
        with taken_back([*configs, *(m for fit in fits for m in owners(fit.site.module, fit.site.children))], [fit.site.linear(child) for fit in fits for child in fit.site.children]):
            for fit in fits:
                if fit.heads is None:
                    continue
                bad = next((f.name for f in fields(Heads) if f.name != "pairs" and not getattr(fit.heads, f.name).isfinite().all()), None)
                if bad:
                    raise ConversionError(f"its new {bad} weights are not finite", where=fit.site.name, cure="look for NaN or infinity in its weights or the calibration's activations")
                write(fit.site, fit.site.module, fit.heads)
                for config in configs if uniform else ():
                    restate(config, fit.site, num_kv_heads)
            run(model, trial)
    except ConversionError:
        raise
    except Exception as error:
        cure = "it reads the KV heads from a config that all layers share: convert without max_residual" if not uniform else None
        raise ConversionError(f"{type(model).__name__} does not run with {num_kv_heads} KV heads, it was left as it was: {error}", cure=cure) from error
