"""Memory on large pages: equal tensors, regions that go with their tensors, pages exchanged beneath tensors that somebody writes."""
import gc
import threading
import weakref
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tileweld.compiler.ir import huge_pages
from tileweld.compiler.ir.huge_pages import GAP, LEAST, PAGE, REGION, collapse, empty, ranges, settled

needs_pages = pytest.mark.skipif(not huge_pages.are_there(), reason="this system gives no transparent huge pages")


def large_kib(x) -> int:
    """KiB of large pages in the mapping that holds x"""
    at, found = x.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (span := line.split(" ")[0]) and not span.endswith(":"):
            low, high = (int(end, 16) for end in span.split("-"))
            found = low <= at < high
        elif found and line.startswith("AnonHugePages"):
            return int(line.split()[1])
    raise AssertionError("no mapping")


def region_of(x):
    """A weak reference to the region that holds x."""
    for region in gc.get_objects():
        if type(region) is huge_pages._Region and 0 <= x.data_ptr() - huge_pages.ctypes.addressof(huge_pages.ctypes.c_char.from_buffer(region)) < len(region):
            return weakref.ref(region)
    raise AssertionError("in no region")


def filled(regions) -> int:
    return sum(region.used for region in regions.open)


def resident_kib(x) -> int:
    """KiB of the mappings that hold the region of x: its large pages are a mapping of their own for the system."""
    start = huge_pages.ctypes.addressof(huge_pages.ctypes.c_char.from_buffer(region_of(x)()))
    end, total, inside = start + len(region_of(x)()), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (span := line.split(" ")[0]) and not span.endswith(":"):
            low, high = (int(part, 16) for part in span.split("-"))
            inside = start <= low and high <= end
        elif inside and line.startswith("Rss"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("x", [torch.randn(300, 200), torch.randint(-9, 9, (3, 70000), dtype=torch.int8), torch.randn(256, 512).t(), torch.randn(2, 64, 300).permute(2, 0, 1).half()], ids=lambda x: f"{x.dtype} {[*x.shape]}")
def test_an_equal_tensor(x):
    y = settled(x)
    assert y.dtype == x.dtype and y.shape == x.shape and y.stride() == x.stride() and torch.equal(x, y)
    assert not huge_pages.are_there() or (y is not x and y.data_ptr() % 64 == 0)
    y.zero_()  # it is its own, and writable
    assert not huge_pages.are_there() or x.any()


@pytest.mark.parametrize("x", [torch.randn(8), torch.randn(1000, 100)[:, ::2], torch.randn(1, 10).expand(LEAST, 10), torch.nn.Parameter(torch.randn(300, 300)), torch.empty(300, 300, device="meta"), torch.eye(300).to_sparse()],
                         ids=["small", "with gaps", "expanded", "with a gradient", "elsewhere", "sparse"])
def test_what_stays(x):
    assert settled(x) is x


@needs_pages
def test_the_pages_are_large():
    x = empty((3 * PAGE,), torch.uint8).fill_(1)
    assert large_kib(x) >= 2 * PAGE // 1024


@needs_pages
def test_a_region_goes_with_its_tensors(monkeypatch):
    monkeypatch.setattr(huge_pages, "_regions", huge_pages._Regions())
    first, second = empty((LEAST,), torch.uint8), empty((LEAST,), torch.uint8)
    assert second.data_ptr() == first.data_ptr() + LEAST  # one region for both
    region = region_of(first)
    large = empty((REGION + 1,), torch.int8)  # a region of its own, which nobody else gets a part of
    own, third = region_of(large), empty((LEAST,), torch.uint8)
    assert own() is not region() and third.data_ptr() == second.data_ptr() + LEAST
    del large, third
    gc.collect()
    assert own() is None and region() is not None
    kept = weakref.ref(first)
    del first
    view = second[10:20].fill_(3)  # a view holds it too
    del second
    gc.collect()
    assert kept() is None and region() is not None and view.eq(3).all()
    del view
    gc.collect()
    assert region() is None
    assert empty((LEAST,), torch.uint8).fill_(1).sum() == LEAST  # the next one makes another


@needs_pages
@pytest.mark.skipif(not huge_pages._can_collapse(), reason="Linux before 6.1 exchanges no pages")
def test_what_is_full_lies_on_large_pages_and_no_more_is_resident_than_is_used(monkeypatch):
    monkeypatch.setattr(huge_pages, "_regions", huge_pages._Regions())
    sizes = [PAGE // 2, PAGE // 8, 3 * PAGE // 2 - 64, PAGE // 8 + 128, 3 * PAGE]
    tensors = [empty((n,), torch.uint8).fill_(k + 1) for k, n in enumerate(sizes)]
    assert resident_kib(tensors[0]) * 1024 < sum(sizes) + LEAST  # 5.25 pages: a sixth that is large would have 1.5 MiB of nobody
    assert large_kib(tensors[0]) == sum(sizes) // PAGE * PAGE // 1024
    assert all((x == k + 1).all() for k, x in enumerate(tensors))  # the pages were exchanged beneath them


@needs_pages
def test_the_end_of_a_region_is_for_what_fits(monkeypatch):
    monkeypatch.setattr(huge_pages, "_regions", huge_pages._Regions())
    first, second = empty((REGION - 3 * LEAST,), torch.uint8), empty((4 * LEAST,), torch.uint8)
    third, fourth, fifth = (empty((n * LEAST,), torch.uint8) for n in (2, 2, 1))
    assert region_of(third)() is region_of(fifth)() is region_of(first)() and region_of(fourth)() is region_of(second)() is not region_of(first)()
    empty((REGION - 5 * LEAST,), torch.uint8)  # a third region, for which the first, which is full, is forgotten
    assert region_of(first)() not in huge_pages._regions.open and region_of(second)() in huge_pages._regions.open


@needs_pages
def test_where_pages_cannot_be_exchanged_they_are_large_at_their_first_byte(monkeypatch):
    monkeypatch.setattr(huge_pages, "_regions", huge_pages._Regions())
    monkeypatch.setattr(huge_pages, "_can_collapse", lambda: False)
    tensors = [empty((n,), torch.uint8).fill_(1) for n in (PAGE // 2, PAGE)]
    assert large_kib(tensors[0]) == 2 * PAGE // 1024


@needs_pages
def test_tensors_of_threads_do_not_overlap():
    made, barrier = [], threading.Barrier(4)

    def run(number):
        barrier.wait()
        made.extend(empty((LEAST + 64 * number,), torch.uint8).fill_(number) for _ in range(50))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(made) == 200 and all((x == (x.numel() - LEAST) // 64).all() for x in made)


@given(st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 700)), max_size=8))
def test_ranges_are_the_whole_pages_that_spans_fill(parts):
    """Against a table of cells of GAP bytes, where a single free cell between two spans is a gap that counts as filled."""
    cells = {cell for start, size in parts for cell in range(start, start + size)}
    cells |= {cell + 1 for cell in cells if cell + 2 in cells}
    per_page = PAGE // GAP
    expected = {page for page in range(9) if all(cell in cells for cell in range(page * per_page, (page + 1) * per_page))}
    found = ranges((start * GAP, (start + size) * GAP) for start, size in parts)
    assert [page for a, b in found for page in range(a // PAGE, b // PAGE)] == sorted(expected)
    assert all(a % PAGE == 0 and b % PAGE == 0 and a < b for a, b in found)


@needs_pages
def test_pages_are_exchanged_beneath_a_tensor_that_is_written():
    x = torch.empty(12 * PAGE // 8, dtype=torch.int64)
    x.copy_(torch.arange(x.numel()))
    stop, counts = threading.Event(), torch.zeros(12, dtype=torch.int64)

    def write():
        while not stop.is_set():
            x.view(12, -1)[:, 5] += 1
            counts.add_(1)

    writer = threading.Thread(target=write)
    writer.start()
    thread = collapse([x, x[5:], "no tensor", torch.empty(3, device="meta")])
    thread.join()
    stop.set()
    writer.join()
    x.view(12, -1)[:, 5] -= counts
    assert torch.equal(x, torch.arange(x.numel()))
    assert collapse([x]) is None  # asked for once


def test_nothing_is_asked_for_where_the_system_says_never(monkeypatch):
    monkeypatch.setattr(huge_pages, "are_there", lambda: False)
    x = torch.randn(3 * PAGE // 4)
    assert settled(x) is x and collapse([x]) is None and empty((LEAST,), torch.int8).shape == (LEAST,)


def test_the_setting_is_read(monkeypatch, tmp_path):
    for text, expected in (("always madvise [never]", False), ("always [madvise] never", True), (None, False)):
        path = tmp_path / f"{expected}{text is None}"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(huge_pages, "_SETTING", path)
        monkeypatch.setattr(huge_pages.sys, "platform", "linux")
        assert huge_pages.are_there.__wrapped__() == (expected and hasattr(huge_pages.mmap, "MADV_HUGEPAGE"))


@needs_pages
def test_kept_values_and_int8_modules_lie_on_them(monkeypatch):
    from tileweld import convert

    regions = huge_pages._Regions()
    monkeypatch.setattr(huge_pages, "_regions", regions)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 256)).eval()
    x = torch.randn(2, 256)
    with torch.no_grad():
        expected = model(x)
        by_option = torch.compile(model, backend="tileweld", options={"int8": {"scheme": "weight_only", "force": True}})
        assert (by_option(x) - expected).norm() < 0.02 * expected.norm()
        assert filled(regions) >= 2 * 256 * 512
        used = filled(regions)
        convert.quantize_(model, "weight_only")
        assert filled(regions) >= used + 2 * 256 * 512 and (model(x) - expected).norm() < 0.02 * expected.norm()


@needs_pages
def test_dropped_pages_of_a_file_are_read_again_and_its_neighbours_stay(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1024)
    whole = torch.from_file(str(path), shared=False, size=256 * 1024, dtype=torch.uint8)
    before, part = whole.clone(), whole[5000:200_000]
    whole[:5000].add_(1), whole[200_000:].add_(1)  # private copies of these pages: to drop them would lose what was written
    expected = whole.clone()
    huge_pages.drop_pages(part)
    assert torch.equal(whole, expected) and torch.equal(part, before[5000:200_000])
    huge_pages.drop_pages(whole[10:20])  # no whole page
    assert torch.equal(whole, expected)
