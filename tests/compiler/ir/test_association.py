"""The association engine against brute force: every tree agrees in float64, and none is cheaper than the chosen one."""

import dataclasses
import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.compiler.ir.association import CPU, Machine, Operand, Product, best_somewhere, cheapest, crossover, dominates, evaluate, everything, leaf, order, orders, plans

SQ, C = sympy.symbols("Sq C", positive=True)
COMPUTE, MEMORY = Machine(1, 1 << 60), Machine(1 << 60, 1)


def chain(*sizes, roles=None):
    """x0[a, b] x1[b, c] ... : the classical matrix chain."""
    names = "abcdefghijk"
    operands = tuple(Operand(f"x{k}", (names[k], names[k + 1]), roles[k] if roles else "activation") for k in range(len(sizes) - 1))
    return Product(operands, (names[0], names[len(sizes) - 1]), tuple(zip(names, sizes)))


def test_the_matrix_chain_of_the_textbook():
    """CLRS, 15.2: 30x35, 35x15, 15x5, 5x10, 10x20, 20x25 takes 15,125 multiplications, as (x0 (x1 x2)) ((x3 x4) x5)."""
    best = cheapest(orders(chain(30, 35, 15, 5, 10, 20, 25)), COMPUTE)
    assert best.cost.flops == 2 * 15125 and str(best) == "(x0 (x1 x2)) ((x3 x4) x5)"


@st.composite
def einsums(draw):
    """A random product of 2 to 5 operands with 1 to 3 indices each, shared as it happens: batch indices, diagonals, row scalars, outer products, constants."""
    letters = "abcde"[: draw(st.integers(2, 5))]
    sizes = tuple((k, draw(st.integers(1, 4))) for k in letters)
    operands = tuple(Operand(f"x{n}", tuple(draw(st.lists(st.sampled_from(letters), min_size=1, max_size=min(3, len(letters)), unique=True))), draw(st.sampled_from(["constant", "constant", "activation", "cached"])))
                     for n in range(draw(st.integers(2, 5))))
    used = sorted({k for x in operands for k in x.indices})
    output = tuple(draw(st.lists(st.sampled_from(used), unique=True, max_size=3)))
    return Product(operands, output, sizes, fold=draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(einsums(), st.sampled_from([COMPUTE, MEMORY, CPU]))
def test_no_tree_is_cheaper_than_the_chosen_one_and_all_give_the_same(product, machine):
    trees = everything(product)
    assert len(trees) == math.prod(range(1, 2 * len(product.operands) - 2, 2))  # (2n - 3)!!
    chosen = cheapest(orders(product), machine)
    assert all(chosen.cost.seconds(machine) <= p.cost.seconds(machine) for p in trees)
    generator, sizes = torch.Generator().manual_seed(0), dict(product.sizes)
    tensors = {x.name: torch.randn([sizes[k] for k in x.indices], dtype=torch.float64, generator=generator) for x in product.operands}
    letters = {k: k for k in sizes}
    reference = torch.einsum(",".join("".join(letters[k] for k in x.indices) for x in product.operands) + "->" + "".join(product.output), *tensors.values())
    for plan in (*trees, *orders(product)):
        tree = plan.trees[0]
        got = evaluate(tree, tensors).permute([tree.indices.index(k) for k in product.output])
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 8, 40, SQ, C, C + SQ]), min_size=4, max_size=6), st.integers(1, 300), st.integers(0, 5000), st.sampled_from([COMPUTE, MEMORY, CPU]))
def test_nothing_that_is_best_for_some_size_is_dropped(sizes, sq, cached, machine):
    product, at = chain(*sizes), {SQ: sq, C: cached}
    assert cheapest(orders(product), machine, at).cost.seconds(machine, at) == min(p.cost.seconds(machine, at) for p in everything(product))


def test_eight_operands_are_quick_and_nine_are_refused():
    assert cheapest(orders(chain(*[4, 64] * 4, 4)), COMPUTE).cost.flops < 2 * 4 * 64 * 4 * 9
    with pytest.raises(ValueError, match="9 operands"):
        chain(*range(1, 11))


@pytest.mark.parametrize("wrong, message", [
    (lambda: Operand("x", ("a", "a"), "constant"), "an index twice"), (lambda: Operand("x", ("a",), "weight"), "'weight'; expected one of constant"),
    (lambda: Product((Operand("x", ("a",), "constant"),), ("a",), ()), r"no size for the indices \['a'\]"),
    (lambda: Product((Operand("x", ("a",), "constant"),), ("b",), (("a", 1), ("b", 2))), r"no operand has the output's indices \['b'\]"),
    (lambda: Product((Operand("x", ("a",), "constant"),) * 2, ("a",), (("a", 1),)), "two operands of one name"),
])
def test_what_is_no_product(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# ---------------------------------------------------------------- what is folded


def low_rank(m, p, l, tokens=10**6):
    """x W1 W2 with a bottleneck p."""
    operands = (Operand("x", ("i", "m"), "activation"), Operand("W1", ("m", "p"), "constant"), Operand("W2", ("p", "l"), "constant"))
    return Product(operands, ("i", "l"), (("i", tokens), ("m", m), ("p", p), ("l", l)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_two_constants_are_multiplied_only_if_the_bottleneck_is_wide(m, p, l):
    """p > m l / (m + l): the rule for a factorised weight, found and not stated."""
    folds = any(node.folded for node in cheapest(orders(low_rank(m, p, l)), COMPUTE).trees[0].nodes())
    assert folds == (p * (m + l) > m * l) or p * (m + l) == m * l


def test_a_norm_weight_goes_into_the_matrix_and_the_row_scalar_stays():
    """x[i, k] r[i] g[k] W[n, k]: g is a diagonal and folds, r is a factor of the rows: multiplied behind the product if the product is the narrower side."""
    def norm_linear(k, n):
        operands = (Operand("x", ("i", "k"), "activation"), Operand("r", ("i",), "activation"), Operand("g", ("k",), "constant"), Operand("W", ("n", "k"), "constant"))
        return str(cheapest(orders(Product(operands, ("i", "n"), (("i", 1000), ("k", k), ("n", n)))), COMPUTE))

    assert norm_linear(64, 16) == "(x [g W]) r" and norm_linear(16, 64) == "(x r) [g W]"


def test_without_folding_constants_are_multiplied_at_every_call():
    product = low_rank(64, 48, 64, tokens=1)
    assert str(cheapest(orders(product), COMPUTE)) == "x [W1 W2]"
    kept = Product(product.operands, product.output, product.sizes, fold=False)
    assert str(cheapest(orders(kept), COMPUTE)) == "(x W1) W2"


# ---------------------------------------------------------------- multi-head latent attention


def mla(heads=128, latent=512, nope=128, v=128, q_rank=1536, hidden=7168, cached=C, new=SQ, rope=64, **how):
    """The three linear regions of an MLA layer: the part of the scores without rotary, that with it (nothing to choose), and the values."""
    sizes = (("b", 1), ("h", heads), ("i", new), ("j", cached + new), ("m", q_rank), ("p", nope), ("r", rope), ("l", latent), ("v", v), ("o", hidden))
    how = {"joint": ((frozenset("ij"), new * cached + new**2 / sympy.Integer(2)),), "new": (("j", new),), "together": frozenset("ij"), **how}
    x, c = Operand("x", ("b", "i", "m"), "activation"), Operand("c", ("b", "j", "l"), "cached")
    weights = [Operand(name, tuple(indices), "constant") for name, indices in (("W_UQ", "hpm"), ("W_UK", "hpl"), ("W_UV", "hvl"), ("W_O", "ohv"))]
    scores = Product((x, *weights[:2], c), ("b", "h", "i", "j"), sizes, output_on_chip=True, **how)
    roped = Product((Operand("q_pe", ("b", "h", "i", "r"), "activation"), Operand("k_pe", ("b", "j", "r"), "cached")), ("b", "h", "i", "j"), sizes, output_on_chip=True, **how)
    return scores, roped, Product((Operand("P", ("b", "h", "i", "j"), "activation", on_chip=True), c, *weights[2:]), ("b", "i", "o"), sizes, **how)


NAIVE = "(x W_UQ) (W_UK c); (q_pe k_pe); (P (c W_UV)) W_O".replace("(q_pe k_pe)", "q_pe k_pe")
ABSORBED = "((x W_UQ) W_UK) c; q_pe k_pe; ((P c) W_UV) W_O"
GRID = [{SQ: 1 << a, C: cached} for a in range(14) for cached in (0, *(1 << b for b in range(17)))]


def named(candidates, name):
    return next(p for p in candidates if str(p) == name)


def test_deepseek_v3_naive_and_absorbed_are_the_only_plans_that_are_ever_best():
    for machine in (COMPUTE, CPU):
        assert {str(p) for p in best_somewhere(plans(mla()), machine, GRID)} == {NAIVE, ABSORBED}


def test_deepseek_v3_crosses_at_512_thirds():
    """Sq* = L (P + V) / (2L - P - V) for a long prefix; with C cached naive is cheaper iff C 33.55M < 196,608 (Sq C + Sq^2 / 2)."""
    naive, absorbed = (named(plans(mla()), name) for name in (NAIVE, ABSORBED))
    (curve,) = crossover(naive, absorbed, SQ)
    assert sympy.limit(curve, C, sympy.oo) == sympy.Rational(512, 3)
    assert sympy.expand(naive.cost.flops - absorbed.cost.flops) == 33554432 * C - 196608 * (SQ * C + SQ**2 / 2)
    assert [cheapest([naive, absorbed], COMPUTE, {SQ: n, C: 10**7}) for n in (170, 171)] == [absorbed, naive]
    at = float(curve.subs(C, 1000))
    assert cheapest([naive, absorbed], COMPUTE, {SQ: math.floor(at), C: 1000}) is absorbed and cheapest([naive, absorbed], COMPUTE, {SQ: math.ceil(at), C: 1000}) is naive


def test_without_a_prefix_naive_always_wins():
    """Every other order is dominated: it does at least as much work and moves as many bytes for any number of tokens."""
    assert [str(p) for p in plans(mla(cached=sympy.Integer(0)))] == [NAIVE]
    absorbed = next(p for p in everything(mla(cached=sympy.Integer(0))[0]) if str(p) == "((x W_UQ) W_UK) c")
    assert crossover(orders(mla(cached=sympy.Integer(0))[0])[0], absorbed, SQ) == []


def test_decode_absorbs_and_never_multiplies_the_up_projections():
    for sizes in ({SQ: 1, C: 100}, {SQ: 1, C: 65536}, {SQ: 16, C: 4096}):
        assert str(cheapest(plans(mla()), CPU, sizes)) == ABSORBED
    assert all(not any(node.folded for tree in p.trees for node in tree.nodes()) for p in best_somewhere(plans(mla()), CPU, GRID))


def test_a_small_rank_of_the_queries_is_multiplied_out():
    """p = 16 > 8 * 20 / 28: W_UQ W_UK is smaller than both."""
    assert str(cheapest(plans(mla(heads=4, latent=20, nope=16, v=12, q_rank=8, hidden=64, rope=8)), COMPUTE, {SQ: 1, C: 1000})).startswith("(x [W_UQ W_UK]) c")


def test_the_cache_holds_latents_where_memory_counts_and_expanded_keys_where_work_does():
    """Free to choose what is cached: expanded K and V save work for every pair, the latent 71 times of the bytes."""
    candidates = plans(mla(keep_cached=True))
    work, memory = (cheapest(candidates, m, {SQ: 1, C: 4096}) for m in (COMPUTE, MEMORY))
    assert str(work) == "(x W_UQ) <W_UK c>; q_pe k_pe; (P <c W_UV>) W_O" and str(memory) == ABSORBED
    assert work.cost.cached == 4 * (C + SQ) * 128 * 256 and memory.cost.cached == 0


def test_collaborative_heads_scale_the_queries():
    """q m_h k with one key head: scaling the keys writes H of them for every cached token."""
    sizes = (("b", 1), ("h", 8), ("i", SQ), ("j", C + SQ), ("d", 64))
    operands = (Operand("q", ("b", "i", "d"), "activation"), Operand("m", ("h", "d"), "constant"), Operand("k", ("b", "j", "d"), "cached"))
    product = Product(operands, ("b", "h", "i", "j"), sizes, output_on_chip=True)
    assert {str(cheapest(orders(product), CPU, {SQ: 1, C: c})) for c in (64, 1024, 65536)} == {"(q m) k"}


def test_tensors_of_queries_and_keys_stay_in_their_kernel():
    """Without that rule P W_O W_UV before c is among the orders, which no attention kernel computes."""
    *_, values = mla()
    free = everything(dataclasses.replace(values, together=frozenset()))
    assert {str(p) for p in everything(values)} < {str(p) for p in free} and "((P W_UV) W_O) c" in {str(p) for p in free}
    assert all(not {"i", "j"} <= set(node.indices) for p in everything(values) for node in p.trees[0].nodes())


def test_a_given_order_costs_what_the_enumeration_says():
    product = mla()[0]
    assert order(product, (("x", "W_UQ"), ("W_UK", "c"))).cost == next(p.cost for p in everything(product) if str(p) == "(x W_UQ) (W_UK c)")


def test_dominance_needs_every_coefficient():
    ring = sympy.polys.rings.ring("n", sympy.QQ)[0]
    n = ring.gens[0]
    small, large = (n, ring.zero, ring.zero), (n + n**2, ring.zero, ring.zero)
    assert dominates(small, large) and not dominates(large, small)
    assert not dominates((n, n**2, ring.zero), (n**2, n, ring.zero)) and leaf(Operand("x", ("a",), "constant")).names() == {"x"}
