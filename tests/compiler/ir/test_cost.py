"""Costs of nodes: against torch's own flop counter, against bytes counted by hand, against masks counted by brute force."""

import functools

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tileweld.compiler.ir import add_norm, cost_rows, embedding_norm, rotary  # noqa: F401 (register ops)
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.cost import Call, cost, fused, hints, is_kernel, is_known
from tileweld.compiler.ir.linear import linear  # noqa: F401 (registers the op)
from tileweld.compiler.ir.parser import parse_mask

aten = torch.ops.aten


def traced(f, *args, mode="fake", pre_dispatch=True):
    return make_fx(f, tracing_mode=mode, pre_dispatch=pre_dispatch)(*args)


def costs(f, *args, **kwargs):
    return [c for node in traced(f, *args, **kwargs).graph.nodes if (c := cost(Call(node))) is not None]


def only(f, *args, **kwargs):
    (found,) = costs(f, *args, **kwargs)
    return found


def r(*shape):
    return torch.randn(*shape)


# ---------------------------------------------------------------- FLOPs, against torch.utils.flop_counter

PRODUCTS = {
    "mm": (torch.mm, r(3, 5), r(5, 7)),
    "bmm": (torch.bmm, r(2, 3, 5), r(2, 5, 7)),
    "addmm": (torch.addmm, r(7), r(3, 5), r(5, 7)),
    "baddbmm": (torch.baddbmm, r(2, 3, 7), r(2, 3, 5), r(2, 5, 7)),
    "matmul": (torch.matmul, r(2, 4, 3, 5), r(2, 4, 5, 7)),
    "matmul, batch against none": (torch.matmul, r(2, 4, 3, 5), r(5, 7)),
    "linear": (F.linear, r(2, 3, 5), r(7, 5)),
    "linear with bias": (F.linear, r(2, 3, 5), r(7, 5), r(7)),
    "sdpa": (F.scaled_dot_product_attention, r(2, 4, 6, 8), r(2, 4, 10, 8), r(2, 4, 10, 8)),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), r(2, 4, 9), r(6, 4, 3)),
    "conv2d, groups": (lambda x, w: F.conv2d(x, w, groups=2, stride=2), r(2, 4, 9, 9), r(6, 2, 3, 3)),
}


@pytest.mark.parametrize("pre_dispatch", [True, False], ids=["captured", "decomposed"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_torchs_flop_counter(name, pre_dispatch):
    f, *args = PRODUCTS[name]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        f(*args)
    assert sum(c.matmul for c in costs(f, *args, pre_dispatch=pre_dispatch)) == counter.get_total_flops() > 0


def test_the_backward_of_attention_is_five_products():
    q = r(1, 2, 8, 16).requires_grad_()
    captures = ([], [], "s", "True", float("-inf"), "", "nan")
    forward = only(lambda q: torch.ops.tileweld.attention(q, q, q, *captures), q.detach())
    backward = only(lambda g, q: torch.ops.tileweld.attention_backward(g, q, q, q, *captures)[0], q.detach(), q.detach())
    assert forward.matmul == 2 * 2 * 2 * 8 * 8 * 16 and backward.matmul == 5 * 2 * 2 * 8 * 8 * 16


def test_a_fused_linear_counts_its_products_and_its_texts():
    def f(x, w, c):
        return torch.ops.tileweld.linear(x, [w, w], [c], [], "rms", 1e-6, "x*r*c0[j]", ["a0*sigmoid(a0)*a1"], [0, 0])

    x, w, c = r(6, 8), r(10, 8), r(8)
    found = [k for n in traced(f, x, w, c).graph.nodes if (k := cost(Call(n))) is not None]
    assert len(found) == 1, "the results of a list are no kernels of their own"
    assert found[0].matmul == 2 * 2 * 6 * 8 * 10
    assert found[0].vector == (2 + 2) * 6 * 8 + 3 * 6 * 10  # square and sum, the text's two products; two products and a sigmoid
    assert found[0].read == 4 * (6 * 8 + 10 * 8 + 8) and found[0].written == 4 * 6 * 10, "the same weight twice is read once"


def test_the_other_fused_ops_count_what_they_do():
    x, w, table = r(3, 4, 8), r(8), r(100, 8)
    added = only(lambda x, y, w: torch.ops.tileweld.add_rms_norm(x, y, w, 1e-6, 0.0, "after"), x, r(3, 4, 8), w)
    assert (added.vector, added.read, added.written) == (5 * 96, 4 * (2 * 96 + 8), 4 * 2 * 96)
    turned = only(lambda x, c: torch.ops.tileweld.rotary(x, c, c, 4, "half-split"), r(1, 2, 6, 8), r(6, 4))
    assert turned.vector == 3 * 48
    embedded = only(lambda t, i, w: torch.ops.tileweld.embedding_norm([t], [i], [-1], [1.0], [None], "rms", w, None, 1e-6, 0.0, "after"), table, torch.arange(6), w)
    assert embedded.read == 4 * 6 * 8 + 8 * 6 + 4 * 8 and embedded.written == 4 * 2 * 48


@pytest.mark.parametrize(("f", "shape", "vector"), [(torch.tanh, (3, 4), 12), (lambda x: torch.softmax(x, -1), (3, 4), 60), (lambda x: x.sum(-1), (3, 4), 12), (lambda x: x.mean(), (3, 4), 12),
                                                     (lambda x: F.layer_norm(x, (4,)), (3, 4), 60), (lambda x: F.rms_norm(x, (4,)), (3, 4), 36)])
def test_everything_else_counts_its_elements(f, shape, vector):
    found = only(f, r(*shape))
    assert found.vector == vector and found.matmul == 0


# ---------------------------------------------------------------- bytes


def test_views_cost_nothing_and_copies_cost_both_ways():
    def f(x):
        y = x.view(4, 6).transpose(0, 1).unsqueeze(0).expand(5, 6, 4)[1:3].to(torch.float32).contiguous()
        return y.reshape(2, 24)

    found = only(f, r(24))  # contiguous alone
    assert (found.read, found.written, found.flops) == (4 * 24, 4 * 48, 0), "what is expanded is read once"
    assert only(lambda x: x.t().reshape(-1), r(4, 6)).bytes == 2 * 4 * 24
    assert costs(lambda x: x.reshape(6, 4).flatten(), r(24)) == []


def test_half_types_and_masks_have_their_own_widths():
    found = only(lambda x, m: torch.where(m, x, x), torch.zeros(8, 4, dtype=torch.bfloat16), torch.ones(8, 4, dtype=torch.bool))
    assert (found.read, found.written) == (2 * 32 + 32, 2 * 32)


@pytest.mark.parametrize(("f", "read"), [
    (lambda table, i: F.embedding(i, table), 4 * 5 * 16 + 8 * 5),
    (lambda table, i: table[i], 4 * 5 * 16 + 8 * 5),
    (lambda table, i: table.index_select(0, i), 4 * 5 * 16 + 8 * 5),
    (lambda table, i: torch.zeros_like(table), 0),
])
def test_a_gather_reads_the_rows_it_takes(f, read):
    found = only(f, r(1000, 16), torch.arange(5))
    assert found.read == read


def test_an_op_without_a_row_has_its_bytes_alone_and_is_told_apart():
    gm = traced(lambda x: torch.linalg.inv(x), r(4, 4))
    calls = [Call(n) for n in gm.graph.nodes if is_kernel(Call(n))]
    assert calls and not any(map(is_known, calls))
    first = cost(calls[0])
    assert first.flops == 0 and first.read == 4 * 16


def test_in_place_ops_are_kernels_of_the_same_row():
    found = costs(lambda x: x.clone().add_(1), r(8))
    assert [c.vector for c in found] == [0, 8] and found[1].bytes == 2 * 4 * 8


# ---------------------------------------------------------------- several nodes as one kernel


def members(gm):
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    return fused(nodes, [n for n in nodes if any(u.op == "output" for u in n.users)])


def test_a_region_moves_what_crosses_its_border():
    gm = traced(lambda x, y: torch.relu(x * y + y).exp() + x, r(4, 8), r(8))
    found = members(gm)
    assert (found.vector, found.read, found.written) == (5 * 32, 4 * (32 + 8), 4 * 32)


def test_halves_of_one_tensor_are_read_once_and_a_piece_as_a_piece():
    rotated = traced(lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1), r(6, 8))
    assert members(rotated).read == 4 * 48
    piece = traced(lambda x: x[..., :2].exp() * 2, r(6, 8))
    assert members(piece).read == 4 * 12
    gathered = traced(lambda table, i: F.embedding(i, table) * 2, r(1000, 8), torch.arange(3))
    assert members(gathered).read == 4 * 24 + 8 * 3


# ---------------------------------------------------------------- visible tiles

MASKS = {"j <= i": lambda i, j: j <= i, "(j <= i) & (i - j < 100)": lambda i, j: (j <= i) & (i - j < 100), "j <= i + Tk - Tq": None, "(j <= i) & (c0[b, j] != 0)": lambda i, j: j <= i,
         "(j <= i) | (h < 2)": lambda i, j: torch.ones_like(i + j, dtype=torch.bool), "~(j > i)": lambda i, j: j <= i, "(j <= i) & (i - j < n0)": lambda i, j: (j <= i) & (i - j < 70)}


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (130, 450), (1, 512), (17, 17)])
def test_the_share_of_visible_tiles_is_what_brute_force_counts(text, rows, keys):
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    seen = (MASKS[text] or (lambda i, j: j <= i + keys - rows))(i, j).float()
    tiles = F.max_pool2d(F.pad(seen, (0, -keys % 64, 0, -rows % 64))[None, None], 64).repeat_interleave(64, 2).repeat_interleave(64, 3)[0, 0, :rows, :keys]
    share = cost_rows.visible(parse_mask(text, frozenset({0})), rows, keys, [70] if "n0" in text else [])
    assert isinstance(share, sympy.Rational) and float(share) == pytest.approx(tiles.mean().item(), abs=1e-6)
    assert share >= seen.mean().item() - 1e-6, "never less than what is seen"


def test_causal_attention_counts_the_tiles_below_the_diagonal():
    q = r(1, 2, 256, 8)
    whole, half = (only(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=c), q).matmul for c in (False, True))  # noqa: B023
    ours = only(lambda q: torch.ops.tileweld.attention(q, q, q, [], [], "s", "j <= i", float("-inf"), "", "nan"), q).matmul
    assert half == ours == whole * sympy.Rational(10, 16)


def test_a_score_counts_its_operations():
    plain, capped = (only(lambda q: torch.ops.tileweld.attention(q, q, q, [], [], s, "True", float("-inf"), "", "nan"), r(1, 1, 4, 8)) for s in ("s", "50*tanh(0.02*s)"))  # noqa: B023
    assert plain.vector == 5 * 16 and capped.vector == (5 + 3) * 16
    assert cost_rows.operations(sc.where(sc.J <= sc.I, sc.S, sc.S)) == 1


# ---------------------------------------------------------------- symbols


def test_symbolic_sizes_give_polynomials_that_agree_with_numbers():
    def f(x, w):
        return torch.softmax(F.linear(x, w), -1)

    symbolic, numbers = traced(f, r(6, 8), r(10, 8), mode="symbolic"), traced(f, r(6, 8), r(10, 8))
    known = hints([symbolic])
    assert sorted(known.values()) == [6, 8, 10]
    found = [[c for n in gm.graph.nodes if (c := cost(Call(n))) is not None] for gm in (symbolic, numbers)]
    assert len(found[0]) == len(found[1]) == 2
    for polynomial, number in zip(*found):
        assert polynomial.flops.free_symbols and polynomial.bytes.free_symbols and polynomial.at(known) == number


def test_every_row_is_reached_by_the_name_of_an_op_that_exists():
    for name in cost_rows.ROWS:
        namespace, op = name.split("::")
        if namespace == "aten" and not op.startswith("_scaled"):
            assert hasattr(getattr(torch.ops, namespace), op), name


def test_every_op_of_ours_has_a_row():
    import importlib
    import pkgutil

    from tileweld.compiler import ir

    for module in pkgutil.iter_modules(ir.__path__):
        importlib.import_module(f"tileweld.compiler.ir.{module.name}")
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tileweld::")}
    assert {"tileweld::attention", "tileweld::merge_heads"} <= names and names <= set(cost_rows.ROWS) | {"tileweld::twice"}, names - set(cost_rows.ROWS)  # twice: of another test


def test_attention_with_its_sums_costs_attention_and_merging_a_pass():
    q, k, v = r(2, 4, 6, 8), r(2, 2, 10, 8), r(2, 2, 10, 12)
    plain, both = (only(functools.partial(lambda op, q, k, v: op(q, k, v, [], [], "s", "True", -float("inf"), "", "nan"), op), q, k, v) for op in (torch.ops.tileweld.attention, torch.ops.tileweld.attention_lse))
    assert (both.matmul, both.vector, both.read) == (plain.matmul, plain.vector, plain.read) and both.written == plain.written + 4 * 48
    outs, lses = [r(2, 4, 6, 12) for _ in range(3)], [r(2, 4, 6) for _ in range(3)]
    merged = only(lambda outs, lses: torch.ops.tileweld.merge_lse(outs, lses, "zero"), outs, lses)
    assert (merged.vector, merged.read, merged.written) == (2 * 576 * 3 + 4 * 48 * 3, 4 * 3 * (576 + 48), 4 * (576 + 48))


def test_merged_heads_count_their_products():
    """The root of the second moments [17, 17], o^T o, and for each of two groups of two heads the decomposition of [8, 17] values, of keys too without rotary."""
    q, k, v, o = r(32, 16), r(16, 16), r(16, 16), r(16, 32)
    counted = [only(lambda q, k, v, o: torch.ops.tileweld.merge_heads(q, k, v, o, None, None, None, 8, 4, 2, rotary, True), q, k, v, o) for rotary in ((4, 2), (0, 0))]
    products = 2 * 64 * 17**2 + 2 * 16 * 32 * 4
    assert [c.matmul for c in counted] == [products + 14 * 2 * 64 * 17, products + 14 * 4 * 64 * 17]
    assert counted[0].read == 4 * (512 + 256 + 256 + 512) and counted[0].written == 4 * (512 + 128 + 128 + 512) + 16
