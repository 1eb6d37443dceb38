"""The memory plan by brute force: no two buffers that live at once overlap, and the arena is near its lower bound."""
import hypothesis
import hypothesis.strategies as st
import pytest
from tileweld.compiler.ir.packing import ALIGNMENT, pack, peak

BUFFERS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 8)), max_size=40)


def split(buffers):
    return [n for n, _, _ in buffers], [(first, first + length) for _, first, length in buffers]


def overlapping(sizes, lives, offsets):
    """Pairs of buffers that hold the same byte on the same line."""
    return [(a, b) for a in range(len(sizes)) for b in range(a) if lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            and offsets[a] < offsets[b] + sizes[b] and offsets[b] < offsets[a] + sizes[a]]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(BUFFERS)
def test_nothing_overlaps(buffers):
    sizes, lives = split(buffers)
    offsets, total = pack(sizes, lives)
    assert not overlapping(sizes, lives, offsets)
    assert all(o % ALIGNMENT == 0 for o in offsets) and all(o + n <= total for o, n in zip(offsets, sizes))
    assert peak(sizes, lives) <= total <= sum(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(BUFFERS)
def test_the_peak_is_the_most_that_lives_on_one_line(buffers):
    sizes, lives = split(buffers)
    by_line = [sum(-(-n // ALIGNMENT) * ALIGNMENT for n, (first, last) in zip(sizes, lives) if first <= line <= last) for line in range(40)]
    assert peak(sizes, lives) == max(by_line)


def test_the_test_finds_an_overlap():
    assert overlapping([64, 64], [(0, 2), (1, 3)], [0, 32])
    assert not overlapping([64, 64], [(0, 1), (2, 3)], [0, 32])


def test_a_chain_needs_two_places():
    """a -> b -> c -> ...: what a layer reads, and what it writes."""
    assert pack([1000] * 10, [(k, k + 1) for k in range(10)])[1] == 2 * 1024


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_to_place(sizes):
    assert pack(sizes, [(0, 1)] * len(sizes)) == ([0] * len(sizes), 0)
