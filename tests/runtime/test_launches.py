"""A run: kernels in the order of its table, with the addresses of this call, and index_copy as torch does it."""
import functools
import struct

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher, floats, integers
from tileweld.runtime.launches import DIMS, KERNEL, launches

#: data: out, x of int64; out = floats[0] x + ints[0]
AFFINE = '#include <cstdint>\nextern "C" void affine(void* const* d, const int64_t* n, const double* f) { *(int64_t*)d[0] = int64_t(f[0]) * *(const int64_t*)d[1] + n[0]; }\n'


@functools.cache
def built():
    """(the driver, affine)"""
    libraries = compile_cpp([CppUnit(KERNEL.name, KERNEL.source), CppUnit("affine", AFFINE)])
    return CppLauncher(libraries[0], KERNEL.entry).entry, CppLauncher(libraries[1], "affine").entry


def addresses(*tensors):
    return struct.pack(f"{len(tensors)}P", *(x.data_ptr() for x in tensors))


def test_in_order_with_the_addresses_of_each_call():
    driver, affine = built()
    buffer, numbers, factor = torch.zeros(4, dtype=torch.int64), integers(5), floats(3.0)
    first = buffer.data_ptr()
    run = launches(driver, ("x", "y"), (affine, (first, "x"), numbers, factor), (affine, (first + 8, first), integers(1), floats(10.0)), (affine, ("y + 8", "kept[1] + 8"), integers(0), floats(1.0)),
                   (affine, ("y", first + 8), integers(0), floats(1.0)))
    for n in (1, 7):
        x, y, kept = torch.tensor([n]), torch.zeros(2, dtype=torch.int64), [torch.tensor([0, 0]), torch.tensor([0, 40 + n])]
        run(addresses(*kept), addresses(x, y))
        assert buffer.tolist()[:2] == [3 * n + 5, 30 * n + 51] and y.tolist() == [30 * n + 51, 40 + n]


def test_numbers_outlive_the_call_that_packed_them():
    driver, affine = built()
    x, out = torch.tensor([2]), torch.zeros(1, dtype=torch.int64)
    runs = [launches(driver, (), (affine, (out.data_ptr(), x.data_ptr()), integers(1000 + k), floats(float(k)))) for k in range(50)]
    for k, run in enumerate(runs):
        run(b"", b"")
        assert out.item() == 2 * k + 1000 + k


@pytest.mark.parametrize("text", ["", "x[", "x - 8", "x[a]", "x + y", "f(x)"])
def test_a_place_that_is_none(text):
    driver, affine = built()
    with pytest.raises(ValueError, match="no place in memory"):
        launches(driver, ("x",), (affine, (text, 0), b"", b""))


def copies(into, dim, index, source):
    """index_copy_ as a step."""
    numbers = integers(into.dim(), dim, into.element_size(), into.shape[dim], index.stride(0) if index.dim() else 0, *source.shape, *into.stride(), *source.stride())
    launches(built()[0], ("into", "index", "source"), ("index_copy", ("into", "index", "source"), numbers, floats()))(b"", addresses(into, index, source))


@st.composite
def problems(draw):
    """A cache, a dim, positions, and what is written: any strides, any dtype."""
    dims = draw(st.integers(1, 4))
    shape = [draw(st.integers(0 if d else 1, 4)) for d in range(dims)]
    dim = draw(st.integers(0, dims - 1))
    shape[dim] = max(1, shape[dim])
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float64]))
    count = draw(st.integers(0, shape[dim]))
    index = torch.tensor(draw(st.permutations(range(shape[dim])))[:count], dtype=torch.int64)
    if draw(st.booleans()):
        index = torch.stack([index, index], 1)[:, 0]
    made = []
    for sizes in (shape, [count if d == dim else n for d, n in enumerate(shape)]):
        order = draw(st.permutations(range(dims)))
        gap = draw(st.integers(1, 2))
        whole = torch.randint(-100, 100, [sizes[d] for d in order[:-1]] + [sizes[order[-1]] * gap]).to(dtype)
        made.append(whole[..., ::gap].permute([order.index(d) for d in range(dims)]))
    return made[0], dim, index, made[1]


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(problems())
def test_index_copy_is_torchs(problem):
    into, dim, index, source = problem
    whole = into if into._base is None else into._base
    expected = whole.clone().as_strided(into.shape, into.stride(), into.storage_offset()) if whole.numel() else into.clone()
    reference = expected if expected._base is None else expected._base
    expected.index_copy_(dim, index, source)
    copies(into, dim, index, source)
    assert torch.equal(into, expected) and (not whole.numel() or torch.equal(whole, reference)), "written beside it"


def test_index_copy_of_a_number_of_no_dims():
    into = torch.zeros(3, 2)
    copies(into, 0, torch.tensor(2), torch.ones(1, 2))
    assert into.tolist() == [[0, 0], [0, 0], [1, 1]] and DIMS == 16


@pytest.mark.parametrize("position", [-1, 4, 2**40])
def test_behind_the_end(position):
    """IndexError as in eager; nothing is written, and what comes behind is not run."""
    driver, affine = built()
    cache, x, out = torch.zeros(4, 2), torch.ones(2, 2), torch.zeros(1, dtype=torch.int64)
    numbers = integers(2, 0, 4, 4, 1, 2, 2, 2, 1, 2, 1)
    run = launches(driver, ("index",), ("index_copy", (cache.data_ptr(), "index", x.data_ptr()), numbers, b""), (affine, (out.data_ptr(), "index"), integers(1), floats(0.0)))
    wrong, right = torch.tensor([1, position]), torch.tensor([1, 3])
    with pytest.raises(IndexError, match="behind its end"):
        run(b"", addresses(wrong))
    assert not cache.any() and out.item() == 0
    run(b"", addresses(right))
    assert cache.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]] and out.item() == 1
