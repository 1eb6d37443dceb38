"""What `tileweld kernels` measures: C++ kernels built here, Triton kernels compiled ahead of time for GPUs that need not be here."""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from ..runtime.build import CppUnit, build
from .errors import BuildError, TileweldError
from .ir.kernel import Kernel


@dataclasses.dataclass(frozen=True)
class Rows:
    """records: JSON-ready dicts, one a row; table: the same for rich; failed: did anything not compile?"""

    records: list[dict]
    table: object
    failed: bool = False


def on_this_machine(kernels: Sequence[Kernel]) -> Rows:
    """Build every C++ kernel, one after the other so that the times are its own; Triton kernels are listed with their sources alone."""
    from rich import box
    from rich.table import Table

    table = Table("kernel", "language", "from", "what", box=box.SIMPLE_HEAD, title="generated kernels", title_justify="left")
    for name in ("lines", "built in", "library"):
        table.add_column(name, justify="right")
    records = []
    for kernel in kernels:
        record = {"kernel": kernel.name, "language": kernel.language, "rewrite": kernel.rewrite, "detail": kernel.detail, "lines": len(kernel.source.splitlines()), "seconds": None, "bytes": None, "error": None}
        if kernel.language == "cpp":
            started = time.perf_counter()
            try:
                (path,) = build([CppUnit.of(kernel)])
                record |= {"seconds": round(time.perf_counter() - started, 3), "bytes": path.stat().st_size}
            except BuildError as error:
                record["error"] = str(error).splitlines()[0]
        records.append(record)
        took = record["error"] or ("-" if record["seconds"] is None else "in cache" if record["seconds"] < 0.05 else f"{record['seconds']:.1f} s")
        table.add_row(kernel.name, kernel.language, kernel.rewrite or "-", kernel.detail, str(record["lines"]), took, "-" if record["bytes"] is None else f"{record['bytes'] / 1024:.0f} KiB")
    if not records:
        table.caption = "no kernel was generated: everything runs on library calls"
    return Rows(records, table, any(r["error"] for r in records))


def check_architectures(archs: Sequence[str]) -> None:
    """Raise OptionError for an unknown architecture, TileweldError where triton is not installed, before anything is traced."""
    from ..runtime import aot

    for arch in archs:
        aot.backend_of(arch)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TileweldError("--arch needs triton", cure="pip install 'tileweld[gpu]'") from error


def ahead_of_time(kernels: Sequence[Kernel], archs: Sequence[str], every_config: bool) -> Rows:
    """Compile the Triton kernels for the architectures, see kernels_table.py."""
    from .kernels_table import render, table

    rows = table(kernels, archs, every_config=every_config)
    records = []
    for row in rows:
        record = {"arch": row.arch, "kernel": row.kernel, "detail": row.detail, "config": row.config, "default": row.default, "error": row.error or None}
        if row.result is not None:
            fields = {f.name: getattr(row.result, f.name) for f in dataclasses.fields(row.result) if f.name not in ("arch", "assembly")}
            record |= fields | {"fits": row.result.fits}
        records.append(record)
    return Rows(records, render(rows), any(row.result is None for row in rows))
