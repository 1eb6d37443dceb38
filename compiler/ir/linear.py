"""``tileweld::linear``: matrix products of the rows of one x with what comes right before and after them, as text.

    y[i, k]      = prologue(x[i, k], statistics of row i)                  norm weight, norm, any pointwise function
    a_w[i, j]    = sum_k y[i, k] weights[w][j, k]                          one accumulator a weight, float32
    out_o[i, j]  = epilogue_o(a0, a1, ...; i, j, captures)                 bias, activation, product, residual, rotary, softcap

Texts are of the scalar language. In the prologue ``x`` is the element, ``i j`` its row and column, ``r`` and ``u`` the statistics of
its row:

    norm "rms"    r = rsqrt(mean(x^2) + eps)
    norm "layer"  u = mean(x),  r = rsqrt(mean((x - u)^2) + eps)
    norm ""       none

In an epilogue ``a0 a1 ...`` are accumulators at (i, j), ``p0 p1 ...`` accumulators at (i, partner(j)); outputs have the width of the
weights they name. ``pairs`` holds (block, half) for every output, (0, 0) for none: within each block of columns, column t < half and
column t + half are partners (half-split rotary: block = head dim, half = rotary dims / 2; interleaved rotary: (2, 1)); a column
t >= 2 half is its own partner. So the fused forms of a transformer are instances:

    RMSNorm + linear      norm "rms", prologue "x*r*c0[j]", epilogue "a0"
    gated MLP             weights [gate, up], epilogue "a0*sigmoid(a0)*a1"
    q, k, v + rotary      weights [q, k, v], epilogues "a0*c1[i, mod(j, 64)] + where(mod(j, 64) < 32, -p0, p0)*c2[i, mod(j, 64)]", ..., "a2"
    projection + residual epilogue "a0 + c0[i, j]"

``maxima`` numbers outputs whose rows' largest magnitudes are results too, max_j |out_o[i, j]| of what was rounded: what an int8_linear
that reads out_o needs before it can round a single element.

Everything is computed in float32 (float64 for float64) and rounded once, to x's dtype; unlike the ops it replaces, which round
after each. Under autograd the op is its parts (`expanded`), so that the partitioner may choose what is kept for the backward.

This file is the meaning; kernels are tested against `reference` in float64.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from . import scalar as sc
from .evaluate import Evaluator
from .parser import parse

NORMS = ("", "rms", "layer")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What tells one linear kernel from another, sizes and dtypes aside: the texts, parsed once."""

    norm: str = ""
    prologue: str = "x"
    epilogues: tuple[str, ...] = ("a0",)
    pairs: tuple[tuple[int, int], ...] = ((0, 0),)
    integer_captures: frozenset[int] = frozenset()

    @functools.cached_property
    def prologue_expr(self):
        return parse(self.prologue, self.integer_captures)

    @functools.cached_property
    def epilogue_exprs(self) -> tuple:
        return tuple(parse(text, self.integer_captures) for text in self.epilogues)

    def accumulators(self, output: int) -> tuple[int, ...]:
        """Numbers of the weights that an epilogue names, in order."""
        return tuple(sorted({sc.accumulator_number(s) for s in self.epilogue_exprs[output].free_symbols if sc.accumulator_number(s) is not None}))

    def partners(self, output: int) -> tuple[int, ...]:
        """Numbers of the weights whose partner column an epilogue names."""
        return tuple(sorted({sc.accumulator_number(s) for s in self.epilogue_exprs[output].free_symbols if s.name[0] == "p" and sc.accumulator_number(s) is not None}))


def spec_of(captures, norm, prologue, epilogues, pairs) -> Spec:
    """The Spec of an op call."""
    integers = frozenset(k for k, c in enumerate(captures) if not c.dtype.is_floating_point)
    return Spec(norm, prologue, tuple(epilogues), tuple(zip(pairs[::2], pairs[1::2])), integers)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widths(spec: Spec, weights: Sequence[Tensor]) -> list:
    """The number of columns of every output."""
    return [weights[spec.accumulators(o)[0]].shape[0] for o in range(len(spec.epilogues))]


class _Rows(Evaluator):
    """Evaluates over [rows, columns]; an element taken at its own row or column is the tensor itself, not a gather (which autograd would have to scatter).

    Integers stay Python's, so that symbolic sizes stay symbolic while the parts are traced.
    """

    def __init__(self, env, captures, dtype, device):
        super().__init__({}, captures, dtype, device)
        self.env = env

    def float(self, e):
        value = self(e)
        return super().float(e) if isinstance(value, Tensor) else torch.full((), value, dtype=self.dtype, device=self.device)

    def _evaluate(self, e):
        if sc.is_const(e):  # a Python number: a tensor made here would be a constant of the traced graph
            return sc.value_of(e) if e is not sympy.nan else math.nan
        if isinstance(e, sc.load):
            value, index = self.captures[int(e.args[0].name[1:])], e.args[1:]
            if index in ((sc.J,), (sc.I, sc.J)):
                return self._kind(value)
            if index == (sc.I,):
                return self._kind(value)[:, None]
            return self._kind(value[tuple(self._position(x) for x in index)] if index else value)
        if isinstance(e, (sc.floordiv, sc.mod)):
            x, n = map(self, e.args)
            if not isinstance(x, Tensor):
                return x // n if isinstance(e, sc.floordiv) else x % n
            return torch.div(x, n, rounding_mode="floor") if isinstance(e, sc.floordiv) else torch.remainder(x, n)
        if isinstance(e, (sympy.Min, sympy.Max)):  # of numbers and tensors, in any order
            numbers = [x for x in map(self, e.args) if not isinstance(x, Tensor)]
            tensors = [self(x) for x in e.args if isinstance(self(x), Tensor)]
            smallest = isinstance(e, sympy.Min)
            bound = functools.reduce(torch.sym_min if smallest else torch.sym_max, numbers) if numbers else None
            if not tensors:
                return bound
            value = functools.reduce(torch.minimum if smallest else torch.maximum, tensors)
            return value if bound is None else value.clamp(max=bound) if smallest else value.clamp(min=bound)
        return super()._evaluate(e)

    def _position(self, e):
        index = self(e)
        return index if not isinstance(index, Tensor) else index.long() if index.dim() else index.long().view(1, 1)

    def _kind(self, value):
        return value.to(self.dtype) if value.is_floating_point() else value.long()


def _normalised(x, captures, sizes, spec, eps, dtype):
    wide = x.to(dtype)
    env = _env(x, x.shape[1], sizes) | {"x": wide}
    if spec.norm:
        centred = wide
        if spec.norm == "layer":
            env["u"] = wide.mean(-1, keepdim=True)
            centred = wide - env["u"]
        env["r"] = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    if spec.prologue == "x":
        return wide
    return _Rows(env, captures, dtype, x.device).float(spec.prologue_expr).expand(x.shape)


def _env(x, columns, sizes):
    return {"i": torch.arange(x.shape[0], device=x.device)[:, None], "j": torch.arange(columns, device=x.device)[None, :], **{f"n{k}": n for k, n in enumerate(sizes)}}


def partner(a: Tensor, block: int, half: int) -> Tensor:
    """a [rows, N] with the columns of every pair exchanged; N is a multiple of block."""
    parts = a.view(a.shape[0], a.shape[1] // block, block)  # not -1: there may be no rows
    return torch.cat([parts[..., half:2 * half], parts[..., :half], parts[..., 2 * half:]], -1).view(a.shape)


def row_max(x: Tensor) -> Tensor:
    """max_j |x[i, j]| [M] of x [M, N], in the compute dtype; NaN for a row that has one, 0 where there are no columns."""
    wide = x.to(compute_dtype(x.dtype))
    return wide.abs().amax(1) if x.shape[1] else wide.new_zeros(x.shape[0])


def with_maxima(outs: list[Tensor], maxima: Sequence[int]) -> list[Tensor]:
    """The outputs, and behind them `row_max` of those that are asked for."""
    return [*outs, *(row_max(outs[o].detach()) for o in maxima)]


def fake_maxima(outs: list[Tensor], maxima: Sequence[int]) -> list[Tensor]:
    """`with_maxima` of fakes. Raises RuntimeError for an output that is not there."""
    torch._check(all(0 <= o < len(outs) for o in maxima), lambda: f"maxima of the outputs {list(maxima)}, there are {len(outs)}")
    return [*outs, *(outs[o].new_empty(outs[o].shape[0], dtype=compute_dtype(outs[o].dtype)) for o in maxima)]


def _outputs(accumulators, x, captures, sizes, spec, dtype):
    outs = []
    for o, e in enumerate(spec.epilogue_exprs):
        used = spec.accumulators(o)
        env = _env(x, accumulators[used[0]].shape[1], sizes) | {f"a{w}": accumulators[w] for w in used}
        env |= {f"p{w}": partner(accumulators[w], *spec.pairs[o]) for w in spec.partners(o)}
        outs.append(_Rows(env, captures, dtype, x.device).float(e).expand(accumulators[used[0]].shape).to(x.dtype).contiguous())
    return outs


def reference(x: Tensor, weights: Sequence[Tensor], captures: Sequence[Tensor], sizes: Sequence[int], eps: float, spec: Spec) -> list[Tensor]:
    """The definition in torch operations, all in the compute dtype; arguments and results as `linear`."""
    dtype = compute_dtype(x.dtype)
    y = _normalised(x, captures, sizes, spec, eps, dtype)
    return _outputs([y @ w.to(dtype).T for w in weights], x, captures, sizes, spec, dtype)


def expanded(x: Tensor, weights: Sequence[Tensor], captures: Sequence[Tensor], sizes: Sequence[int], norm: str, eps: float, prologue: str, epilogues: Sequence[str], pairs: Sequence[int],
             maxima: Sequence[int] = ()) -> list[Tensor]:
    """The op as its parts: norm, library matmuls in x's dtype, epilogue. What runs where the fused kernel does not pay, and under autograd."""
    spec, dtype = spec_of(captures, norm, prologue, epilogues, pairs), compute_dtype(x.dtype)
    y = _normalised(x, captures, sizes, spec, eps, dtype).to(x.dtype)
    return with_maxima(_outputs([torch.nn.functional.linear(y, w).to(dtype) for w in weights], x, captures, sizes, spec, dtype), maxima)


_library = torch.library.Library("tileweld", "FRAGMENT")
_library.define("linear(Tensor x, Tensor[] weights, Tensor[] captures, SymInt[] sizes, str norm, float eps, str prologue, str[] epilogues, int[] pairs, int[] maxima=[]) -> Tensor[]")


@torch.library.impl("tileweld::linear", "CompositeExplicitAutograd", lib=_library)
def linear(x: Tensor, weights: Sequence[Tensor], captures: Sequence[Tensor], sizes: Sequence[int], norm: str, eps: float, prologue: str, epilogues: Sequence[str], pairs: Sequence[int],
           maxima: Sequence[int] = ()) -> list[Tensor]:
    """Fused matrix products of the rows of x.

    x [M, K]; weights, each [N_w, K]; float dtypes, any strides; captures: c0, c1, ... of any rank and dtype; sizes: n0, n1, ...
    Returns one contiguous [M, N] in x's dtype for every epilogue, and behind them for every number of an output in maxima its rows' largest magnitudes,
    [M] float32 (float64 for float64), without a gradient. M = 0 and K = 0 are allowed.
    """
    return with_maxima(reference(x, weights, captures, sizes, eps, spec_of(captures, norm, prologue, epilogues, pairs)), maxima)


@torch.library.register_fake("tileweld::linear", lib=_library)
def _(x, weights, captures, sizes, norm, eps, prologue, epilogues, pairs, maxima=()):
    torch._check(x.dim() == 2, lambda: f"linear: x has {x.dim()} dims, expected [rows, K]")
    torch._check(norm in NORMS, lambda: f"linear: norm {norm!r}, expected one of {NORMS}")
    torch._check(len(pairs) == 2 * len(epilogues), lambda: f"linear: {len(pairs)} numbers of pairs for {len(epilogues)} outputs, expected two for each")
    for w in weights:
        torch._check(w.dim() == 2 and w.shape[1] == x.shape[1], lambda: f"linear: weight {[*w.shape]} for rows of {x.shape[1]}")
    return fake_maxima([x.new_empty((x.shape[0], n)) for n in widths(spec_of(captures, norm, prologue, epilogues, pairs), weights)], maxima)


@torch.library.impl("tileweld::linear", "Autograd", lib=_library)
def _(x, weights, captures, *rest):
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *captures)):
        return expanded(x, weights, captures, *rest)
    with torch._C._AutoDispatchBelowAutograd():  # the way that torch's own documentation of autograd kernels goes on
        return torch.ops.tileweld.linear.default(x, weights, captures, *rest)
