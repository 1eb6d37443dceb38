"""An executable's text to a function, with its memory."""
from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable

import torch
from torch.autograd.graph import increment_version

from ..runtime import launch
from ..runtime.launches import launches
from ..runtime.workspace import Workspaces
from .ir.lowered import restride
from .ir.text import Text

_numbers = itertools.count()


class _Lines:
    """A loader, as far as linecache asks: the text that is there anyway, split once a traceback wants it. Hundreds of short strings, split early, would outlive the compilation and hold its memory."""

    def __init__(self, source: str):
        self.source = source

    def get_source(self, name: str) -> str:
        return self.source


def load(text: Text) -> Callable:
    """The function that a text defines."""
    names = {"torch": torch, "restride": restride, "empty_strided": torch.empty_strided, "pointers": launch.pointers, "integers": launch.integers, "floats": launch.floats, "launches": launches, "increment_version": increment_version, **text.objects}
    file = f"<tileweld executable>.{next(_numbers)}"  # linecache looks up no name that ends with ">"
    linecache.lazycache(file, {"__name__": file, "__loader__": _Lines(text.source)})  # so that a traceback shows its lines
    exec(compile(text.source, file, "exec"), names)
    workspaces = None
    if text.lives is not None:
        workspaces = Workspaces(names["sizes"], text.lives, names["prepare"], text.device or "cpu")
        names |= {"take": workspaces.take, "give": workspaces.give}
    graph = names["graph"]
    graph._boxed_call, graph.text, graph.workspaces = True, text, workspaces
    return graph
