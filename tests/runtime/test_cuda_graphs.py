"""When a graph is captured, what it reads, and what it must never change. torch.cuda is a stand-in: a replay runs the function again."""
import contextlib
import threading

import torch
from tileweld.runtime.cuda_graphs import MOST, WARM_UPS, CudaGraphs


class Cuda:
    """What CudaGraphs needs of torch.cuda. While it captures nothing must be computed for good, so results are spoilt until a replay."""

    def __init__(self):
        self.captures, self.replays, self.stream, self.wrapped = 0, 0, 1, None

    def current_stream(self):
        return self.stream

    def CUDAGraph(self):  # noqa: N802 (torch's name)
        return self

    @contextlib.contextmanager
    def graph(self, graph):
        self.captures += 1
        yield

    def replay(self):
        self.replays += 1
        entry = next(e for e in self.wrapped._entries.values() if e.graph is not None)
        for own, new in zip(entry.results, self.wrapped._function([*entry.inputs])):
            own.copy_(new)


def wrapped(function, written=()):
    cuda = Cuda()
    cuda.wrapped = CudaGraphs(lambda a: function(*a), written, cuda=cuda, device="cpu")
    return cuda.wrapped, cuda


def test_captured_after_the_warm_ups_and_equal():
    run, cuda = wrapped(lambda x, w: (x @ w, x + 1))
    w, held = torch.randn(3, 3), []
    for call in range(6):
        x = torch.randn(3, 3)
        got = run([x, w])
        held.append((got, (x @ w, x + 1)))
        assert cuda.captures == (call >= WARM_UPS)
    assert cuda.replays == 6 - WARM_UPS
    for got, expected in held:  # no later call changed them
        torch.testing.assert_close(got, expected)


def test_weights_are_read_in_place_inputs_copied():
    run, cuda = wrapped(lambda x, w: (x @ w,))
    w, keep = torch.randn(3, 3), []
    for _ in range(4):
        keep.append(torch.randn(3, 3))
        run([keep[-1], w])
    (entry,) = run._entries.values()
    assert entry.inputs[1] is w and entry.inputs[0] is not keep[-1] and entry.fixed == [False, True]
    w.mul_(2)
    torch.testing.assert_close(run([keep[0], w])[0], keep[0] @ w)


def test_a_weight_that_moved_runs_without_the_graph():
    run, cuda = wrapped(lambda x, w: (x @ w,))
    x, w = torch.randn(3, 3), torch.randn(3, 3)
    for _ in range(4):
        run([x, w])
    replays, other = cuda.replays, torch.randn(3, 3)
    torch.testing.assert_close(run([x, other])[0], x @ other)
    assert cuda.replays == replays


def test_a_written_input_must_stay_where_it_is():
    def step(cache, x):
        cache.add_(x)
        return (cache * 2,)

    run, cuda = wrapped(step, written=[0])
    caches = [torch.zeros(3) for _ in range(6)]
    for cache in caches:
        run([cache, torch.ones(3)])
        assert cache.tolist() == [1.0] * 3
    assert cuda.captures == 0


def test_other_streams_devices_and_too_many_shapes():
    run, cuda = wrapped(lambda x: (x + 1,))
    x = torch.zeros(2)
    for _ in range(4):
        run([x])
    replays = cuda.replays
    cuda.stream = 2
    assert run([x])[0].tolist() == [1.0, 1.0] and cuda.replays == replays
    for n in range(MOST + 3):
        run([torch.zeros(n + 3)])
    assert len(run._entries) == MOST
    other = CudaGraphs(lambda a: (a[0] + 1,), cuda=cuda, device="cuda")
    assert other([x])[0].tolist() == [1.0, 1.0] and not other._entries


def test_a_call_within_a_call_runs_as_it_is():
    calls = []

    def outer(x):
        calls.append(1)
        if len(calls) < 8:
            run([x])
        return (x + 1,)

    run, _ = wrapped(outer)
    assert run([torch.zeros(2)])[0].tolist() == [1.0, 1.0]
    done = []
    thread = threading.Thread(target=lambda: done.append(run([torch.zeros(2)])))
    thread.start(), thread.join()
    assert done


def test_what_cannot_be_captured_goes_on_without():
    run, cuda = wrapped(lambda x: (x + 1,))
    capturing = []

    @contextlib.contextmanager
    def failing(graph):
        capturing.append(1)
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    cuda.graph = failing
    for _ in range(5):
        assert run([torch.zeros(2)])[0].tolist() == [1.0, 1.0]
    assert len(capturing) == 1 and cuda.replays == 0
