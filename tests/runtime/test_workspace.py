"""Workspaces: kept between calls, one a call in flight, laid out again for other sizes, freed with their executable."""
import gc
import threading
import weakref

import pytest
import torch
from tileweld.runtime.workspace import Workspaces


def two_rows(count=2):
    """A pool whose calls have `count` live buffers of n floats each."""
    made = []

    def prepare(place, n):
        made.append(n)
        return tuple(place(k, (n,), (1,), torch.float32) for k in range(count))

    return Workspaces(lambda n: [4 * n] * count, [(0, 9)] * count, prepare, torch.device("cpu")), made


def test_the_same_tensors_come_back():
    pool, made = two_rows()
    first = pool.take(10)
    tensors = first.tensors
    pool.give(first)
    assert pool.take(10).tensors is tensors and made == [10]


def test_buffers_do_not_overlap_and_are_aligned():
    pool, _ = two_rows(3)
    a, b, c = pool.take(5).tensors
    a.fill_(1), b.fill_(2), c.fill_(3)
    assert [x.tolist() for x in (a, b, c)] == [[1.0] * 5, [2.0] * 5, [3.0] * 5]
    assert len({x.data_ptr() % 64 for x in (a, b, c)}) == 1


def test_two_calls_at_once_have_their_own():
    pool, _ = two_rows()
    one, two = pool.take(10), pool.take(10)
    assert one is not two and one.tensors[0].untyped_storage().data_ptr() != two.tensors[0].untyped_storage().data_ptr()


def test_grows_and_shrinks():
    pool, _ = two_rows()
    sizes = []
    for n in (10, 1000, 20, 1001, 1002, 1003):
        w = pool.take(n)
        assert all(len(x) == n for x in w.tensors)
        sizes.append(w.arena.numel())
        pool.give(w)
    assert sizes[0] == 128 and sizes[1] >= 8000 and sizes[2:] == [sizes[1]] * 4, "a length that grows by one is no new arena"


def test_a_failed_call_leaves_the_pool_usable():
    pool, _ = two_rows()
    pool.take(10)  # never given back
    gc.collect()
    assert len(pool.take(10).tensors) == 2


def test_arena_is_freed_with_the_pool():
    pool, _ = two_rows()
    w = pool.take(10)
    alive = weakref.ref(w.arena)
    pool.give(w)
    del w, pool
    gc.collect()
    assert alive() is None


def test_made_in_inference_mode_usable_outside():
    pool, _ = two_rows()
    with torch.inference_mode():
        w = pool.take(4)
        w.tensors[0].fill_(1)
        pool.give(w)
    (a, _) = pool.take(4).tensors
    torch.add(a, 1, out=a)
    assert not a.is_inference()


def test_threads_never_share():
    pool, _ = two_rows()
    errors = []

    def work(number):
        for step in range(200):
            w = pool.take(50 + step % 3)
            a, b = w.tensors
            a.fill_(number), b.fill_(-number)
            if not (a == number).all() or not (b == -number).all():
                errors.append(number)
            pool.give(w)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.int64, torch.float64])
def test_every_dtype(dtype):
    pool = Workspaces(lambda: [3, 8 * 7], [(0, 1), (0, 1)], lambda place: (place(0, (3,), (1,), torch.uint8), place(1, (7,), (1,), dtype)), "cpu")
    small, x = pool.take().tensors
    x.fill_(1)
    small.fill_(9)
    assert x.dtype == dtype and (x == 1).all()
