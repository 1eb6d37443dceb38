"""tileweld::merge_heads and the reading of epilogues as linear maps."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.compiler.ir import merge_heads as _op  # noqa: F401 (registers the op)
from tileweld.compiler.ir.graph import insert
from tileweld.compiler.ir.linear_map import linear_map, pairs_of
from tileweld.compiler.ir.unliftable import Unliftable

D, HEADS, WIDTH = 4, 3, 5
merge = torch.ops.tileweld.merge_heads.default


def layer(seed, heads, kv_heads, biases=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)
    weights = random(heads * D, WIDTH), random(kv_heads * D, WIDTH), random(kv_heads * D, WIDTH), random(WIDTH, heads * D)
    return *weights, *((random(heads * D), random(kv_heads * D), random(kv_heads * D)) if biases else (None,) * 3)


def attend(q, k, v, o, bq, bk, bv, heads, kv_heads, rotary, x):
    """Causal attention of x [T, WIDTH]; rotary by pairs of dims."""
    rows = lambda w, b, n: (x @ w.T + (0 if b is None else b)).unflatten(1, (n, -1)).transpose(0, 1)
    q, k, v = rows(q, bq, heads), rows(k, bk, kv_heads), rows(v, bv, kv_heads)
    if rotary != (0, 0):
        pairs = pairs_of(*rotary, D)
        angle = torch.outer(torch.arange(len(x), dtype=x.dtype), torch.tensor([1.0, 0.3], dtype=x.dtype))

        def turn(y):
            a, b, out = y[..., pairs[:, 0]], y[..., pairs[:, 1]], torch.empty_like(y)
            out[..., pairs[:, 0]], out[..., pairs[:, 1]] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
            return out
        q, k = turn(q), turn(k)
    k, v = (y.repeat_interleave(heads // kv_heads, 0) for y in (k, v))
    scores = (q @ k.mT).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ o.T


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(0, 0), (4, 2), (2, 1)]), st.booleans(), st.sampled_from([(4, 4, 2), (8, 4, 2), (3, 3, 1)]), st.booleans())
def test_duplicates_merge_exactly(seed, rotary, biases, counts, permutes):
    heads, old, new = counts
    q, k, v, o, bq, bk, bv = layer(seed, heads, old, biases)
    twins = [j % new if permutes else j // (old // new) for j in range(old)]
    k, v, bk, bv = (None if x is None else x.unflatten(0, (old, D))[twins].flatten(0, 1) for x in (k, v, bk, bv))
    merged = merge(q, k, v, o, bq, bk, bv, heads, old, new, list(rotary), permutes)
    weights, small, errors = merged[:4], merged[4:-1] or [None] * 3, merged[-1]
    x = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = attend(q, k, v, o, bq, bk, bv, heads, old, rotary, x)
    result = attend(*weights, *small, heads, new, rotary, x)
    assert torch.linalg.vector_norm(result - expected) <= 1e-10 * torch.linalg.vector_norm(expected) and errors.max() < 1e-6
    assert merged[1].shape == merged[2].shape == (new * D, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biases", [True, False])
def test_the_op_is_registered_as_torch_wants_it(dtype, biases):
    torch.library.opcheck(merge, (*layer(0, 4, 4, biases, dtype), 4, 4, 2, [4, 2], True), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(merge, (*layer(0, 4, 4, biases, dtype), 4, 4, 4, [0, 0], True), test_utils=("test_schema", "test_faketensor"))


def test_numbers_that_do_not_fit():
    for counts in ((4, 4, 3), (6, 4, 2)):
        with pytest.raises(Exception, match="do not divide|no multiple"), torch._subclasses.FakeTensorMode():
            merge(*layer(0, 4, 4), *counts, [0, 0], True)


# ---------------------------------------------------------------- linear_map


def read(text, pair=(0, 0), captures=(), columns=HEADS * D):
    """The map of one output of a tileweld::linear with this epilogue; captures: fake tensors as inputs of the graph."""
    graph, mode = torch.fx.Graph(), torch._subclasses.FakeTensorMode()
    with mode:
        nodes = []
        for name, tensor in (("x", torch.empty(6, WIDTH)), ("w", torch.empty(columns, WIDTH)), *((f"c{n}", c) for n, c in enumerate(map(mode.from_tensor, captures)))):
            nodes.append(graph.placeholder(name))
            nodes[-1].meta["val"] = tensor
        made = insert(graph, torch.ops.tileweld.linear.default, nodes[0], [nodes[1]], nodes[2:], [], "", 0.0, "x", [text], list(pair))
    return linear_map(made, 0, D)


BIAS, TABLE = torch.empty(HEADS * D), torch.empty(6, D)


@pytest.mark.parametrize(("text", "pair", "captures", "bias"), [
    ("a0", (0, 0), (), None), ("a0 + c0[j]", (0, 0), (BIAS,), 0), ("0.25*(a0 + c0[j])", (0, 0), (BIAS,), 0), ("a0*c0[i]", (0, 0), (torch.empty(6),), None), ("0.5*a0 + 0.5*c0[j]", (0, 0), (BIAS,), 0),
    ("a0*c0[i, mod(j, 2)] + where(mod(j, 4) < 2, -p0, p0)*c1[i, mod(j, 2)]", (4, 2), (torch.empty(6, 2), torch.empty(6, 2)), None),
    ("(a0 + c2[j])*c0[i, mod(j, 2)] + where(mod(j, 4) < 2, -(p0 + c2[j + 2]), p0 + c2[j - 2])*c1[i, mod(j, 2)]", (4, 2), (torch.empty(6, 2), torch.empty(6, 2), BIAS), 2),
    ("a0*c0[i, floordiv(mod(j, 4), 2)] + where(mod(j, 2) < 1, -p0, p0)*c1[i, floordiv(mod(j, 4), 2)]", (2, 1), (torch.empty(6, 2), torch.empty(6, 2)), None),
])
def test_linear_maps_are_read(text, pair, captures, bias):
    found = read(text, pair, captures)
    assert (found.weight, found.bias, found.pair) == (0, bias, pair)


@pytest.mark.parametrize(("text", "pair", "captures", "match"), [
    ("a0 + c0[i, j]", (0, 0), (torch.empty(6, HEADS * D),), "every head"), ("a0 + 1", (0, 0), (), "not linear"), ("tanh(a0)", (0, 0), (), "not linear"), ("a0*a0", (0, 0), (), "not linear"),
    ("a0*c0[j]", (0, 0), (BIAS,), "factors of their own|every head|not linear"), ("a0*c0[mod(j, 4)]", (0, 0), (torch.empty(D),), "factors of their own"), ("a0*c0[floordiv(j, 4)]", (0, 0), (torch.empty(HEADS),), "every head"),
    ("a0 + a0", (0, 0), (), "adds the product"), ("a0 + c0[j] + c1[j]", (0, 0), (BIAS, BIAS), "two vectors"), ("a0 + 2*c0[j]", (0, 0), (BIAS,), "no bias"), ("a0 + c0[j]*c1[i]", (0, 0), (BIAS, torch.empty(6)), "no bias"),
    ("a0*c0[i, mod(j, 4)] + where(mod(j, 4) < 2, -p0, p0)*c1[i, mod(j, 4)]", (4, 2), (TABLE, TABLE), "one angle"),
    ("a0*c0[i, mod(j, 2)] + p0*c1[i, mod(j, 2)]", (4, 2), (torch.empty(6, 2), torch.empty(6, 2)), "something else than a rotation"),
    ("a0*c0[i, mod(j, 2)] + where(mod(j, 4) < 2, -p0, p0)*c1[i, mod(j, 2)] + c2[j]", (4, 2), (torch.empty(6, 2), torch.empty(6, 2), BIAS), "no bias"),
    ("a0*c0[i, mod(j, 1)] + where(mod(j, 4) < 1, -p0, p0)*c1[i, mod(j, 1)]", (4, 1), (torch.empty(6, 1), torch.empty(6, 1)), "part of the head"),
])
def test_what_is_none_is_refused(text, pair, captures, match):
    with pytest.raises(Unliftable, match=match):
        read(text, pair, captures)
