"""tileweld::attention, the definition: against a float64 softmax written out, its fake, its gradients, torch's own opcheck."""

import math

import pytest
import torch
from tileweld.compiler.ir import attention as op

B, H, T, S, D, DV = 2, 4, 5, 7, 8, 6
INF = math.inf


def attention(q, k, v, captures=(), sizes=(), score="s", mask="True", fill=-INF, sink="", empty="nan"):
    return torch.ops.tileweld.attention(q, k, v, list(captures), list(sizes), score, mask, fill, sink, empty)


def qkv(heads=H, value_heads=H, dtype=torch.float64):
    return torch.randn(B, H, T, D, dtype=dtype), torch.randn(B, heads, S, D, dtype=dtype), torch.randn(B, value_heads, S, DV, dtype=dtype)


def expected(q, k, v, score=lambda s: s, mask=None, fill=-INF, sink=None, empty="nan"):
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    s = score(q @ k.mT)
    s = s if mask is None else torch.where(mask, s, fill)
    logits = s if sink is None else torch.cat([s, sink.expand(B, H, T, 1)], -1)
    p = torch.softmax(logits, -1)
    if empty == "zero":
        p = torch.where((logits == -INF).all(-1, keepdim=True), 0.0, p)
    return p[..., :S] @ v


I, J = torch.arange(T)[:, None], torch.arange(S)
KEEP = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
VARIANTS = {
    "plain": ({"score": "0.3*s"}, {"score": lambda s: 0.3 * s}),
    "causal": ({"mask": "j <= i"}, {"mask": J <= I}),
    "bottom right": ({"mask": "Tq + j <= Tk + i"}, {"mask": J <= I + S - T}),
    "size": ({"mask": "i - j < n0", "sizes": [2]}, {"mask": I - J < 2}),
    "softcap": ({"score": "5*tanh(s/5)"}, {"score": lambda s: 5 * torch.tanh(s / 5)}),
    "padding": ({"mask": "c0[b, j] != 0", "captures": [KEEP]}, {"mask": KEEP[:, None, None].bool()}),
    "padding, finite": ({"mask": "(j <= i) & (c0[b, j] != 0)", "captures": [KEEP], "fill": -1e9}, {"mask": (J <= I) & KEEP[:, None, None].bool(), "fill": -1e9}),
    "padding, zero": ({"mask": "(j <= i) & (c0[b, j] != 0)", "captures": [KEEP], "empty": "zero"}, {"mask": (J <= I) & KEEP[:, None, None].bool(), "empty": "zero"}),
    "alibi": ({"score": "s + c0[h]*(j - i)", "captures": [SLOPES]}, {"score": lambda s: s + SLOPES[:, None, None] * (J - I)}),
    "sink": ({"sink": "c0[h]", "captures": [SLOPES]}, {"sink": SLOPES[:, None, None]}),
}


@pytest.mark.parametrize("groups", [(H, H), (2, 2), (1, 1), (2, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_definition(variant, groups):
    arguments, meaning = VARIANTS[variant]
    q, k, v = qkv(*groups)
    torch.testing.assert_close(attention(q, k, v, **arguments), expected(q, k, v, **meaning), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_rows_without_a_key_have_all_three_meanings():
    q, k, v = qkv()
    none = {"mask": "j < 0"}
    assert attention(q, k, v, **none).isnan().all()
    assert torch.equal(attention(q, k, v, **none, empty="zero"), torch.zeros(B, H, T, DV, dtype=torch.float64))
    torch.testing.assert_close(attention(q, k, v, **none, fill=-1e9), v.mean(2, keepdim=True).expand(B, H, T, DV))


def test_blocks_of_rows_change_nothing(monkeypatch):
    q, k, v = qkv()
    whole = attention(q, k, v, mask="j <= i")
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", 2 * B * H * S)
    torch.testing.assert_close(attention(q, k, v, mask="j <= i"), whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant):
    """Of q, k, v and float captures, against autograd through the softmax written out."""
    arguments, meaning = VARIANTS[variant]
    if variant == "padding":
        arguments, meaning = {**arguments, "captures": [torch.ones_like(KEEP)]}, {}  # without rows that are NaN
    q, k, v = (x.requires_grad_() for x in qkv(2, 2))
    floats = [c.clone().requires_grad_() for c in arguments.get("captures", []) if c.is_floating_point()]
    if variant == "alibi":
        arguments, meaning = {**arguments, "captures": floats}, {"score": lambda s: s + floats[0][:, None, None] * (J - I)}
    if variant == "sink":
        arguments, meaning = {**arguments, "captures": floats}, {"sink": floats[0][:, None, None]}
    upstream = torch.randn(B, H, T, DV, dtype=torch.float64)
    ours = torch.autograd.grad((attention(q, k, v, **arguments) * upstream).sum(), [q, k, v, *floats])
    theirs = torch.autograd.grad((expected(q, k, v, **meaning) * upstream).sum(), [q, k, v, *floats])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [dict(score="s + c0[h, i, j]"), dict(score="s*c0[b, i]"), dict(score="s + c0[j - i + Tq - 1, h]"), dict(score="tanh(s)*c0"), dict(sink="c0[i]*2")], ids=str)
def test_gradients_of_captures(case):
    """Each way to index a capture: dense, broadcast, gathered many times, a scalar, a sink."""
    text = case.get("score", "") + case.get("sink", "")
    shape = {"c0[h, i": (H, T, S), "c0[b, i]": (B, T), "c0[j - i": (T + S - 1, H), "tanh(s)*": (), "c0[i]*2": (T,)}[next(key for key in ("c0[h, i", "c0[b, i]", "c0[j - i", "tanh(s)*", "c0[i]*2") if key in text)]
    c = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q, k, v = (x[:, :, :, :3].contiguous().requires_grad_() for x in qkv(2, 2))
    assert torch.autograd.gradcheck(lambda q, k, v, c: attention(q, k, v, captures=[c], **case), (q, k, v, c), eps=1e-6, atol=1e-6)


def test_opcheck():
    q, k, v = (x.float().requires_grad_() for x in qkv(2, 2))
    arguments = (q, k, v, [SLOPES.float().requires_grad_(), KEEP], [3], "0.5*s + c0[h]*(j - i)", "(c1[b, j] != 0) | (j < n0)", -1e9, "", "nan")
    torch.library.opcheck(torch.ops.tileweld.attention.default, arguments)


def test_layout_and_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        out = attention(*qkv(dtype=dtype))
        assert out.dtype == dtype and out.shape == (B, H, T, DV) and out.transpose(1, 2).is_contiguous()
        fake = torch.ops.tileweld.attention(*(x.to("meta") for x in qkv(dtype=dtype)), [], [], "s", "True", -INF, "", "nan")
        assert (fake.shape, fake.dtype, fake.stride()) == (out.shape, out.dtype, out.stride())


def test_no_keys_give_zeros():
    q, k, v = qkv()
    assert torch.equal(attention(q, k[:, :, :0], v[:, :, :0]), torch.zeros(B, H, T, DV, dtype=torch.float64))


def test_disagreeing_shapes_are_told():
    q, k, v = qkv()
    with pytest.raises(Exception, match="head dim"):
        torch.compile(lambda q, k, v: attention(q, k, v), backend="eager", fullgraph=True)(q, k[..., :3], v)
