"""The roofline of a report as a picture: FLOPs a byte against FLOP/s, both logarithmic, every rewrite before and after.

The roof is what the device allows (Williams, Waterman, Patterson, CACM 2009): min(peak, intensity x bandwidth). A rewrite's point is its
FLOPs over its roofline time, so it lies on the roof if its kernels are alike, and below it where some wait for memory and others compute.
"""
from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from .cost_report import Costs, Line
from .devices import Device
from .errors import OptionError, TileweldError

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
FORMATS = (".png", ".svg", ".pdf")


def check(path: Path, device: str | None, guessed: bool = False) -> None:
    """Raise, before anything is traced, what would keep a picture from being drawn. guessed: no device need be named, it is the one that runs."""
    if device is None and not guessed:
        raise OptionError("a roofline is that of a device", where="--plot", cure="add --device h200, a100, 4090 or cpu")
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"cannot draw {path.suffix or 'a file without an ending'}", where=f"--plot {path}", cure=f"end it with {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise TileweldError("a picture needs matplotlib", where="--plot", cure="pip install 'tileweld[plot]'")
    if not path.resolve().parent.is_dir():
        raise TileweldError(f"there is no folder {path.resolve().parent}", where="--plot", cure="give another file")


def points(costs: Costs, device: Device) -> list[tuple[Line, tuple[float, float] | None, tuple[float, float] | None]]:
    """(rewrite or total, (FLOPs a byte, FLOP/s) before, the same after) at the traced sizes; None for what has no FLOPs or unknown sizes."""
    lines, total = costs.evaluated()
    return [(line, _point(line.before, device), _point(line.after, device)) for line in (*lines, total)]


def _point(work, device):
    seconds, intensity = work.seconds(device), work.intensity
    return (intensity, float(work.flops) / seconds) if seconds and intensity else None


def draw(costs: Costs, device: Device, path: Path, *, title: str = "", measured: Sequence[tuple[str, float, float]] = ()) -> None:
    """Write the picture. measured: (contender, FLOPs a byte, FLOP/s) of real runs, drawn as crosses."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    shown = [entry for entry in points(costs, device) if entry[1] or entry[2]]
    dtypes = sorted({k.dtype for line, *_ in shown for work in (line.before, line.after) for k in work.kernels if k.matmul != 0}, key=device.peak)
    peaks = {str(d).removeprefix("torch."): device.peak(d) for d in dtypes} or {"vector": device.vector}
    xs = [p[0] for _, *pair in shown for p in pair if p] + [x for _, x, _ in measured] + [max(peaks.values()) / device.bandwidth]
    ys = [p[1] for _, *pair in shown for p in pair if p] + [y for *_, y in measured]
    left, right = 10 ** math.floor(math.log10(min(xs) / 1.5)), 10 ** math.ceil(math.log10(max(xs) * 1.5))
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.add_subplot()
    for name, peak in peaks.items():
        ridge = peak / device.bandwidth
        axes.plot([left, ridge, right], [left * device.bandwidth, peak, peak], color="#444", linewidth=1.4, zorder=1)
        axes.annotate(f"{name}: {_si(peak)}FLOP/s", (right, peak), xytext=(-4, 10), textcoords="offset points", ha="right", fontsize=9, color="#444")
    axes.annotate(f"{_si(device.bandwidth)}B/s", (left * 1.1, left * 3 * device.bandwidth), fontsize=9, color="#444")
    for number, (line, before, after) in enumerate(shown):
        colour = "black" if line.name == "total" else COLOURS[number % len(COLOURS)]
        times = "" if line.name == "total" else f" x{line.times}"
        seconds = [work.seconds(device) for work in (line.before, line.after)]
        label = f"{line.name}{times}: {len(line.before.kernels)} kernels -> {len(line.after.kernels)}" + (", {}s -> {}s".format(*map(_si, seconds)) if all(seconds) else "")
        if before and after:
            axes.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.6, "shrinkA": 5, "shrinkB": 5}, zorder=2)
        if before:
            axes.scatter(*before, s=60, facecolors="white", edgecolors=colour, linewidths=1.6, zorder=3)
        axes.scatter(*(after or before), s=60, color=colour, label=label, zorder=3, **({"marker": "x"} if not after else {}))
    work = costs.evaluated()[1].after.flops  # what the measured rates are rates of
    for number, (name, x, y) in enumerate(measured):
        axes.scatter(x, y, s=70, marker="+x1234"[number % 6], color="#555", label=f"measured: {name}, {_si(float(work) / y)}s", zorder=4)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs a byte moved", ylabel="FLOP/s", title=f"{title} on {device.name}: before (hollow) and after (filled)".strip())
    low = min([*ys, left * device.bandwidth * 4])
    axes.set_ylim(10 ** math.floor(math.log10(low / 1.5)), max(peaks.values()) * 3)
    axes.grid(True, which="major", color="#ddd", linewidth=0.6, zorder=0)
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2, frameon=False)  # within the axes it would hide points
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=130)


def _si(x: float) -> str:
    from .cost_report import si

    return si(x)
