"""q, k and v of one head after another in one weight ([heads, 3, dim]): one output of one op with rotary in it; other packings are slices; what does not fit stays apart."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.columns import Accumulator
from tileweld.compiler.ir.linear_packed import cannot_pack, joined, widened
from tileweld.compiler.ir.parser import parse
from tileweld.compiler.ir.printer import text

B, T, D, WIDTH = 2, 5, 8, 24


def rotate(x, cos, sin, form, part):
    """The first ``part`` of D columns, half-split or interleaved."""
    y, rest = x[..., :part], x[..., part:]
    if form == "half-split":
        turned = torch.cat([-y[..., part // 2:], y[..., : part // 2]], -1)
    else:
        turned = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
    return torch.cat([y * cos[..., :part] + turned * sin[..., :part], rest], -1)


def split(y, heads, order):
    """q, k, v [B, heads, T, D] of the packed columns, as chunks or selects."""
    if order == "chunk":
        return y.view(B, -1, heads, 3 * D).transpose(1, 2).chunk(3, -1)
    y = y.view(B, -1, heads, 3, D)
    return [y[..., k, :].transpose(1, 2) for k in range(3)]


def model(form="half-split", part=D, order="chunk", heads=3, forms=None):
    def fn(x, w, b, cos, sin):
        q, k, v = split(torch.nn.functional.linear(x, w, b), heads, order)
        return rotate(q, cos, sin, (forms or (form,))[0], part), rotate(k, cos, sin, (forms or (form,))[-1], part), v

    return fn


def operands(heads=3, bias=True, length=T):
    w = torch.nn.Parameter(torch.randn(heads * 3 * D, WIDTH) * 0.3)
    return torch.randn(B, length, WIDTH), w, torch.nn.Parameter(torch.randn(heads * 3 * D)) if bias else None, torch.randn(length, D), torch.randn(length, D)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["chunk", "select"])
@pytest.mark.parametrize(("form", "part"), [("half-split", D), ("half-split", 4), ("interleaved", D), ("interleaved", 4)])
def test_every_form_in_one_op(rewriting, form, part, order, bias):
    report = rewriting.check(model(form, part, order), *operands(bias=bias), count={"qkv_rotary": 1, "rotary": 0, "linear": 0})
    assert "rotary on 2 of 3" in report.fusions[0].detail


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture holds no state
@given(st.integers(1, 4), st.sampled_from(["half-split", "interleaved"]), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from(["chunk", "select"]))
def test_fuzz(rewriting, heads, form, part, bias, order):
    rewriting.check(model(form, part, order, heads), *operands(heads, bias), count={"qkv_rotary": 1})


def test_gradients_and_dynamic_shapes(rewriting):
    rewriting.check_gradients(model(part=4), *operands(), count={"qkv_rotary": 1})


@pytest.mark.parametrize("target", ["cpp", "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels(target, bias):
    torch._dynamo.reset()
    fn, inputs = model(part=4), operands(bias=bias)
    with torch.no_grad():
        expected, got = fn(*inputs), torch.compile(fn, backend="tileweld", options={"target": target})(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_part_alone_copies_no_weight(rewriting):
    """Only q is read: its columns are no slice of the weight, so the linear stays whole."""
    def fn(x, w, b, cos, sin):
        return rotate(split(torch.nn.functional.linear(x, w, b), 3, "chunk")[0], cos, sin, "half-split", D)

    rewriting.check(fn, *operands(), count={"qkv_rotary": 0})


def test_different_pairs_stay_apart(rewriting):
    rewriting.check(model(forms=("half-split", "interleaved")), *operands(), count={"qkv_rotary": 0, "linear": 1})


def test_without_rotary_it_is_one_linear(rewriting):
    rewriting.check(lambda x, w, b, cos, sin: tuple(split(torch.nn.functional.linear(x, w, b), 3, "chunk")), *operands(), count={"qkv_rotary": 0, "linear": 1})


def test_key_and_value_heads_behind_the_query_heads_are_slices(rewriting):
    """Falcon: [heads + 2, dim], the key head taken with a list of one."""
    def fn(x, w, b, cos, sin):
        y = torch.nn.functional.linear(x, w, b).view(B, T, 9, D)
        q, k, v = (t.transpose(1, 2) for t in (y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]))
        return rotate(q, cos, sin, "half-split", D), rotate(k, cos, sin, "half-split", D), v * 2  # as it is, a gather that leaves the graph may not become a view

    report = rewriting.check(fn, *operands(), count={"qkv_rotary": 1})
    assert "[56, 24] + 2x[8, 24]" in report.fusions[0].detail


@pytest.mark.parametrize("chosen", [[0, 2], [2, 1], [1, 1]])
def test_lists_that_are_no_slice_stay_gathers(rewriting, chosen):
    rewriting.check(lambda x, w, b, cos, sin: torch.nn.functional.linear(x, w, b).view(B, T, 9, D)[..., chosen, :], *operands(), count={"linear": 1})


# ---------------------------------------------------------------- the text of the whole from those of the parts

Q, K, V = (Accumulator(0, 8 * n, 1, 8, 24) for n in range(3))


def test_the_joined_text_says_what_a_column_gets():
    e, plain = (widened(parse(t, frozenset()), a) for t, a in (("a0*c0[i, mod(j, 8)]", Q), ("a0", V)))
    assert text(joined([(Q, e), (K, e), (V, plain)])) == "where(mod(j, 24) < 16, a0*c0[i, mod(j, 8)], a0)"
    assert text(joined([(V, plain), (Q, plain), (K, plain)])) == "a0"
    assert text(widened(parse("a0*c0[floordiv(j, 8)]", frozenset()), Q)) == "a0*c0[floordiv(j, 24)]"


def test_what_is_no_part_of_one_text():
    plain = sc.accumulator_symbol("a0")
    assert cannot_pack([(Q, (0, 0), plain), (V, (8, 4), plain)]) is None
    assert "different periods" in cannot_pack([(Q, (0, 0), plain), (Accumulator(0, 8, 1, 8, 16), (0, 0), plain)])
    assert "different ways" in cannot_pack([(Q, (8, 4), plain), (K, (2, 1), plain)])
    assert "do not fit" in cannot_pack([(Accumulator(0, 4, 1, 8, 24), (8, 4), plain)])
    assert "more than a head's columns" in cannot_pack([(Q, (0, 0), parse("a0 + c0[i, j]", frozenset()))])
