"""Kernels that are launched one after another by one call from C.

    run = launches(driver, ("x", "weight", "cache", "position"),                    # once a workspace: p_normed lies in its arena
                   (rms_norm, (p_normed, "x", "weight"), integers_1, floats_1),
                   ("index_copy", ("cache + 64", "position", p_k), integers_2, floats_2),
                   (embedding, (p_embedding, p_status, "tokens", "weight"), integers_4, floats_4, 1),
                   (attention, (p_attention, p_q, "cache", "kept[3]"), integers_3, floats_3))
    run(kept.addresses, pointers_4(x.data_ptr(), weight.data_ptr(), ...))

A launch from Python costs 3 to 5 us behind a kernel that has emptied the caches, most of it for packing what is the same at every call; a step in this table costs what its cache lines do.
"""
from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

from ..compiler.ir.kernel import Kernel

#: What walks the table. A plan is eight words: how many steps, steps, how many given pointers to set, where and from which, the same for kept ones, and which step failed.
SOURCE = """\
#include <cstdint>
#include <cstring>

typedef void (*Entry)(void* const*, const int64_t*, const double*);
struct Step { Entry entry; void** data; const int64_t* ints; const double* floats; int64_t status; };  // entry null: index_copy; status: which pointer is an int32 that the kernel sets where an index is out of range, -1: none
struct Patch { int64_t place, source, offset; };
struct Plan { int64_t steps; const Step* step; void** data; int64_t patches; const Patch* patch; int64_t kept; const Patch* kept_patch; int64_t failed; };

// self.index_copy_(dim, index, source), self.copy_(source) with dim -1. data: self, index, source; ints: dims, the one that is indexed, bytes of an element, its size in self, the index' stride, then sizes of the source, strides of self, of the source
static bool index_copy(void* const* data, const int64_t* ints) {
  const int64_t dims = ints[0], dim = ints[1], item = ints[2], limit = ints[3], index_stride = ints[4];
  const int64_t *sizes = ints + 5, *to = sizes + dims, *from = to + dims;
  const int64_t* index = static_cast<const int64_t*>(data[1]);
  int64_t total = 1, at[16] = {};
  for (int64_t d = 0; d < dims; ++d) total *= sizes[d];
  for (int64_t k = 0; total && dim >= 0 && k < sizes[dim]; ++k)
    if (index[k * index_stride] < 0 || index[k * index_stride] >= limit) return false;
  const bool rows = dims && dim != dims - 1 && to[dims - 1] == 1 && from[dims - 1] == 1;  // whole rows of the last dim
  const int64_t run = rows ? sizes[dims - 1] : 1, outer = rows ? dims - 1 : dims;
  for (int64_t left = total / (run ? run : 1); left > 0; --left) {
    int64_t t = 0, f = 0;
    for (int64_t d = 0; d < outer; ++d) {
      t += (d == dim ? index[at[d] * index_stride] : at[d]) * to[d];
      f += at[d] * from[d];
    }
    memcpy(static_cast<char*>(data[0]) + t * item, static_cast<const char*>(data[2]) + f * item, run * item);
    for (int64_t d = outer - 1; d >= 0 && ++at[d] == sizes[d]; --d) at[d] = 0;
  }
  return true;
}

extern "C" void launches(void* data, const void* kept, const void* given) {
  Plan& plan = *static_cast<Plan*>(data);
  for (int64_t k = 0; k < plan.patches; ++k) plan.data[plan.patch[k].place] = static_cast<char* const*>(given)[plan.patch[k].source] + plan.patch[k].offset;
  for (int64_t k = 0; k < plan.kept; ++k) plan.data[plan.kept_patch[k].place] = static_cast<char* const*>(kept)[plan.kept_patch[k].source] + plan.kept_patch[k].offset;
  plan.failed = 0;
  for (int64_t k = 0; k < plan.steps; ++k) {
    const Step& step = plan.step[k];
    int32_t* const status = step.status < 0 ? nullptr : static_cast<int32_t*>(step.data[step.status]);
    if (status) *status = 0;
    bool done = true;
    if (step.entry) step.entry(step.data, step.ints, step.floats);
    else done = index_copy(step.data, step.ints);
    if (!done || (status && *status)) { plan.failed = k + 1; return; }
  }
}
"""
KERNEL = Kernel("launches", "cpp", SOURCE, "launches", detail="launches kernels in order")
INDEX_COPY = "index_copy"  # a step that the driver does itself
OUT_OF_RANGE = "index out of range in self: an embedding or an index op reads beyond its table"
DIMS = 16  # of what it copies

_TEXT = re.compile(r"(\w+)(?:\[(\d+)\])?(?: \+ (\d+))?")


def _parsed(text: str) -> re.Match:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no place in memory: name, name[3], name + 64")
    return found


class Run:
    """``run(kept, given)``: the launches of a table, in order. kept, given: addresses, packed; those of ``names`` in that order.

    A step is (entry, pointers, integers, floats) or (..., status), status: which of the pointers is that of an int32 which the kernel sets if an index is out of range. entry: a ctypes function, or "index_copy"; pointers: addresses, or texts: "name" is a tensor given at the call, "kept[3]" one of those that the graph keeps, both
    with " + 64" that many bytes behind its start; integers and floats packed. Belongs to one call at a time. Raises IndexError where an index is out of range; the steps behind it are not run.
    """

    def __init__(self, driver, names: Sequence[str], *steps: tuple):
        names = {name: k for k, name in enumerate(names)}
        data, patches, table, self._held = [], ([], []), [], steps  # the packed numbers live as long as their addresses are used
        for entry, where, integers, floats, *status in steps:
            first = len(data)
            for place, x in enumerate(where, first):
                if isinstance(x, str):
                    name, number, offset = _parsed(x).groups()
                    patches[number is not None].append((place, names[name] if number is None else int(number), int(offset or 0)))
                data.append(0 if isinstance(x, str) else x)
            table.append((0 if entry == INDEX_COPY else ctypes.cast(entry, ctypes.c_void_p).value, first, _address(integers), _address(floats), *(status or [-1])))
        self._data = (ctypes.c_void_p * max(1, len(data)))(*data)
        start = ctypes.addressof(self._data)
        self._table = _words(x for entry, first, ints, floats, status in table for x in (entry, start + 8 * first, ints, floats, status))
        self._patches = [_words(x for row in rows for x in row) for rows in patches]
        self._plan = _words((len(table), ctypes.addressof(self._table), start, *(x for rows, words in zip(patches, self._patches) for x in (len(rows), ctypes.addressof(words))), 0))
        self._driver, self._may_fail = driver, any(entry == INDEX_COPY or len(step) == 5 for step in steps for entry in step[:1])
        self._where = ctypes.cast(self._plan, ctypes.c_char_p)

    def __call__(self, kept: bytes, given: bytes) -> None:
        self._driver(self._where, kept, given)
        if self._may_fail and self._plan[7]:
            raise IndexError(OUT_OF_RANGE if self._held[self._plan[7] - 1][0] != INDEX_COPY else f"index_copy_(): index out of bounds (launch {self._plan[7] - 1} of a run): a cache is written behind its end")


def _words(items) -> ctypes.Array:
    items = list(items)
    return (ctypes.c_int64 * max(1, len(items)))(*items)


def _address(packed: bytes) -> int:
    """Of the bytes themselves, which whoever uses it holds."""
    return ctypes.cast(packed, ctypes.c_void_p).value or 0


launches = Run  # what an executable calls it
