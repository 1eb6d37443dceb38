"""Several products of one softmax's weights: one attention with the values side by side; what reads the weights otherwise, or depends on a product, is left."""

import pytest
import torch
import torch.nn.functional as F
import tileweld

COUNT = {"joint_values": 1, "attention": 1}


def heads(*shape):
    return [torch.randn(*shape) for _ in range(4)]


def attend(q, k, v):
    return (F.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1) @ v).transpose(1, 2).contiguous()


def halves(q, k, v, w):
    """Differential attention as two calls that share q and k; the second's values are made behind the first's result."""
    first = attend(q, k, v)
    return first - 0.3 * attend(q, k, w.repeat(1, 2, 1, 1)[:, :4])


def split_values(q, k, v, w):
    first, second = (torch.cat(torch.chunk(v, 2, dim=1)[n:n + 1] * 2, dim=1) for n in (0, 1))
    return torch.cat([attend(q, k, first), attend(q, k, second)], dim=-1).flatten(2) + w.mean()


def three_widths(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return (p @ v).sum(-1) + (p @ w[..., :5]).sum(-1) * (p @ w[..., 5:6])[..., 0]


@pytest.mark.parametrize("model", [halves, split_values, three_widths])
def test_the_products_become_one(model, rewriting):
    inputs = heads(2, 4, 9, 16)
    report = rewriting.check(model, *inputs, count=COUNT)
    assert not report.refusals and not report.products_left
    rewriting.check_gradients(model, *inputs, count=COUNT)


@pytest.mark.parametrize("model", [halves, split_values, three_widths])
def test_kernels(model):
    inputs = heads(2, 4, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="tileweld")(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_equal_softmaxes_are_counted_once():
    report = tileweld.explain(halves, *heads(2, 4, 9, 16))
    assert [(s.seen, s.fused, s.other) for s in report.softmaxes] == [(1, 1, 0)]


def test_dynamic_lengths(rewriting):
    compiled = torch.compile(halves, backend="tileweld", dynamic=True)
    with torch.no_grad():
        for length in (9, 14):
            inputs = heads(2, 4, length, 16)
            torch.testing.assert_close(compiled(*inputs), halves(*inputs), rtol=1e-5, atol=1e-5)


def depends(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return p @ (p @ v + w) + 1


def escapes(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return p @ v + p @ w, p


def other_side(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return p @ v + p.transpose(-1, -2) @ w


def other_heads(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return p @ v + p @ w[:, :1]


def written_between(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    first = p @ v
    w.add_(first.mean())
    return first + p @ w


def left_over(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return p @ v, (p @ w) * 2


def too_wide(q, k, v, w):
    p = F.softmax(q @ k.transpose(-1, -2), dim=-1)
    return (p @ v.repeat(1, 1, 1, 20)).sum(-1) + (p @ w.repeat(1, 1, 1, 20)).sum(-1)


@pytest.mark.parametrize("model", [depends, escapes, other_side, other_heads, written_between, left_over, too_wide])
def test_what_must_be_left_alone(model, rewriting):
    inputs = heads(2, 4, 9, 16)
    got, report = rewriting.rewritten(model, *[x.clone() for x in inputs])
    assert report.counts["joint_values"] == 0 and any("outside the core" in r.reason for r in report.refusals)
    eager = model(*[x.clone() for x in inputs])
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, eager)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride()
