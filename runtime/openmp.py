"""Which OpenMP library torch runs on, so that kernels join its thread pool.

A wheel of torch brings its own libgomp, sometimes under another name (`libgomp-98b21ff3.so.1`). A kernel linked with plain -fopenmp
would then load the system's libgomp next to it: a second pool, whose threads and torch's spin against each other, and
torch.set_num_threads would not reach it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

TORCH_LIB = Path(torch.__file__).parent / "lib"


class _DlInfo(ctypes.Structure):
    _fields_ = [("dli_fname", ctypes.c_char_p), ("dli_fbase", ctypes.c_void_p), ("dli_sname", ctypes.c_char_p),
                ("dli_saddr", ctypes.c_void_p)]


@functools.cache
def library() -> Path | None:
    """The file of the OpenMP library that libtorch_cpu calls; None if torch was built without OpenMP.

    Asks the dynamic linker where libtorch_cpu's own `omp_get_max_threads` lives (dlsym on its handle, then dladdr): exact where
    several are loaded, because scikit-learn or MKL brought theirs along.
    """
    try:
        function = ctypes.CDLL(str(TORCH_LIB / "libtorch_cpu.so")).omp_get_max_threads
        dladdr = ctypes.CDLL(None).dladdr
    except (OSError, AttributeError):
        return None
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    info = _DlInfo()
    if not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)) or not info.dli_fname:
        return None
    return Path(info.dli_fname.decode()).resolve()
