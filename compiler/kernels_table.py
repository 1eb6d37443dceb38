"""The table of `tileweld kernels`: every Triton kernel, compiled ahead of time for every architecture asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from ..runtime import aot
from ..runtime.source_module import load_python_source
from .errors import BuildError
from .ir.kernel import Kernel

ARCHITECTURES = tuple(aot.ARCHITECTURES)


@dataclasses.dataclass(frozen=True)
class Row:
    """One jit function of one kernel, in one configuration, for one architecture."""

    arch: str
    kernel: str
    detail: str
    config: str
    default: bool  # the configuration used where nothing was timed
    result: aot.AotResult | None  # None where it does not compile
    error: str = ""


def table(kernels: Iterable[Kernel], archs: Sequence[str] = ARCHITECTURES, *, every_config: bool = False) -> list[Row]:
    """Compile the Triton kernels for the architectures; default configurations alone unless `every_config`.

    A generated module lists its jit functions in `AOT` (see codegen/triton/attention.py). Kernels in C++ are left out. Takes
    about two seconds a row, nothing from Triton's cache. Raises OptionError for an unknown architecture.
    """
    rows = []
    backends = {arch: aot.family_of(arch) for arch in archs}
    for kernel in kernels:
        if kernel.language != "triton":
            continue
        module = load_python_source(kernel.name, kernel.source)
        for arch, backend in backends.items():
            seen = set()
            for entry in module.AOT:
                if entry["backend"] != backend:
                    continue
                default = entry["kernel"] not in seen
                seen.add(entry["kernel"])
                if default or every_config:
                    rows.append(_row(module, kernel, arch, entry, default))
    return rows


def _row(module, kernel, arch, entry, default) -> Row:
    *blocks, num_warps, num_stages = entry["config"]
    result, error = None, ""
    try:
        result = aot.compile_ahead(module, entry["kernel"], entry["signature"], entry["constants"], arch, divisible_by_16=entry["divisible_by_16"],
                                   num_warps=num_warps, num_stages=num_stages)
    except BuildError as failure:
        error = str(failure)
    return Row(arch, entry["kernel"], kernel.detail, f"{'x'.join(map(str, blocks))} w{num_warps} s{num_stages}", default, result, error)


def render(rows: Sequence[Row]):
    """The rows as a rich table; print it with rich's Console."""
    from rich.table import Table

    made = Table(title="Triton kernels, compiled ahead of time", caption="* default configuration; registers per thread, spills in bytes (gfx942: in registers), sizes in KiB")
    for name in ("arch", "kernel", "variant"):
        made.add_column(name, overflow="fold")
    made.add_column("config")
    for name in ("registers", "spills", "shared", "matmul", "size"):
        made.add_column(name, justify="right")
    for row in rows:
        head = (row.arch, row.kernel, row.detail, row.config + (" *" if row.default else ""))
        if row.result is None:
            made.add_row(*head, row.error.splitlines()[0], *[""] * 4, style="red")
            continue
        r = row.result
        shared = f"{r.shared_bytes / 1024:.0f}" + ("" if r.fits else " too much")
        made.add_row(*head, str(r.registers), str(r.spills), shared, r.matmul or "-", f"{r.binary_bytes / 1024:.0f}", style="yellow" if r.spills or not r.fits else None)
    return made
