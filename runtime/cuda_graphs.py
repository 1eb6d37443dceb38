"""CUDA graphs: an executable with the same shapes as before is replayed as one launch, instead of a launch a kernel.

The first calls run as they are (tuning and libraries set themselves up), then one is captured. Inputs whose address never changed
(weights, a KV cache) are read where they are; the others are copied into the graph's own. Results are copied out: a later
replay must not change what a caller holds. Anything that does not fit runs without a graph: tensors on other devices, another
stream than the captured one, a call within a call, a written input at another address, an op that cannot be captured.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import torch

WARM_UPS = 2
MOST = 16  # shapes with a graph of their own; a graph holds the memory of its results


class _Entry:
    """One set of shapes: how often it ran, the addresses that it saw, and the graph once there is one."""

    def __init__(self, addresses: list[int]):
        self.kept = ()
        self.runs, self.addresses, self.fixed = 0, addresses, [True] * len(addresses)
        self.graph = self.inputs = self.results = None
        self.refused = False

    def see(self, addresses: list[int]) -> None:
        self.fixed = [f and a == b for f, a, b in zip(self.fixed, self.addresses, addresses)]
        self.addresses = addresses


class CudaGraphs:
    """Wraps a boxed function; called like it. ``written``: positions of the arguments that it writes to; ``kept``: what it holds between calls (a function, and the
    positions of its arguments), which a graph reads where it was when it was captured."""

    _boxed_call = True

    def __init__(self, function: Callable, written: Collection[int] = (), kept: Sequence[tuple[Callable, Sequence[int]]] = (), *, cuda=torch.cuda, device: str = "cuda"):
        self._function, self._written, self._cuda, self._device = function, frozenset(written), cuda, device
        self._kept = [*kept]
        self._fixed = self._written.union(*(places for _, places in self._kept))  # no graph is made while one of these moves
        self._entries: dict[tuple, _Entry] = {}
        self._lock = threading.Lock()
        self._stream = None

    def __call__(self, arguments: list):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if not tensors or any(x.device.type != self._device for x in tensors) or not self._lock.acquire(blocking=False):
            return self._function(arguments)
        try:
            return self._run(arguments)
        finally:
            self._lock.release()

    def _run(self, arguments: list):
        stream = self._cuda.current_stream()
        key = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments)
        addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else 0 for x in arguments]
        kept = tuple(value(*(arguments[k] for k in places)) for value, places in self._kept)  # a weight has changed: computed now, outside of a graph
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) == MOST:
                return self._function(arguments)
            entry = self._entries[key] = _Entry(addresses)
            self._stream = self._stream or stream
        if entry.graph is not None and any(a is not b for a, b in zip(kept, entry.kept)):
            entry.graph = entry.inputs = entry.results = None  # it reads the values that were kept before
            entry.runs = 0
        if entry.graph is None:
            entry.kept = kept
            entry.see(addresses)
            entry.runs += 1
            if entry.refused or entry.runs <= WARM_UPS or stream != self._stream or not all(entry.fixed[k] for k in self._fixed):
                return self._function(arguments)
            if not self._capture(entry, arguments):
                return self._function(arguments)
        elif stream != self._stream or any(fixed and a != b for fixed, a, b in zip(entry.fixed, entry.addresses, addresses)):
            return self._function(arguments)
        for own, given, fixed in zip(entry.inputs, arguments, entry.fixed):
            if isinstance(given, torch.Tensor) and not fixed:
                own.copy_(given)
        arguments.clear()
        entry.graph.replay()
        return tuple(_copied(x) if isinstance(x, torch.Tensor) else x for x in entry.results)

    def _capture(self, entry: _Entry, arguments: list) -> bool:
        """Record the function over inputs of its own; recording runs nothing. False if an op of it waits for the device."""
        entry.inputs = [x if fixed or not isinstance(x, torch.Tensor) else _copied(x) for x, fixed in zip(arguments, entry.fixed)]
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph):
                entry.results = self._function([*entry.inputs])
        except RuntimeError:
            entry.refused, entry.inputs, entry.results = True, None, None
            return False
        entry.graph = graph
        return True


def _copied(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
