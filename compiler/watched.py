"""Tensors as they were when something was computed from them; are they still?

Asked at every call of a graph that keeps weights, behind kernels that have emptied the caches: what counts is how much memory is looked at, and how often Python starts over. All tensors of a graph are
looked at together: each property of all of them in one `map` over a C function, and all sampled elements in one gather. 43 weights: 31 us, and 48 one by one (150 and 215 us behind a kernel that read 100 MB).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import numpy
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SAMPLES = 8  # each is a line of memory that is not in the cache, and a page that is not in the TLB: 32 took as long as all the rest

_version, _shape, _dtype, _identity = attrgetter("_version"), attrgetter("shape"), attrgetter("dtype"), attrgetter("_cdata")


class Seen:
    """Tensors as they are now: `is_same` says whether the same objects, in the same order, still have the same storage, address, shape, strides, dtype and version, and on a CPU
    the same SAMPLES elements, spread over each. Raises RuntimeError for tensors without a version (made under inference_mode).

    The storages are held by weak references: their memory is free to go, but no other storage is made in their place, so that the address of a StorageImpl says which it is.
    """

    __slots__ = ("_addresses", "_versions", "_storages", "_shapes", "_strides", "_dtypes", "_held", "_samples")

    def __init__(self, tensors: Sequence[Tensor]):
        storages = [w.untyped_storage() for w in tensors]
        self._held = list(map(StorageWeakRef, storages))
        self._addresses, self._versions, self._storages = list(map(Tensor.data_ptr, tensors)), list(map(_version, tensors)), list(map(_identity, storages))
        self._shapes, self._strides, self._dtypes = list(map(_shape, tensors)), list(map(Tensor.stride, tensors)), list(map(_dtype, tensors))
        gathers: dict[int, list] = {}
        for w in tensors:
            size, places = _places(w)
            gathers.setdefault(size, []).append(places)
        self._samples = []
        for size, places in gathers.items():
            memory, where = _memory(size), numpy.concatenate(places)
            self._samples.append((memory.take, where, memory.take(where).tobytes()))

    def is_same(self, tensors: Sequence[Tensor]) -> bool:
        """Are these tensors, which must be the same objects, as they were?"""
        if (list(map(Tensor.data_ptr, tensors)) != self._addresses or list(map(_version, tensors)) != self._versions or list(map(_identity, map(Tensor.untyped_storage, tensors))) != self._storages
                or list(map(_shape, tensors)) != self._shapes or list(map(Tensor.stride, tensors)) != self._strides or list(map(_dtype, tensors)) != self._dtypes):
            return False
        for take, where, content in self._samples:  # last: the memory is there, since the storages are
            if take(where).tobytes() != content:
                return False
        return True


class _All:
    """The memory of this process as numpy is told of it, from `size` on, in words of so many bytes; it owns nothing, and is read where tensors are known to be."""

    def __init__(self, size: int):
        self.__array_interface__ = {"data": (size, True), "shape": (2**62 // size,), "typestr": f"|V{size}" if size not in (1, 2, 4, 8) else f"<u{size}", "version": 3}


_memories: dict[int, numpy.ndarray] = {}


def _memory(size: int) -> numpy.ndarray:
    if size not in _memories:
        _memories[size] = numpy.asarray(_All(size))
    return _memories[size]


def _places(w: Tensor) -> tuple[int, numpy.ndarray]:
    """(bytes of a word, positions in `_memory` of such words) of SAMPLES elements of a tensor in a CPU's memory, evenly spread over rows and columns; of all of it if it is small, of none elsewhere."""
    n, size, address = w.numel(), w.element_size(), w.data_ptr()
    if w.device.type != "cpu" or n == 0 or 1 + sum((s - 1) * abs(t) for s, t in zip(w.shape, w.stride())) != n:
        return 1, numpy.empty(0, numpy.int64)
    step = max(1, n // SAMPLES)
    while step > 1 and any(math.gcd(step, t) > 1 for t in w.stride() if t > 1):  # else all of them were of a few columns
        step -= 1
    elements = step * numpy.arange(1 + (n - 1) // step)
    if address % size:  # made by frombuffer, say: byte by byte
        return 1, (address - 1 + size * elements[:, None] + numpy.arange(size)).ravel()
    return size, address // size - 1 + elements
