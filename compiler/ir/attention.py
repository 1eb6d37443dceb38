"""``tileweld::attention``: one op for every attention variant, its definition, its fake and its gradient.

    out[b, h, i, :] = sum_j softmax_j( where(mask, score(q[b, h, i] . k[b, h // Gk, j]), fill) ) value(v[b, h // Gv, j, :])

``score``, ``mask``, ``sink`` and ``value`` are text of the scalar language. Masked positions have the score ``fill``: -inf, or the finite
number that the model wrote (-1e9, finfo.min), which matters for rows that see no key at all. ``empty`` tells more about such
rows: with fill -inf what they give, "nan" as softmax does, or "zero" as scaled_dot_product_attention does; with a finite fill
"added" where the model added it to the score, so that gradients reach masked scores as well, and not only the visible ones.
``sink`` is one more logit of the denominator (attention sinks, softmax-plus-one), "" for none. ``value`` is what a value's element v is taken for, the same for
every dim of it: "f*v + o" with f and o of positions and captures alone (no s), "f" for f*v, "" for v. The denominator sees neither f nor o.

k and v may be int8 with q of a float dtype, each of them: an int8 KV cache that is not dequantised. Its scales are captures: K's, one a token and
KV head, a factor of s in ``score``, V's a factor in ``value``: (s0 k8) . q = s0 (k8 . q), p (s1 v8) = (p s1) v8. Zero points too: (s0 k8 + z0) . q = s0 (k8 . q) + z0 sum(q), where
sum(q) is a capture as well, and p (s1 v8 + z1) = (p s1) v8 + p z1, a number that is added to every dim of a row. Integers have no gradient; q and the captures have.
With q of float32 they may also be float16 or bfloat16, a cache of half its bytes: a kernel widens them where it reads them.

This file is the meaning; kernels are tested against it in float64. Rows are taken in blocks, so that memory stays
O(block x Tk) forward and backward. Backward formulas: dP = dO v^T, dS = P (dP - sum(P dP)), chained through d score / d s and
d score / d c by sympy (FlashAttention, 2205.14135, appendix B, without the recomputation of the sum).
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import sympy
import torch
from sympy import Integer
from torch import Tensor

from . import scalar as sc
from .evaluate import Evaluator
from .parser import parse, parse_mask

BLOCK_ELEMENTS = 1 << 24  # scores held at once by the definition: 64 MiB in fp32
BACKWARD_ELEMENTS = 1 << 19  # by its gradient on a CPU, which goes over them five times: 2 MiB stay in the cache, 4 times as fast as 64 MiB


def _linear(e):
    """(f, o) with e = f*v + o, o None for 0; None where there is no such form."""
    if e == sc.V:
        return Integer(1), None
    held = [n for n, x in enumerate(e.args) if x.has(sc.V)]
    if len(held) != 1 or not isinstance(e, (sc.fadd, sc.fsub, sc.fmul, sc.fdiv)) or (found := _linear(e.args[held[0]])) is None:
        return None
    (f, o), other = found, e.args[1 - held[0]]
    if isinstance(e, sc.fadd):
        return f, other if o is None else sc.add(o, other)
    if isinstance(e, sc.fsub):
        return (f, sc.neg(other) if o is None else sc.sub(o, other)) if held == [0] else (sc.neg(f), other if o is None else sc.sub(other, o))
    if isinstance(e, sc.fdiv) and held == [1]:
        return None
    scaled = (lambda x: sc.mul(other, x)) if isinstance(e, sc.fmul) else (lambda x: sc.div(x, other))
    return scaled(f), None if o is None else scaled(o)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What tells one attention kernel from another: the texts, parsed once."""

    score: str = "s"
    mask: str = "True"
    fill: float = float("-inf")
    sink: str = ""
    empty: str = "nan"
    integer_captures: frozenset[int] = frozenset()
    value: str = ""
    key: str = ""  # what a key's element is taken for, of tileweld::attention_keys alone

    @functools.cached_property
    def score_expr(self):
        return parse(self.score, self.integer_captures)

    @functools.cached_property
    def mask_expr(self):
        return parse_mask(self.mask, self.integer_captures)

    @functools.cached_property
    def sink_expr(self):
        return parse(self.sink, self.integer_captures) if self.sink else None

    @functools.cached_property
    def _value(self):
        """(f, o) of value="f*v + o", each None where it is 1 or 0. Raises ValueError for what is not linear in v, or where s is in it."""
        e = parse(self.value, self.integer_captures) if self.value else sc.V
        found = _linear(e) if e.has(sc.V) else (e, None)
        if found is None or e.has(sc.S):
            raise ValueError(f"attention: value={self.value!r} {'depends on s' if e.has(sc.S) else 'is not f*v + o'}; f and o are of positions and captures")
        return found[0] if found[0] != 1 else None, found[1]

    @functools.cached_property
    def key_expr(self):
        """None where keys are what they are. Raises ValueError for what depends on s, v or a query."""
        if not self.key:
            return None
        e = parse(self.key, self.integer_captures)
        if foreign := e.free_symbols & {sc.S, sc.V, sc.I, sc.TQ}:
            raise ValueError(f"attention: key={self.key!r} reads {', '.join(sorted(map(str, foreign)))}; it is of k, b, h, j, d and captures")
        return e

    @property
    def value_expr(self):
        """The factor of the weights, None for 1."""
        return self._value[0]

    @property
    def offset_expr(self):
        """What is added to every dim of a value, None for nothing."""
        return self._value[1]

    @property
    def is_causal(self) -> bool:
        """Is the mask exactly the causal one, aligned at the first position, with no weight for what it hides?"""
        return self.mask == "j <= i" and self.fill == float("-inf")

    @functools.cached_property
    def linear_scale(self) -> float | None:
        """c where the score is c*s, else None: what a library attention can compute."""
        e = self.score_expr
        if e == sc.S:
            return 1.0
        if isinstance(e, sc.fmul) and sc.is_const(e.args[0]) and e.args[1] == sc.S:
            return float(e.args[0])
        return None


def integer_captures(captures: Sequence[Tensor]) -> frozenset[int]:
    """Numbers of the captures that hold integers or booleans."""
    return frozenset(k for k, c in enumerate(captures) if not c.dtype.is_floating_point)


def variant_of(captures, score, mask, fill, sink, empty, value="", key="") -> Variant:
    """The Variant of an op call."""
    return Variant(score, mask, float(fill), sink, empty, integer_captures(captures), value, key)


def is_widened(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """May keys or values be stored so where q has ``dtype``? Every number of ``stored`` is one of ``dtype``, and kernels widen it in registers."""
    return stored == torch.int8 or (dtype == torch.float32 and stored in (torch.float16, torch.bfloat16))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores are computed in float32, in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("tileweld::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], score: str, mask: str, fill: float, sink: str, empty: str, value: str = "") -> Tensor:
    """Attention with a scalar-language score and mask.

    q [B, H, Tq, D], k [B, Hk, Tk, D], v [B, Hv, Tk, Dv] with Hk and Hv dividing H; float dtypes, k and v also what `is_widened` allows; any strides.
    captures: c0, c1, ... of any rank and dtype; sizes: n0, n1, ...
    Returns [B, H, Tq, Dv] in q's dtype, laid out as [B, Tq, H, Dv] in memory (the transpose that follows is then free).
    """
    variant = variant_of(captures, score, mask, fill, sink, empty, value)
    return reference(q, k, v, captures, sizes, variant)


@attention.register_fake
def _(q, k, v, captures, sizes, score, mask, fill, sink, empty, value=""):
    batch, heads, rows, width = q.shape
    torch._check(k.shape[3] == width, lambda: f"q has head dim {width}, k has {k.shape[3]}")
    torch._check(k.shape[2] == v.shape[2], lambda: f"k has {k.shape[2]} positions, v has {v.shape[2]}")
    return empty_output(q, v.shape[3])


def empty_output(q: Tensor, width: int) -> Tensor:
    """[B, H, Tq, width] over [B, Tq, H, width] memory."""
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, width)).transpose(1, 2)


class _Rows:
    """Scores and probabilities of the query rows [start, stop) over the first ``keys`` keys in the compute dtype; k with a head for each of q's."""

    def __init__(self, q, k, captures, sizes, variant, start, stop, dtype, keys=None, lse=None):
        batch, heads, rows, width = q.shape
        keys, device = k.shape[2] if keys is None else keys, q.device
        self.q = q[:, :, start:stop].to(dtype)
        self.k = k[:, :, :keys]
        positions = {"b": (batch, 0), "h": (heads, 1), "j": (keys, 3)}
        env = {name: torch.arange(n, device=device).view([-1 if axis == d else 1 for d in range(4)]) for name, (n, axis) in positions.items()}
        env["i"] = torch.arange(start, stop, device=device).view(1, 1, -1, 1)
        env |= {"Tq": rows, "Tk": k.shape[2], **{f"n{n}": value for n, value in enumerate(sizes)}, "s": self.q @ self.k.transpose(2, 3)}
        self.evaluate = Evaluator(env, captures, dtype, device)
        self.shape = (batch, heads, stop - start, keys)
        self.sink = None
        if variant.is_causal and not variant.sink and variant.score_expr.has(sc.S) and keys == min(stop, k.shape[2]):  # what backward asks for: only the last keys are masked
            score = self.evaluate.float(variant.score_expr)
            score[..., start:].masked_fill_(~self.evaluate(variant.mask_expr)[..., start:], float("-inf"))
            if lse is not None:
                lse[:, :, start:stop] = score.logsumexp(-1)
            self.p = torch.softmax(score, -1)
            return
        self.visible = self.evaluate(variant.mask_expr)
        score = self.evaluate.float(variant.score_expr).expand(self.shape)
        if variant.mask_expr is not sympy.true:
            score = torch.where(self.visible, score, torch.tensor(variant.fill, dtype=dtype, device=device))
        self.sink = self.evaluate.float(variant.sink_expr).expand(batch, heads, stop - start, 1) if variant.sink_expr is not None else None
        logits = score if self.sink is None else torch.cat([score, self.sink], -1)
        if lse is not None:
            lse[:, :, start:stop] = logits.logsumexp(-1)
        probabilities = torch.softmax(logits, -1)
        if variant.empty == "zero":
            probabilities = torch.where((logits == float("-inf")).all(-1, keepdim=True), torch.zeros((), dtype=dtype, device=device), probabilities)
        self.p = probabilities[..., :keys]
        self.p_sink = probabilities[..., keys:]

    def factor(self, variant):
        """``value``'s factor over [B, H, rows, keys] or what broadcasts to it, None for 1."""
        return None if variant.value_expr is None else self.evaluate.float(variant.value_expr)

    def weights(self, variant):
        """What v is multiplied with: p, times ``value``'s factor."""
        factor = self.factor(variant)
        return self.p if factor is None else self.p * factor

    def offset(self, variant):
        """``value``'s offset over [B, H, rows, keys] or what broadcasts to it."""
        return self.evaluate.float(variant.offset_expr)

    def out(self, variant, values):
        """[B, H, rows, Dv]"""
        out = self.weights(variant) @ values
        return out if variant.offset_expr is None else out + (self.p * self.offset(variant)).sum(-1, keepdim=True)


def _every_head(x, q, dtype):
    """k or v with a head for each of q's, in the compute dtype."""
    return (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)).to(dtype)


def _row_blocks(q, k, elements=BLOCK_ELEMENTS):
    batch, heads, rows, _ = q.shape
    step = max(1, elements // max(1, batch * heads * k.shape[2]))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def reference(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], variant: Variant, lse: Tensor | None = None) -> Tensor:
    """The definition, in blocks of rows; float64 inputs are computed in float64, all others in float32. lse [B, H, Tq]: filled with the logarithms of the denominators."""
    dtype = compute_dtype(q.dtype)
    out = empty_output(q, v.shape[3])
    if k.shape[2] == 0:
        if lse is not None:
            lse.fill_(float("-inf"))
        return out.zero_()
    keys, values = _every_head(k, q, dtype), _every_head(v, q, dtype)
    for start, stop in _row_blocks(q, k):
        out[:, :, start:stop] = (_Rows(q, keys, captures, sizes, variant, start, stop, dtype, lse=lse).out(variant, values)).to(q.dtype)
    return out


@torch.library.custom_op("tileweld::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], score: str, mask: str, fill: float, sink: str, empty: str, value: str = "") -> list[Tensor]:
    """Gradients of q, k, v and of every float capture, in that order, each in its tensor's shape and dtype, the first three over [B, T, H, D] memory; zeros for integers."""
    variant = variant_of(captures, score, mask, fill, sink, empty, value)
    dtype = compute_dtype(q.dtype)
    differentiable = [c for c in captures if c.dtype.is_floating_point]
    if k.shape[2] == 0:
        return [*(empty_output(x, x.shape[3]).zero_() for x in (q, k, v)), *map(torch.zeros_like, differentiable)]
    heads = q.shape[1]
    all_keys, values = _every_head(k, q, dtype), _every_head(v, q, dtype)
    dq = empty_output(q, q.shape[3])
    dk = torch.zeros((q.shape[0], heads, *k.shape[2:]), dtype=dtype, device=q.device)
    dv = torch.zeros((q.shape[0], heads, *v.shape[2:]), dtype=dtype, device=q.device)
    dcaptures = {n: torch.zeros(c.shape, dtype=dtype, device=c.device) for n, c in enumerate(captures) if c.dtype.is_floating_point}
    ds_ds, by_capture, by_sink, by_value, by_offset = derivatives(variant)
    hides_gradient = variant.mask_expr is not sympy.true and variant.empty != "added" and not variant.is_causal  # causal: p is 0 there
    for start, stop in _row_blocks(q, k, BACKWARD_ELEMENTS if q.device.type == "cpu" else BLOCK_ELEMENTS):
        seen = min(stop, k.shape[2]) if variant.is_causal else k.shape[2]
        rows = _Rows(q, all_keys, captures, sizes, variant, start, stop, dtype, seen)
        dout = grad[:, :, start:stop].to(dtype)
        dp = dout @ values[:, :, :seen].transpose(2, 3)
        weight = rows.factor(variant)
        for element, derivative in by_value:
            _accumulate(dcaptures, element, rows.p * dp * rows.evaluate.float(derivative), rows.evaluate)
        dp = dp if weight is None else dp * weight
        if variant.offset_expr is not None:
            total = dout.sum(-1, keepdim=True)
            for element, derivative in by_offset:
                _accumulate(dcaptures, element, rows.p * total * rows.evaluate.float(derivative), rows.evaluate)
            dp = dp + total * rows.offset(variant)
        dscore = torch._softmax_backward_data(dp, rows.p, -1, dtype)  # p (dp - sum(p dp))
        if hides_gradient:
            dscore = torch.where(rows.visible, dscore, torch.zeros((), dtype=dtype, device=q.device))
        ds = dscore if sc.is_const(ds_ds) else dscore * rows.evaluate.float(ds_ds)
        factor = float(ds_ds) if sc.is_const(ds_ds) else 1.0  # of a smaller product
        dv[:, :, :seen] += rows.weights(variant).transpose(2, 3) @ dout
        dq[:, :, start:stop] = ((ds @ rows.k) * factor).to(q.dtype)
        dk[:, :, :seen] += ds.transpose(2, 3) @ (rows.q * factor)
        for element, derivative in by_capture:
            _accumulate(dcaptures, element, dscore * rows.evaluate.float(derivative), rows.evaluate)
        for element, derivative in by_sink:
            delta = (rows.p * dp).sum(-1, keepdim=True)
            _accumulate(dcaptures, element, -rows.p_sink * delta * rows.evaluate.float(derivative), rows.evaluate)

    def to_group(x, like):
        made = empty_output(like, like.shape[3])
        return made.copy_(x.unflatten(1, (like.shape[1], -1)).sum(2)) if like.dtype.is_floating_point else made.zero_()

    return [dq, to_group(dk, k), to_group(dv, v), *(dcaptures[n].to(captures[n].dtype) for n in sorted(dcaptures))]


@functools.lru_cache(1024)
def derivatives(variant: Variant):
    """(d score / d s, [(c, d score / d c)], the same of the sink, of value's factor and offset) with c the element accesses of float captures."""
    def by_element(expr):
        found = []
        for element in sc.loads(expr) if expr is not None else ():
            if not sc.is_int(element):
                x = sympy.Dummy()
                found.append((element, expr.xreplace({element: x}).diff(x).xreplace({x: element})))
        return found

    score = variant.score_expr
    return score.diff(sc.S), by_element(score), by_element(variant.sink_expr), by_element(variant.value_expr), by_element(variant.offset_expr)


def _accumulate(totals, element, value, evaluate):
    total = totals[int(element.args[0].name[1:])]
    indices = [evaluate(index).long() for index in element.args[1:]]
    used = [any(index.dim() == 4 and index.shape[axis] > 1 for index in indices) for axis in range(4)]
    unused = [axis for axis in range(4) if not used[axis]]
    if unused:  # sum what broadcasts before the scatter: a [B, H, T, T] gradient of a [H] tensor becomes [H]
        value = value.sum(unused, keepdim=True)
    if not indices:
        total += value.sum()
        return
    shape = torch.broadcast_shapes(value.shape, *(index.shape for index in indices))
    total.index_put_(tuple(index.expand(shape) for index in indices), value.expand(shape), accumulate=True)


@attention_backward.register_fake
def _(grad, q, k, v, captures, sizes, score, mask, fill, sink, empty, value=""):
    return [*(empty_output(x, x.shape[3]) for x in (q, k, v)), *(torch.empty(c.shape, dtype=c.dtype, device=c.device) for c in captures if c.dtype.is_floating_point)]


def _setup_context(ctx, inputs, output):
    q, k, v, captures, sizes, *rest = inputs
    ctx.save_for_backward(q, k, v, *captures)
    ctx.sizes, ctx.rest = sizes, rest  # rest: score, mask, fill, sink, empty, value


def _backward(ctx, grad):
    q, k, v, *captures = ctx.saved_tensors
    dq, dk, dv, *dcaptures = torch.ops.tileweld.attention_backward(grad, q, k, v, captures, ctx.sizes, *ctx.rest)
    remaining = iter(dcaptures)
    return dq, dk if k.dtype.is_floating_point else None, dv if v.dtype.is_floating_point else None, [next(remaining) if c.dtype.is_floating_point else None for c in captures], None if ctx.sizes else [], *([None] * (len(ctx.needs_input_grad) - 5))  # the dispatcher drops a trailing default; torch takes an empty list for a list of tensors


attention.register_autograd(_backward, setup_context=_setup_context)
