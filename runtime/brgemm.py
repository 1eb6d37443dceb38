"""Is brgemm of libtorch_cpu wanted for int8 products of many rows? oneDNN's micro-kernel runs on the tiles of processors with AMX; elsewhere ours is as fast or faster (docs/int8.md).

TILEWELD_BRGEMM=1 uses it wherever it runs (AVX512-VNNI), untimed; TILEWELD_BRGEMM=0 nowhere.
"""
from __future__ import annotations

import ctypes
import functools
import os
import sys

import torch

from . import openmp

#: at::native::cpublas::brgemm(long, long, long, long, long, long, bool, unsigned char const*, signed char const*, int*, bool). No header that is installed declares it, so it is looked for
_SYMBOL = "_ZN2at6native7cpublas6brgemmEllllllbPKhPKaPib"


def is_wanted() -> bool:
    """Shall kernels be able to? Whether they do is the clock's to say (compiler/int8_brgemm.py)."""
    return setting() != "0" and (is_forced() or has_tiles()) and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and has_brgemm()


def is_forced() -> bool:
    """Is it used without being timed?"""
    return setting() == "1"


def setting() -> str:
    return os.environ.get("TILEWELD_BRGEMM", "")


def has_tiles() -> bool:
    """Does this processor multiply tiles of bytes?"""
    return bool(torch.cpu.get_capabilities().get("amx_int8", False))


@functools.cache
def has_brgemm() -> bool:
    """Has this torch the function?"""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return hasattr(ctypes.CDLL(str(openmp.TORCH_LIB / "libtorch_cpu.so")), _SYMBOL)
    except OSError:
        return False
