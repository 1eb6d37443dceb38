"""The noun between codegen and runtime: a kernel as source text, with what is needed to build, launch and print it."""
from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One generated kernel.

    language "cpp": ``source`` is a translation unit with

        extern "C" void <entry>(void* const* data, const int64_t* ints, const double* floats);

      ``data`` holds the data pointers of the tensors in call order, ``ints`` for each tensor in that order its sizes and then
      its strides (in elements), and after them the scalar integers; ``floats`` the scalar floats. Shapes and strides are
      run-time values, ranks and dtypes are part of the kernel.

    language "triton": ``source`` is a Python module with @triton.jit kernels and a host function
      ``<entry>(tensors, ints, floats)`` that picks the grid and launches; tensors, ints, floats as above but as Python lists.

    The output tensors come first; the caller allocates them.
    """

    name: str
    language: str
    source: str
    entry: str
    link_torch: bool = False
    parts: tuple[str, ...] = ()  # "cpp": translation units that the source is linked with, and shares with other kernels
    rewrite: str = ""  # the pass it came from
    detail: str = ""  # what a person recognises it by: score, mask, dtypes

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts))  # a list, read from JSON
        if self.language not in ("cpp", "triton") or not self.entry.isidentifier():
            raise ValueError(f"kernel {self.name!r}: language {self.language!r}, entry {self.entry!r}")
