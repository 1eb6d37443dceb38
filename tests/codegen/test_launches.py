"""Runs of launches in an executable: what joins them, what ends them, and that the results are those of a call a kernel."""
import functools
import re
import threading

import pytest
import torch
from tileweld.compiler.assemble import assemble
from tileweld.compiler.ir.kernel import Kernel
from tileweld.compiler.ir.lowered import Launch
from tileweld.compiler.place import Placer
from tileweld.compiler.select import Choice
from tileweld.runtime import launches
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

#: out = 2 x of float matrices with any strides
DOUBLE = """#include <cstdint>
extern "C" void twice(void* const* d, const int64_t* n, const double*) {
  for (int64_t i = 0; i < n[0]; ++i)
    for (int64_t j = 0; j < n[1]; ++j) static_cast<float*>(d[0])[i * n[2] + j * n[3]] = 2 * static_cast<const float*>(d[1])[i * n[6] + j * n[7]];
}
"""


@functools.cache
def built():
    """(the driver, a kernel that doubles)"""
    driver, double = compile_cpp([CppUnit(launches.KERNEL.name, launches.KERNEL.source), CppUnit("twice", DOUBLE)])
    return CppLauncher(driver, launches.KERNEL.entry).entry, CppLauncher(double, "twice")


def executable(f, *inputs, symbolic=False, driver=True):
    """f with every multiplication of a matrix by 2 as a kernel of ours."""
    gm = make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)
    for node in [n for n in gm.graph.nodes if n.target is aten.mul.Tensor and n.args[1] == 2]:
        Placer(gm).put(Choice("twice", "", kernel=Kernel("twice", "cpp", DOUBLE, "twice"), inputs=[node.args[0]], outputs=[node]), Launch("twice", [node.meta["val"]], Kernel("twice", "cpp", DOUBLE, "twice"), built()[1]))
    gm.graph.eliminate_dead_code()
    return assemble(gm, driver=built()[0] if driver else None)


def runs(run) -> list[int]:
    """The steps of each run in an executable's text."""
    return [len(re.findall(r'^        \((?:twice|"index_copy")', table, re.M)) for table in run.text.source.split("= launches(")[1:]]


def step(cache, position, x):
    """As a decode step: keys are written, then read."""
    k = (x * 2) * 2
    cache.index_copy_(0, position, k)
    return (cache * 2).sum(0, keepdim=True) + 0 * k, (k[:, 1:] * 2) * 2


CASES = {
    "in sequence": (lambda x: ((x * 2) * 2) * 2, [3]),
    "with views": (lambda x: (((x * 2).t() * 2)[1:] * 2, x.t() * 2), [4]),
    "one alone": (lambda x: (x * 2).sin(), []),
    "what torch does ends a run": (lambda x: ((((x * 2) * 2).sin() * 2) * 2), [2, 2]),
    "torch before and behind": (lambda x: ((x.sin() * 2)[1:] * 2).cos(), [2]),
    "of constants": (lambda x: (x * 2, torch.full((2, 2), 3.0) * 2), [2]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_runs_together(name):
    f, expected = CASES[name]
    run = executable(f, torch.randn(3, 4))
    assert runs(run) == expected and not runs(executable(f, torch.randn(3, 4), driver=False))
    for _ in range(3):
        x = torch.randn(3, 4)
        torch.testing.assert_close(torch.utils._pytree.tree_leaves(run([x])), torch.utils._pytree.tree_leaves(f(x)), rtol=0, atol=0)


def test_symbolic_sizes_have_no_runs():
    """Their tables would be made anew with every size."""
    f = CASES["in sequence"][0]
    run = executable(f, torch.randn(3, 4), symbolic=True)
    assert runs(run) == [] and torch.equal(torch.utils._pytree.tree_leaves(run([x := torch.randn(3, 4)]))[0], f(x))


def test_a_cache_is_written_and_read_in_one_run():
    run = executable(step, torch.zeros(6, 4), torch.tensor([1]), torch.randn(1, 4))
    assert runs(run) == [4, 2]  # the sum is torch's
    ours, torchs = torch.randn(6, 4), None
    torchs = ours.clone()
    for p in (3, 0, 5):
        x, version = torch.randn(1, 4), ours._version
        torch.testing.assert_close(list(run([ours, torch.tensor([p]), x])), list(step(torchs, torch.tensor([p]), x)), rtol=0, atol=0)
        assert torch.equal(ours, torchs) and ours._version > version, "autograd and kept weights ask for the version"
    before = ours.clone()
    with pytest.raises(IndexError):
        run([ours, torch.tensor([6]), x])
    assert torch.equal(ours, before)
    run([ours, torch.tensor([2]), x])  # the arena of the call that failed is not missed
    assert torch.equal(ours[2], 4 * x[0])


def test_a_cache_with_other_strides_than_traced_is_written_nevertheless():
    run = executable(step, torch.zeros(6, 4), torch.tensor([1]), torch.randn(1, 4))
    for cache in (torch.randn(4, 6).t(), torch.randn(6, 9)[:, 2:6]):
        torchs, x = cache.clone(), torch.randn(1, 4)
        torch.testing.assert_close(list(run([cache, torch.tensor([2]), x])), list(step(torchs, torch.tensor([2]), x)))  # torch sums in another order
        assert torch.equal(cache, torchs)


def test_an_alias_of_the_cache_is_read_behind_the_write():
    def f(cache, position, x):
        before = cache[1:] * 2
        cache.index_copy_(0, position, x * 2)
        return before, cache[1:] * 2, cache.t() * 2

    run = executable(f, torch.zeros(6, 4), torch.tensor([1]), torch.randn(1, 4))
    for make in (lambda: torch.randn(6, 4), lambda: torch.randn(4, 6).t()):
        ours = make()
        torchs, x = ours.clone(), torch.randn(1, 4)
        torch.testing.assert_close(list(run([ours, torch.tensor([4]), x])), list(f(torchs, torch.tensor([4]), x)), rtol=0, atol=0)
        assert torch.equal(ours, torchs)


def test_two_writes_of_one_cache():
    def f(cache, position, x):
        y = cache.index_copy(0, position, x * 2)
        cache.index_copy_(0, position, x * 2)
        cache.index_copy_(0, position + 1, (x * 2) * 2)
        return cache * 2, y

    run = executable(f, torch.zeros(6, 4), torch.tensor([1]), torch.randn(1, 4))
    ours = torch.randn(6, 4)
    torchs, x = ours.clone(), torch.randn(1, 4)
    torch.testing.assert_close(list(run([ours, torch.tensor([4]), x])), list(f(torchs, torch.tensor([4]), x)), rtol=0, atol=0)
    assert torch.equal(ours, torchs)


def test_writes_that_are_left_to_torch():
    """A long one, which torch does on all threads; one of the cache's own rows, which torch refuses."""
    def long(cache, position, x):
        cache.index_copy_(0, position, x)
        return (cache * 2) * 2

    def overlapping(cache, position):
        cache.index_copy_(0, position, cache[2:3])
        return (cache * 2) * 2

    given = [torch.zeros(300, 400), torch.arange(200), torch.randn(200, 400)]
    run, torchs = executable(long, *given), given[0].clone()
    assert '"index_copy"' not in run.text.source
    assert torch.equal(torch.utils._pytree.tree_leaves(run([*given]))[0], long(torchs, *given[1:])) and torch.equal(given[0], torchs)
    with pytest.raises(RuntimeError, match="single memory location"):
        executable(overlapping, torch.randn(6, 4), torch.tensor([1]))([torch.randn(6, 4), torch.tensor([1])])


def test_threads():
    run, wrong = executable(lambda x: ((((x * 2) * 2)) * 2), torch.randn(64, 64)), []

    def work():
        for _ in range(50):
            x = torch.randn(64, 64)
            if not torch.equal(torch.utils._pytree.tree_leaves(run([x]))[0], x * 8):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
