"""Every spelling of an RMS norm becomes one op with eager's result; whatever differs is refused, with the reason."""
import re

import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.capture import capture
from tileweld.compiler.ir.rewrite import Match
from tileweld.passes import rms_norm
from tileweld.passes.canonicalise import canonicalise

OP = torch.ops.tileweld.rms_norm.default


def rewrite(fn, *inputs, dynamic=False, alter=None):
    """(result of the rewritten function, matches, refusals)"""
    matches, refusals = [], []

    def backend(gm, example_inputs):
        graph = canonicalise(capture(gm, example_inputs))
        for found in rms_norm.find(graph.graph):
            (matches if isinstance(found, Match) else refusals).append(found)
            if isinstance(found, Match):
                mode = found.root.meta["val"].fake_mode
                with graph.graph.inserting_before(found.root), mode:
                    new = found.build(graph.graph)
                assert new.meta["val"].shape == found.root.meta["val"].shape and new.meta["val"].dtype == found.root.meta["val"].dtype
                found.root.replace_all_uses_with(new)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs), matches, refusals


def mean(x):
    return x.mean(-1, keepdim=True)


SPELLINGS = {
    "llama": lambda x, w, e: w * (x.float() * torch.rsqrt(mean(x.float().pow(2)) + e)).to(x.dtype),
    "llama_type_as": lambda x, w, e: (x.float() * torch.rsqrt(e + x.float().pow(2).mean(dim=-1, keepdim=True))).type_as(x) * w,
    "t5": lambda x, w, e: w * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(2, keepdim=True) + e)).to(w.dtype),
    "gemma": lambda x, w, e: (x.float() * torch.rsqrt(mean(x.float() ** 2) + e) * (1.0 + w.float())).type_as(x),
    "gemma_other_side": lambda x, w, e: ((w.float() + 1) * (torch.rsqrt(mean(torch.square(x.float())) + e) * x.float())).to(x.dtype),
    "olmo2": lambda x, w, e: (w * (x.float() * torch.rsqrt(mean(x.float().pow(2)) + e))).to(x.dtype),
    "float_weight_last": lambda x, w, e: ((x.float() * torch.rsqrt(mean(x.float().pow(2)) + e)) * w.float()).to(x.dtype),
    "product": lambda x, w, e: w * (x.float() * (mean(x.float() * x.float()) + e).rsqrt()).to(x.dtype),
    "inverse_sqrt": lambda x, w, e: w * (x.float() * (1 / torch.sqrt(mean(x.float() ** 2) + e))).to(x.dtype),
    "power": lambda x, w, e: w * (x.float() * (mean(x.float() ** 2) + e) ** -0.5).to(x.dtype),
    "divide": lambda x, w, e: w * (x.float() / torch.sqrt(mean(x.float() ** 2) + e)).to(x.dtype),
    "divide_root_power": lambda x, w, e: w * (x.float() / (mean(x.float() ** 2) + e) ** 0.5).to(x.dtype),
    "sum": lambda x, w, e: w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) / x.shape[-1] + e)).to(x.dtype),
    "library": lambda x, w, e: F.rms_norm(x, (x.shape[-1],), w, e),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_one_op(spelling, dtype):
    fn = SPELLINGS[spelling]
    for width in (48, 64):
        x, w = torch.randn(2, 5, width).to(dtype), torch.randn(width).to(dtype)
        actual, matches, refusals = rewrite(fn, x, w, 1e-3)
        expected = fn(x, w, 1e-3)
        assert len(matches) == 1 and not refusals
        assert actual.dtype == expected.dtype
        tolerance = dict(rtol=2e-6, atol=2e-6) if dtype == torch.float32 else dict(rtol=0, atol=0)
        if dtype == torch.bfloat16 and ("sqrt" in spelling or spelling in ("divide", "divide_root_power", "sum", "power")):
            tolerance = dict(rtol=1e-2, atol=0)  # another rounding in float32 may tip one in bfloat16
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize(("spelling", "offset", "cast"), [("llama", 0.0, "before"), ("gemma", 1.0, "after"), ("olmo2", 0.0, "after"), ("library", 0.0, "after")])
def test_offset_and_rounding_are_read_from_the_casts(spelling, offset, cast):
    x, w = torch.randn(2, 5, 64).bfloat16(), torch.randn(64).bfloat16()
    _, (match,), _ = rewrite(SPELLINGS[spelling], x, w, 1e-3)
    call = next(n for n in match.root.graph.nodes if n.target is OP)
    assert call.args[2:] == (1e-3, offset, cast)
    assert (" + 1.0" in match.detail) == bool(offset)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dynamic_shapes_and_a_symbolic_eps(spelling):
    fn = SPELLINGS[spelling]
    x, w = torch.randn(2, 5, 48), torch.randn(48)
    actual, matches, refusals = rewrite(fn, x, w, 1e-3, dynamic=True)
    assert len(matches) == 1 and not refusals
    torch.testing.assert_close(actual, fn(x, w, 1e-3), rtol=2e-6, atol=2e-6)


def test_no_weight_and_a_shared_statistic():
    def without(x):
        return x * torch.rsqrt(mean(x * x) + 1e-6)

    def two_weights(x, w, v):
        return without(x) * w, v * without(x)  # equal nodes are merged: one norm, two products

    x = torch.randn(3, 32)
    actual, matches, _ = rewrite(without, x)
    torch.testing.assert_close(actual, without(x))
    assert [m.detail for m in matches] == ["eps=1e-06, no weight"]
    w, v = torch.randn(2, 32)
    actual, matches, refusals = rewrite(two_weights, x, w, v)
    assert len(matches) == 1 and not refusals
    torch.testing.assert_close(actual, two_weights(x, w, v))


def test_norms_one_after_the_other():
    def fn(x, w):
        for _ in range(3):
            x = SPELLINGS["llama"](x, w, 1e-5)
        return F.rms_norm(x, (32,))

    x, w = torch.randn(3, 32), torch.randn(32)
    actual, matches, _ = rewrite(fn, x, w)
    assert len(matches) == 4
    torch.testing.assert_close(actual, fn(x, w))


def test_a_weight_that_is_no_vector_stays_outside():
    def fn(x, gate):
        return gate * (x * torch.rsqrt(mean(x * x) + 1e-6))

    for gate in (torch.randn(1, 32), torch.randn(3, 32), torch.randn(1)):
        x = torch.randn(3, 32)
        actual, (match,), _ = rewrite(fn, x, gate)
        assert "no weight" in match.detail
        torch.testing.assert_close(actual, fn(x, gate))


def test_a_result_wider_than_x_reads_the_wide_x():
    def fn(x, w):
        wide = x.float()
        return w * (wide * torch.rsqrt(mean(wide * wide) + 1e-6))

    x, w = torch.randn(3, 32).bfloat16(), torch.randn(32).bfloat16()
    actual, (match,), _ = rewrite(fn, x, w)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, fn(x, w))


def test_float64_arithmetic_stays_float64():
    def fn(x):
        return (x.double() * torch.rsqrt(mean(x.double() ** 2) + 1e-12)).to(x.dtype)

    x = torch.full((3, 32), 1e25)  # its square overflows float32
    actual, matches, _ = rewrite(fn, x)
    assert len(matches) == 1 and matches[0].inputs[0].meta["val"].dtype == torch.float64
    torch.testing.assert_close(actual, fn(x))


def rstd_escapes(x, w):
    rstd = torch.rsqrt(mean(x * x) + 1e-6)
    return w * (x * rstd), rstd


REFUSED = {
    "another dim": (lambda x, w: w * (x * torch.rsqrt((x * x).mean(-2, keepdim=True) + 1e-6)), "the mean is over dims"),
    "two dims": (lambda x, w: w * (x * torch.rsqrt((x * x).mean((-1, -2), keepdim=True) + 1e-6)), "the mean is over dims"),
    "keepdim": (lambda x, w: w * (x * torch.rsqrt((x * x).mean(-1) + 1e-6)), "keepdim"),
    "escape": (rstd_escapes, "rsqrt is also used outside, by the graph's output"),
    "tensor eps": (lambda x, w: w * (x * torch.rsqrt(mean(x * x) + w[:1].abs())), "eps is a tensor"),
    "rounded statistic": (lambda x, w: w * (x.float() * torch.rsqrt(mean(x.float().pow(2)).bfloat16() + 1e-6)), "rounds at other places"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_miss_is_refused_with_its_reason(name):
    fn, reason = REFUSED[name]
    x, w = torch.randn(32, 32), torch.randn(32)
    actual, matches, refusals = rewrite(fn, x, w)
    assert not matches
    assert len(refusals) == 1, refusals
    assert re.search(reason, refusals[0].reason), refusals[0].reason
    torch.testing.assert_close(actual, fn(x, w))


def test_float16_arithmetic_is_refused_because_it_overflows():
    def fn(x):
        return x * torch.rsqrt(mean(x * x) + 1e-6)

    x = torch.full((2, 32), 300.0).half()
    actual, matches, refusals = rewrite(fn, x)
    assert not matches and "overflows" in refusals[0].reason
    assert torch.equal(actual, fn(x)) and actual.max() == 0


def test_several_normalised_dims_are_refused():
    actual, matches, refusals = rewrite(lambda x: F.rms_norm(x, (4, 8)), torch.randn(3, 4, 8))
    assert not matches and "last 2 dims" in refusals[0].reason


@pytest.mark.parametrize("fn", [
    lambda x: F.layer_norm(x, (32,)),
    lambda x: (x - mean(x)) * torch.rsqrt(mean((x - mean(x)) ** 2) + 1e-5),
    lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-6),
    lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
    lambda x: torch.softmax(x, -1) * x.mean(),
])
def test_what_is_no_rms_norm_is_passed_over_in_silence(fn):
    _, matches, refusals = rewrite(fn, torch.randn(3, 32))
    assert not matches and not refusals
