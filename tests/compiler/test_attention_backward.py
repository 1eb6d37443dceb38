"""Which implementation attention's backward gets, why, and that gradients are float64's through all of them."""
import pytest
import torch
import torch.nn.functional as F
from tileweld.compiler import backward_pays, select
from tileweld.compiler.backend import tileweld
from tileweld.compiler.ir.graph import value
from tileweld.compiler.report import Report

I, J = torch.arange(40)[:, None], torch.arange(40)


def by_hand(score, mask=None):
    def attention(q, k, v, *rest):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = score(q @ k.mT * 0.25, *rest)
        return (s if mask is None else s.masked_fill(~mask, float("-inf"))).softmax(-1) @ v

    return attention


def gradients(function, leaves, *rest, calls=None, **options):
    """(largest error of a gradient against float64, relative to the largest element; how the backward runs; why)"""
    report = Report()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=lambda gm, x: tileweld(gm, x, options=options, report=report), fullgraph=True)
    wide = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    worst = 0.0
    for tensors in calls or [leaves]:
        xs, ys = ([f(x.detach()).requires_grad_(x.is_floating_point()) for x in tensors] for f in (torch.clone, wide))
        upstream = torch.randn_like(function(*xs, *rest).double())
        ours = torch.autograd.grad((compiled(*xs, *rest).to(upstream.dtype) * upstream).sum(), xs)
        theirs = torch.autograd.grad((function(*ys, *map(wide, rest)) * upstream).sum(), ys)
        worst = max([worst, *((a.double() - b).abs().max().item() / max(b.abs().max().item(), 1e-3) for a, b in zip(ours, theirs) if a.numel())])
    rows = {(k.implementation, k.reason) for k in report.kernels if k.op == "attention_backward"}
    assert len(rows) == 1, rows
    (row,) = rows
    return worst, *row


def qkv(tokens=40, heads=4, kv_heads=2, dtype=torch.float32, width=16):
    return [torch.randn(2, h, tokens, width).to(dtype) for h in (heads, kv_heads, kv_heads)]


CAUSAL = J <= I
KERNELS = {
    "sdpa, grouped heads": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "softcap": by_hand(lambda s: 20 * torch.tanh(s / 20), CAUSAL),
    "window": by_hand(lambda s: s, CAUSAL & (I - J < 9)),
    "alibi": by_hand(lambda s, slopes: s + slopes[:, None, None] * (J - I), CAUSAL),
    "added mask": by_hand(lambda s: s + torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_runs(name):
    rest = [torch.tensor([0.5, 0.25, 0.125, 0.0625])] if name == "alibi" else []  # captured, without a gradient
    error, runs, reason = gradients(KERNELS[name], qkv(), *rest, strict=True)
    assert error < 1e-5 and runs.startswith("cpp:attention_backward") and reason == "generated for this op"


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_halves(dtype, bound):
    error, runs, _ = gradients(KERNELS["sdpa, grouped heads"], qkv(dtype=dtype))
    assert error < bound and runs.startswith("cpp:")


def test_a_learned_bias_has_its_gradient_from_the_kernel():
    table = torch.randn(32, 4)
    bias = by_hand(lambda s, t: s + t[(I - J).abs().clamp(max=31)].permute(2, 0, 1), CAUSAL)
    error, runs, _ = gradients(lambda q, k, v, t: bias(q, k, v, t), [*qkv(), table])
    assert error < 1e-5 and runs.startswith("cpp:")


def test_a_large_learned_bias_is_left_to_the_blocks(monkeypatch):
    monkeypatch.setattr(select, "MOST_SUMS", 100)
    error, runs, reason = gradients(lambda q, k, v, t: by_hand(lambda s: s + t)(q, k, v), [*qkv(), torch.randn(4, 40, 40)])
    assert error < 1e-5 and runs == "torch:blocks" and "c0" in reason and "that many elements" in reason


def test_one_kernel_for_every_length():
    def projected(x):  # as a model has it: q, k and v of one length
        q, k, v = x.unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    error, runs, _ = gradients(projected, None, calls=[[torch.randn(2, n, 192)] for n in (17, 40, 300, 2)])
    assert error < 1e-5 and runs.startswith("cpp:")


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens):
    error, *_ = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), qkv(tokens, kv_heads=4))
    assert error < 1e-5


@pytest.mark.parametrize("case", ["a score's temperature", "float64"])
def test_the_blocks_remain(case):
    """What the kernel does not do is done as before, without a warning, and the report says why."""
    if case == "float64":
        error, runs, reason = gradients(KERNELS["softcap"], qkv(dtype=torch.float64), strict=False)
        assert error < 1e-12 and "float64" in reason
    else:
        function = by_hand(lambda s, t: torch.tanh(s * t[:, None, None]), CAUSAL)
        error, runs, reason = gradients(lambda q, k, v, t: function(q, k, v, t), [*qkv(), torch.rand(4) + 0.5], strict=True)
        assert error < 1e-5 and "c0" in reason
    assert runs == "torch:blocks"


@pytest.mark.parametrize("kernel, blocks", [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_one_is_kept(monkeypatch, kernel, blocks):
    monkeypatch.setattr(backward_pays.pays, "known", lambda what, choices, measure: (kernel, blocks))
    error, runs, reason = gradients(KERNELS["softcap"], qkv())
    assert error < 1e-5 and (runs == "torch:blocks") == (kernel > blocks)
    assert kernel < blocks or "1000.00 ms against 2000.00" in reason


def test_both_are_timed_at_the_sizes_of_the_call(monkeypatch):
    measure, found = backward_pays._measured, []
    monkeypatch.setattr(backward_pays.pays, "_known", {})
    monkeypatch.setattr(backward_pays, "_measured", lambda choice, launch: found.append((tuple(value(choice.inputs[1]).shape), measure(choice, launch))) or (0.0, 1.0))
    gradients(KERNELS["window"], qkv(width=24))  # of no other test: the figures of those are in the cache
    ((shape, (kernel, blocks)),) = found
    assert shape == (2, 4, 40, 24) and kernel > 0 and blocks > 0


def test_opcheck():
    q, k, v = qkv()
    for keys in (k, k.to(torch.int8)):
        arguments = (torch.randn_like(q), q, keys, v, [torch.rand(4), torch.ones(2, 40, dtype=torch.long)], [3], "0.5*s + c0[h]*(j - i)", "(c1[b, j] != 0) | (j < n0)", -1e9, "", "nan")
        torch.library.opcheck(torch.ops.tileweld.attention_backward.default, arguments)
