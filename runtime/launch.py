"""Call a built C++ kernel with tensors, by the ABI of compiler/ir/kernel.py."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


@functools.cache
def load_library(path: Path) -> ctypes.CDLL:
    """A built library, loaded once a process. Raises OSError."""
    return ctypes.CDLL(str(path))


class CppLauncher:
    """``launcher(tensors, ints, floats)`` runs ``entry(void* const* data, const int64_t* ints, const double* floats)``.

    tensors: the outputs first; CPU tensors of the ranks and dtypes the kernel was generated for (they are not checked).
    ints, floats: the scalars that follow the sizes and strides. ``entry(pointers, integers, floats)`` is the kernel itself: it takes what
    the functions of these names below have packed, ahead of the call where they are known.
    """

    def __init__(self, library: ctypes.CDLL, entry: str):
        self.entry = getattr(library, entry)
        self.entry.argtypes = (ctypes.c_char_p,) * 3  # bytes are passed as they lie, without a copy or an array object
        self.entry.restype = None

    def __call__(self, tensors: Sequence[Tensor], ints: Sequence[int] = (), floats: Sequence[float] = ()) -> None:
        numbers = []
        for x in tensors:
            numbers += x.shape
            numbers += x.stride()
        numbers += ints
        self.entry(_packer("P", len(tensors))(*[x.data_ptr() for x in tensors]), _packer("q", len(numbers))(*numbers), _packer("d", len(floats))(*floats))


_packers: dict[tuple[str, int], object] = {}


def _packer(code: str, count: int):
    """struct.Struct(...).pack of `count` items: one C call turns a list into the array."""
    pack = _packers.get((code, count))
    if pack is None:
        pack = _packers[code, count] = struct.Struct(f"{count}{code}").pack
    return pack


def pointers(*items: int) -> bytes:
    """Data pointers as a kernel takes them."""
    return _packer("P", len(items))(*items)


def integers(*items: int) -> bytes:
    """Sizes, strides and scalar integers as a kernel takes them."""
    return _packer("q", len(items))(*items)


def floats(*items: float) -> bytes:
    """Scalar floats as a kernel takes them."""
    return _packer("d", len(items))(*items)
