"""What the C library keeps of freed memory, given back to the system."""
from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Have the C library return whole free pages, also those between blocks in use; nothing where it has no such call.

    glibc serves blocks of up to 32 MiB from its heap once one of that size was freed, and keeps what is freed there but at the top: an int8 model of 105 MB would stay 305 MB
    resident behind `quantize_`, and 140 MB once compiled, since Dynamo empties the caches with a block of 32 MiB before it times its guards. 11 ms for those, nothing where nothing is free.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
