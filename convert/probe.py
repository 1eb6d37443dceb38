"""Try out, on a copy of an attention module in float64, which changes of its weights leave its output as it was.

A module says nothing of its rotary layout, a cap, a gate or a norm between its projections. Each has a signature: the gauge (head_merge.py)
under which the output stays. So random members of it are applied, and the module is run on what it saw in the model.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..compiler.errors import ConversionError
from ..compiler.ir.head_merge import Heads, as_pairs, from_pairs
from .sites import Site, read, write

# Modules with an fp32 softmax or rotary table inside agree to 1e-6; a wrong gauge changes the output by 0.1 and more.
SAME = 1e-3


@dataclass(frozen=True)
class Call:
    """The arguments an attention module was called with, and the input of its key projection [..., D]."""

    args: tuple
    kwargs: dict
    x: Tensor


@dataclass(frozen=True)
class Gauge:
    """pairs [P, 2] of head dimensions that rotate together, None without rotary; permutes: KV heads may change places."""

    pairs: Tensor | None
    permutes: bool


def isolated(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype` that no hook watches, for inference."""
    twin = copy.deepcopy(module).to(dtype).eval().requires_grad_(False)
    for m in twin.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_with_kwargs, m._forward_pre_hooks_with_kwargs):
            hooks.clear()
    return twin


def cast(tree: object, dtype: torch.dtype) -> object:
    """Every floating tensor in `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def first_tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else next(x for x in output if isinstance(x, Tensor))


class _Trial:
    """An attention module, run on what it was given with other heads: is its output the same?"""

    def __init__(self, site: Site, call: Call, projection: bool = False):
        self.projection = projection  # of the output projection, which nothing behind it in the module can hide (a residual, an MLP)
        self.site, self.twin, self.chance = site, isolated(site.module, torch.float64), torch.Generator().manual_seed(0)
        self.args, self.kwargs = cast(call.args, torch.float64), cast(call.kwargs, torch.float64)
        self.base = sharpened(read(site, self.twin), call.x)
        self.expected = self._run(self.base)

    def _run(self, heads: Heads) -> Tensor:
        write(self.site, self.twin, heads)
        seen = []
        handle = self.site.linear(self.site.output, self.twin).register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            whole = first_tensor(self.twin(*self.args, **self.kwargs))
        finally:
            handle.remove()
        return seen[0] if self.projection else whole

    def same(self, heads: Heads) -> bool:
        return bool(torch.linalg.vector_norm(self._run(heads) - self.expected) <= SAME * torch.linalg.vector_norm(self.expected))

    def turns(self, *shape: int) -> Tensor:
        """Random matrices with singular values in 0.5..2: invertible, and no rotation."""
        u, _, vh = torch.linalg.svd(torch.randn(shape, generator=self.chance, dtype=torch.float64).to(self.base.q.device))
        return u * torch.empty(shape[:-1], dtype=torch.float64).uniform_(0.5, 2, generator=self.chance).to(u.device)[..., None, :] @ vh

    def over_queries(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.base.n_rep, 0)

    def frees_values(self) -> bool:
        """Does another basis of the values, with the output projection turned back, change nothing?"""
        a = self.turns(self.site.kv_heads, self.site.dv, self.site.dv)
        return self.same(replace(self.base, v=a @ self.base.v, o=self.base.o @ self.over_queries(a.inverse())))


def settled(site: Site, call: Call) -> Site:
    """The site with the layout that its stacked projection has: queries, keys, values one after the other, or head by head (GPT-NeoX, BLOOM); as it is where neither fits."""
    return next((c for c in _orders(site) if _Trial(c, call).frees_values()), site) if site.q.child == site.k.child else site


def carrying(site: Site, call: Call) -> Site | None:
    """`settled`, of a site whose values reach the output projection in their own basis; None where they do not."""
    return next((c for c in _orders(site) if _Trial(c, call, projection=True).frees_values()), None)


def _orders(site: Site) -> list[Site]:
    return [site, replace(site, packed=True)] if site.q.child == site.k.child else [site]


def find_gauge(site: Site, call: Call) -> Gauge:
    """Raises ConversionError, naming the layer, if values or keys have no gauge known here."""
    trial = _Trial(site, call)
    if not trial.expected.isfinite().all():
        raise ConversionError("its output has inf or NaN" + (": its weights do" if not all(p.isfinite().all() for p in site.module.parameters()) else " on the inputs that it was given"), where=site.name,
                              cure="look for what overflows; weights that are not finite cannot be converted")
    base, chance, same, turns, over_queries = trial.base, trial.chance, trial.same, trial.turns, trial.over_queries
    if not trial.frees_values():
        raise ConversionError("another basis of the values changes its output: a norm, cap or gate stands between values and output, or query head h does not read KV head "
                              f"h // {site.heads // site.kv_heads}", where=site.name, cure="such attention is not converted")
    a = turns(site.kv_heads, site.d, site.d)
    candidates = [None, *_layouts(site.d, base.q.device)]
    for pairs in candidates:
        if pairs is None:
            k, q = a @ base.k, over_queries(a.inverse().mT) @ base.q
        else:
            c = torch.polar(torch.empty(site.kv_heads, len(pairs), 1, dtype=torch.float64).uniform_(0.5, 2, generator=chance),
                            torch.empty(site.kv_heads, len(pairs), 1, dtype=torch.float64).uniform_(-3, 3, generator=chance)).to(base.q.device)
            k, q = from_pairs(as_pairs(base.k, pairs) * c, pairs), from_pairs(as_pairs(base.q, pairs) / over_queries(c).conj(), pairs)
        if same(replace(base, k=k, q=q)):
            break
    else:
        raise ConversionError("rescaled keys with queries scaled back change its output: QK-norm, clipped projections, shared KV, or a rotary embedding over part of a head",
                              where=site.name, cure="no embedding, and rotary of whole heads (halves or neighbours as pairs), are converted")
    order = torch.arange(site.kv_heads).roll(1).tolist()
    moved = lambda x: base.of_kv(x)[order].flatten(0, 1)
    permutes = same(replace(base, k=base.k[order], v=base.v[order], q=moved(base.q), o=moved(base.o)))
    return Gauge(pairs, permutes)


def attention_received(site: Site, twin: nn.Module, args: tuple, kwargs: dict, queries: Tensor) -> Tensor:
    """[B, T, 1]: the attention that every token gets, summed over heads and the queries [B, T] counts (0 for padding). A head's output is sum_j p_ij v_j, so this is the
    derivative of its outputs' sum by v_j, for any mask, bias and rotary embedding. `twin` is an isolated copy of the site's module."""
    seen = {}

    def values(module, given, result):
        seen["v"] = result.detach().requires_grad_()
        return seen["v"]

    handles = (site.linear(site.v.child, twin).register_forward_hook(values),
               site.linear(site.output, twin).register_forward_pre_hook(lambda module, given: seen.__setitem__("context", given[0])))
    with torch.enable_grad():
        twin(*args, **kwargs)
        of_one = seen["context"].unflatten(-1, (site.heads, site.dv))[..., 0].sum(-1).mul(queries).sum()
    for handle in handles:
        handle.remove()
    by_value = torch.autograd.grad(of_one, seen["v"])[0]
    by_value = by_value.unflatten(-1, (site.kv_heads, -1))[..., -site.dv] if site.packed else by_value[..., site.v.start:site.v.stop].unflatten(-1, (site.kv_heads, site.dv))[..., 0]
    return by_value.sum(-1, keepdim=True)


def _layouts(d: int, device: torch.device) -> list[Tensor]:
    """Pairs (i, i + d/2), as Llama in transformers; (2i, 2i + 1), as GPT-J and Llama's own code."""
    if d % 2:
        return []
    i = torch.arange(d, device=device)
    return [i.view(2, -1).T, i.view(-1, 2)]


def sharpened(heads: Heads, x: Tensor) -> Heads:
    """Queries and keys scaled to numbers of order 1, so that scores spread by about 2: a model not trained yet has scores near 0,
    a uniform softmax, and would look as if it had every symmetry."""
    x = x.double().flatten(0, -2)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    scale = lambda w: w * (1.4 / (w @ x.T).square().mean().sqrt().clamp_min(1e-30))
    return replace(heads, q=scale(heads.q), k=scale(heads.k))
