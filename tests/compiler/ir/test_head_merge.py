"""The algebra in float64: what is exact is exact to 1e-10, and the methods come out in their order."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.compiler.ir.head_groups import EXACT_HEADS, group_heads, total
from tileweld.compiler.ir.head_merge import Heads, as_pairs, from_pairs, merge_layer, merge_pairs, merge_rows, ratio, refit_output, root, similarity

few = settings(max_examples=15, deadline=None)
HALF = torch.arange(4).view(2, -1).T


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_heads(seed, heads=4, kv_heads=4, d=4, e=9, pairs=HALF):
    return Heads(randn(heads, d, e, seed=seed), randn(kv_heads, d, e, seed=seed + 1), randn(kv_heads, d, e, seed=seed + 2), randn(heads, 7, d, seed=seed + 3), pairs)


def moment(seed, e=9):
    x = randn(40, e, seed=seed) * torch.linspace(0.1, 2, e, dtype=torch.float64)
    return x.mT @ x / len(x)


def attention_parts(heads, x):
    """(scores of every query head for every rotation angle a pair can see, o v of every head): what merging must keep. x [N, E]."""
    k, v = (y.repeat_interleave(heads.n_rep, 0) for y in (heads.k, heads.v))
    outs = heads.o @ v @ x.T
    if heads.pairs is None:
        return (heads.q @ x.T).mT @ (k @ x.T), outs
    zq, zk = as_pairs(heads.q @ x.T, heads.pairs), as_pairs(k @ x.T, heads.pairs)
    return torch.einsum("hpn,hpm->hpnm", zq, zk.conj()), outs  # every relative angle multiplies these, pair by pair


def query_order(groups, n_rep):
    return [j * n_rep + r for group in groups for j in group for r in range(n_rep)]


@few
@given(st.integers(0, 10**6), st.sampled_from(["rotary", "plain"]), st.sampled_from([1, 2]))
def test_duplicates_up_to_the_gauge_merge_exactly(seed, kind, n_rep):
    pairs = HALF if kind == "rotary" else None
    heads = random_heads(seed, heads=4 * n_rep, pairs=pairs)
    k, v = heads.k.clone(), heads.v.clone()
    for j, twin in ((2, 0), (3, 1)):  # 2 is 0 and 3 is 1, in another gauge
        v[j] = (randn(4, 4, seed=seed + j) + 3 * torch.eye(4)) @ v[twin]
        if kind == "rotary":
            c = torch.complex(randn(1, 2, 1, seed=seed + 5 + j), randn(1, 2, 1, seed=seed + 9 + j))
            k[j] = from_pairs(as_pairs(k[twin][None], pairs) * c, pairs)[0]
        else:
            k[j] = (randn(4, 4, seed=seed + 5 + j) + 3 * torch.eye(4)) @ k[twin]
    heads = Heads(heads.q, k, v, heads.o, pairs)
    s = moment(seed)
    groups = group_heads(similarity(heads, s).tolist(), 2)
    assert groups == [[0, 2], [1, 3]]
    merged, keys, values = merge_layer(heads, s, groups, "data")
    assert max(keys, values) < 1e-7  # a difference of squares: 1e-16 under the root
    x, order = randn(6, 9, seed=seed + 20), query_order(groups, n_rep)
    for new, old in zip(attention_parts(merged, x), attention_parts(heads, x)):
        assert ratio(new - old[order], old) < 1e-10


def test_a_reflection_of_a_rotary_pair_is_no_gauge():
    heads = random_heads(0, heads=2, kv_heads=2)
    k = heads.k.clone()
    k[1] = from_pairs(as_pairs(k[:1], HALF).conj(), HALF)[0]
    _, keys, _ = merge_layer(Heads(heads.q, k, heads.v, heads.o, HALF), moment(0), [[0, 1]], "data")
    assert keys > 0.1
    without, plain_keys, _ = merge_layer(Heads(heads.q, k, heads.v, heads.o, None), moment(0), [[0, 1]], "data")
    assert plain_keys < 1e-7 and without.pairs is None  # without rotary it is one more invertible matrix


@few
@given(st.integers(0, 10**6))
def test_values_of_rank_d_and_keys_of_complex_rank_1_merge_exactly(seed):
    """More than duplicates: four different heads, whose stacked values span only d dimensions, and singular output columns."""
    base, mixes = randn(4, 9, seed=seed), randn(4, 4, 4, seed=seed + 1)
    mixes[1, 0] = 0  # one head sees less than all of them
    shared, maps, error = merge_rows(mixes @ base, torch.eye(4, dtype=torch.float64).expand(4, 4, 4), root(moment(seed)), "data")
    assert ratio(maps @ shared - mixes @ base, mixes @ base) < 1e-10 and error < 1e-10
    row = torch.complex(randn(3, 9, seed=seed + 2), randn(3, 9, seed=seed + 3))
    c = torch.complex(randn(4, 3, seed=seed + 4), randn(4, 3, seed=seed + 5))
    shared, maps, error = merge_pairs(c[..., None] * row, randn(4, 3, seed=seed + 6).abs() + 0.1, root(moment(seed)), "data")
    assert ratio(maps[..., None] * shared - c[..., None] * row, row) < 1e-10 and error < 1e-10


@few
@given(st.integers(0, 10**6), st.sampled_from(["rotary", "plain"]))
def test_the_error_falls_with_every_head_kept(seed, kind):
    heads, s = random_heads(seed, pairs=HALF if kind == "rotary" else None), moment(seed)
    nested = [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]]
    w, metric = heads.v, torch.eye(4, dtype=torch.float64).expand(4, 4, 4)
    squares = [sum((ratio_of(w[g], metric[g], root(s))) ** 2 for g in groups) for groups in nested]
    assert squares[0] >= squares[1] >= squares[2] and squares[2] < 1e-18
    assert merge_layer(heads, s, nested[2], "data")[1:] == pytest.approx((0, 0), abs=1e-7)


def ratio_of(w, metric, l):
    return merge_rows(w, metric, l, "data")[2] * float(torch.linalg.vector_norm(w @ l))


@few
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_weighted_svd_beats_procrustes_beats_the_mean_on_scrambled_heads(seed, noise):
    base, l = randn(4, 9, seed=seed), root(moment(seed))
    turns = torch.linalg.qr(randn(4, 4, 4, seed=seed + 1))[0]
    w = turns @ (base + noise * randn(4, 4, 9, seed=seed + 2))
    metric = torch.eye(4, dtype=torch.float64).expand(4, 4, 4)
    mean, aligned, data = (merge_rows(w, metric, l, method)[2] for method in ("mean", "aligned", "data"))
    assert data <= aligned + 1e-12 and aligned <= mean + 1e-12
    z = torch.complex(w[:, :2], w[:, 2:]) * torch.polar(torch.ones(4, 2, 1, dtype=torch.float64), 3 * randn(4, 2, 1, seed=seed + 3))
    mean, aligned, data = (merge_pairs(z, torch.ones(4, 2, dtype=torch.float64), l, method)[2] for method in ("mean", "aligned", "data"))
    assert data <= aligned + 1e-12 and data < mean


@few
@given(st.integers(0, 10**6))
def test_similarity_does_not_see_the_gauge(seed):
    heads, s = random_heads(seed), moment(seed)
    a = randn(4, 4, 4, seed=seed + 7) + 3 * torch.eye(4)
    c = torch.complex(randn(4, 2, 1, seed=seed + 8), randn(4, 2, 1, seed=seed + 9)) + 2
    other = Heads(from_pairs(as_pairs(heads.q, HALF) / c.conj(), HALF), from_pairs(as_pairs(heads.k, HALF) * c, HALF), a @ heads.v, heads.o @ a.inverse(), HALF)
    assert torch.allclose(similarity(heads, s), similarity(other, s), rtol=1e-9, atol=1e-10)
    assert torch.allclose(similarity(heads, s).diagonal(), torch.full((4,), 2.0, dtype=torch.float64))


@few
@given(st.integers(0, 10**6), st.sampled_from([(4, 2), (6, 2), (6, 3)]))
def test_exact_grouping_is_the_best_of_all(seed, shape):
    n, groups = shape
    a = randn(n, n, seed=seed)
    similar = (a + a.T).tolist()
    found = group_heads(similar, groups)
    assert sorted(sum(found, [])) == list(range(n)) and {len(g) for g in found} == {n // groups}
    assert total(similar, found) == pytest.approx(max(total(similar, p) for p in partitions(list(range(n)), n // groups)))


def partitions(left, size):
    from itertools import combinations
    if not left:
        yield []
        return
    for others in combinations(left[1:], size - 1):
        group = [left[0], *others]
        for rest in partitions([x for x in left if x not in group], size):
            yield [group, *rest]


def test_annealing_finds_planted_groups_and_repeats_itself():
    n, size = 24, 3
    assert n > EXACT_HEADS
    team = torch.randperm(n, generator=torch.Generator().manual_seed(0)) // size
    similar = ((team[:, None] == team) + 0.3 * randn(n, n, seed=1).abs()).tolist()
    found = group_heads(similar, n // size)
    assert found == group_heads(similar, n // size)
    assert all(len({int(team[i]) for i in group}) == 1 for group in found)


def test_fewer_inputs_than_head_dimensions():
    shared, maps, error = merge_rows(randn(2, 6, 2, seed=0), torch.eye(6, dtype=torch.float64).expand(2, 6, 6), torch.eye(2, dtype=torch.float64), "data")
    assert shared.shape == (6, 2) and maps.shape == (2, 6, 6) and error < 1e-12


def test_refit_keeps_an_exact_weight_and_mends_a_wrong_one():
    z, w = randn(50, 6, seed=0), randn(3, 6, seed=1)
    assert ratio(refit_output(z, z @ w.T, w)[0] - w, w) < 1e-12
    wrong = w + randn(3, 6, seed=2)
    mended, strength = refit_output(z, z @ w.T, wrong)
    assert ratio(mended - w, w) < 0.1 * ratio(wrong - w, w) and strength <= 0.03
    many = randn(400, 6, seed=4)
    noise, _ = refit_output(many, randn(400, 3, seed=3), torch.zeros(3, 6, dtype=torch.float64))
    assert noise.abs().max() < 0.1  # what does not carry over to the other half of the tokens is hardly fitted
    assert refit_output(torch.zeros(4, 6), torch.zeros(4, 3), w.float())[0].isfinite().all()
