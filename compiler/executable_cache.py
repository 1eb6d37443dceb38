"""Executables on disk: a process that compiles a graph which an earlier one compiled starts from its text and its built kernels.

Nothing of capture, passes, AOT, lowering runs then, and none of it is imported. An entry is JSON in the kernel cache (runtime/cache.py: a private folder, atomic writes, every read
verified by sha256): the executable's text, and for each object that the text names a *recipe*, how to make it again; kernels are named by their library and its hash. Nothing is pickled,
and an object without a recipe keeps the whole executable from being kept. Folded weights are computed anew, and watched, by each process.

An entry is found by the graph's key (graph_key.py), and written only where AOT's wrapper does no more than pass arguments and results on (aot.wrapper_does), no shape symbol or guard came up, nothing was
degraded. If the machine was too busy for the timings that lowering decides by (pays.py), the entry is used for an hour, and then the graph is compiled again. `tileweld.explain` and whoever asks for a detailed report want the graphs: they always compile.

TILEWELD_EXECUTABLES=0 turns all of it off, in both directions.
"""
from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..runtime import cache
from ..runtime.launch import CppLauncher, load_library
from ..runtime.launches import KERNEL as DRIVER
from . import log
from .errors import CacheError
from .graph_key import NotKept, is_lasting, key_of, resolve
from .int8_use import Int8Use
from .ir.kernel import Kernel
from .ir.text import Text
from .report import FoldedWeight, Fusion, KernelUse, Refused, Report
from .runs import RUNS
from .load import load

SUFFIX = ".executable"
UNSETTLED_SECONDS = 3600
_LIBRARY = re.compile(r"[0-9a-f]{64}\.so")
_ROWS = {"fusions": Fusion, "kept": Fusion, "refusals": Refused, "kernels": KernelUse, "folded": FoldedWeight, "int8": Int8Use}


def key(gm, example_inputs, options, mode, report: Report) -> str | None:
    """The key of a graph whose executable may be kept or found; None, with the reason in the log, where it may not."""
    if report.detailed or os.environ.get("TILEWELD_EXECUTABLES", "1") == "0" or (options or {}).get("verify"):
        return None
    try:
        return key_of(gm, example_inputs, options, mode)
    except NotKept as reason:
        log.get("runtime").debug("the executable is not kept: %s", reason)
        return None


# ---------------------------------------------------------------- reading


def find(key: str, report: Report) -> Callable | None:
    """The compiled graph of an earlier process, and its rows in the report; None if there is none, or a kernel of its is gone."""
    content = cache.read(key, SUFFIX)
    if content is None:
        return None
    entry = json.loads(content)
    if not entry["settled"] and time.time() - entry["made"] > UNSETTLED_SECONDS:
        cache.forget(key, SUFFIX)
        return None
    kernels = [Kernel(**fields) for fields in entry["built"]]
    launchers = [_launcher(kernel, *library) for kernel, library in zip(kernels, entry["libraries"])]
    if None in launchers:
        cache.forget(key, SUFFIX)  # built again, a library may have other bytes: gold links differently each time
        return None
    objects = {name: _made(recipe, launchers) for name, recipe in entry["objects"].items()}
    text = Text(**entry["text"] | {"objects": objects, "device": torch.device(entry["text"]["device"]) if entry["text"]["device"] else None})
    number = report.restore([k for k in kernels if k != DRIVER], {name: [row(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}) for fields in entry[name]] for name, row in _ROWS.items()})
    log.get("runtime").info("graph %d: executable %s of an earlier process, %d kernels", number, key[:12], len(kernels))
    return unboxed(load(text), entry["no_grad"])


def _launcher(kernel: Kernel, name: str, digest: str) -> CppLauncher | None:
    if not _LIBRARY.fullmatch(name) or cache.digest(path := cache.root() / name) != digest:
        return None
    try:
        return CppLauncher(load_library(path), kernel.entry)
    except (OSError, AttributeError):  # a cache on a file system mounted noexec since, say: compiling says so
        return None


def unboxed(graph: Callable, no_grad: bool) -> Callable:
    """What AOT's wrapper is for such a graph: arguments as a list, without gradients."""
    def run(*arguments):
        return graph(list(arguments))

    def run_without_gradients(*arguments):
        with torch.no_grad():
            return graph(list(arguments))

    chosen = run_without_gradients if no_grad else run
    chosen.graph = graph
    return chosen


def _made(recipe: list, launchers: Sequence[CppLauncher]):
    kind, *rest = recipe
    if kind == "entry":
        return launchers[rest[0]].entry
    if kind == "run":
        number, name, arguments = rest
        return RUNS[name](*(tuple(a) if isinstance(a, list) else a for a in arguments))(launchers[number])
    if kind == "pointers":
        return struct.Struct(f"{rest[0]}P").pack
    if kind == "op":
        return resolve(rest[0])
    if kind == "constant":
        return _Constant(*rest)
    if kind == "kept":
        return _kept(rest[0])
    raise ValueError(f"recipe {kind!r}")


def _kept(members: list):
    from .folded import Folded
    from .graph_json import read
    from .kept_together import KeptTogether

    return KeptTogether([(Folded(read(rows), name, sources, [(tuple(shape), tuple(strides)) for shape, strides in layouts], nbytes), places) for rows, name, sources, layouts, nbytes, places in members])


class _Constant:
    """A constants.Constant that has its value."""

    def __init__(self, dtype: str, sizes: list[int], strides: list[int], content: str):
        with torch.inference_mode(False), torch.no_grad():
            flat = torch.frombuffer(bytearray(base64.b64decode(content)) or bytearray(1), dtype=torch.uint8)[: len(base64.b64decode(content))]
            self._value = torch.empty_strided(sizes, strides, dtype=getattr(torch, dtype), device="cpu")
            self._value.copy_(flat.view(self._value.dtype).view(sizes))

    def __call__(self) -> torch.Tensor:
        return self._value


# ---------------------------------------------------------------- writing


def keep(key: str, executables: Sequence[Callable], report: Report, before: dict[str, int], refused: str) -> None:
    """Write the entry of one executable and of the rows that the report gained since ``before``, unless it is ``refused`` for a reason. That nothing is kept is said in the log, and is no error: the graph is compiled."""
    from .pays import is_settled

    try:
        if refused:
            raise NotKept(refused)
        rows = {name: [dataclasses.asdict(row) for row in getattr(report, name)[before[name]:]] for name in _ROWS}
        content = json.dumps(_entry(executables[0]) | {"no_grad": torch.is_grad_enabled(), "settled": is_settled(), "made": time.time(), **rows}).encode()
        cache.fetch(key, SUFFIX, lambda scratch: _write(scratch / "executable", content))
    except NotKept as reason:
        log.get("runtime").debug("the executable is not kept: %s", reason)
    except CacheError as error:  # a full disk
        log.get("runtime").warning("the executable is not kept: %s", error)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _entry(executable: Callable) -> dict:
    text: Text | None = getattr(executable, "text", None)
    if text is None:
        raise NotKept("there is no text: the graph runs node by node, or in CUDA graphs")
    launches = list(executable.launches)
    kernels = list(dict.fromkeys(x.kernel for x in launches))
    if any(k is None or k.language != "cpp" for k in kernels) or (text.device is not None and text.device.type != "cpu"):
        raise NotKept("a kernel that is not C++")
    driver = getattr(executable, "driver", None)
    if any(x is driver for x in text.objects.values() if x is not None):
        kernels.append(DRIVER)
    objects = {name: ["entry", kernels.index(DRIVER)] if x is driver and x is not None else _recipe(name, x, launches, kernels) for name, x in text.objects.items()}
    return {"text": {"source": text.source, "lives": text.lives, "device": str(text.device) if text.device else None, "arena": text.arena, "naive": text.naive}, "objects": objects,
            "built": [dataclasses.asdict(k) for k in kernels], "libraries": _libraries(kernels)}


def _libraries(kernels: list[Kernel]) -> list[list[str]]:
    from ..runtime.build import CppUnit, build

    paths = build([CppUnit.of(k) for k in kernels])
    digests = [cache.digest(path) for path in paths]
    if None in digests:
        raise NotKept("a kernel's library has gone")
    return [[path.name, digest] for path, digest in zip(paths, digests)]


def _recipe(name: str, x, launches: list, kernels: list[Kernel]) -> list:
    """How `_made` makes this object again."""
    from .constants import Constant
    from .graph_json import written
    from .kept_together import KeptTogether

    for launch in launches:
        if getattr(launch.launcher, "entry", None) is x and x is not None:
            return ["entry", kernels.index(launch.kernel)]
        if launch.function is x and x is not None and (recipe := getattr(launch.run, "recipe", None)) is not None:
            return ["run", kernels.index(launch.kernel), recipe[0], list(recipe[1])]
    packer = re.fullmatch(r"pointers_(\d+)", name)
    if packer and isinstance(getattr(x, "__self__", None), struct.Struct) and x.__self__.format == f"{packer[1]}P" and x.__name__ == "pack":
        return ["pointers", int(packer[1])]
    if isinstance(x, torch._ops.OpOverload) and is_lasting(str(x)) and resolve(str(x)) is x:
        return ["op", str(x)]
    if type(x) is Constant:
        return ["constant", *_content(x())]
    if type(x) is KeptTogether:
        return ["kept", [[written(f.graph), f.name, list(f.sources), f.layouts, f.bytes, list(places)] for f, places in x.members]]
    raise NotKept(f"{name}, a {type(x).__name__}")


def _content(x: torch.Tensor) -> tuple:
    """dtype, sizes, strides, and the elements in order as base64."""
    if x.device.type != "cpu" or x.layout is not torch.strided or type(x) is not torch.Tensor:
        raise NotKept("a constant that is no plain tensor of the CPU")
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    return str(x.dtype).removeprefix("torch."), list(x.shape), list(x.stride()), base64.b64encode(bytes(flat.tolist()) if flat.numel() < 64 else flat.numpy().tobytes()).decode()
