"""What every benchmark shares: contenders interleaved in one process, medians and their spread, the machine's description, a table and JSON."""
from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, dict]:
    """Time every contender once a round, so that a slow minute of the machine hits all; milliseconds: median, lowest, highest."""
    for call in contenders.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "rounds": rounds} for name, t in times.items()}


def peak_extra(call) -> int:
    """Bytes by which the resident set rises at its peak during a call (Linux: VmHWM, reset through clear_refs)."""
    def status(key):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def machine() -> dict:
    """Date, processor, cores used, versions: what a figure means nothing without."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    simd = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f" {f}" in flags]
    return {"date": datetime.date.today().isoformat(), "cpu": model, "simd": simd, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "load_before": os.getloadavg()[0]}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def show(title: str, rows: list[dict], columns: list[str]) -> None:
    """A table on the terminal."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "contender", "what") else "right")
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
    Console(width=140).print(table)


def store(name: str, result: dict) -> Path:
    """Write a result beside the others; cases measured earlier and not this time are kept."""
    path = RESULTS / name
    RESULTS.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known.update(result)
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path


def run_cases(cases: dict[str, Callable[[], dict]], names: list[str] | None, file: str, keep: bool) -> None:
    """Run cases by name (none: all), each of which prints its table, and store their figures in `file` if wanted."""
    for name in names or cases:
        if name not in cases:
            raise typer.BadParameter(f"unknown case {name!r}; there are {', '.join(cases)}")
        result = {"machine": machine(), "what": cases[name].__doc__, **cases[name]()}
        if keep:
            store(file, {name: result})
