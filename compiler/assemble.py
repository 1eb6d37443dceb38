"""An executable from a lowered graph: the text of codegen/executable.py with the objects that it names, and its memory."""
from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable

import torch
from torch.fx import GraphModule

from ..codegen.executable import Text, write
from ..codegen.liveness import Liveness
from ..runtime import launch
from ..runtime.cuda_graphs import CudaGraphs
from ..runtime.workspace import Workspaces
from . import log
from .errors import UnsupportedError
from .folded import Folded
from .ir.graph import is_tensor, value
from .ir.lowered import restride

_numbers = itertools.count()


def assemble(gm: GraphModule, cuda_graphs: bool = False) -> Callable:
    """The function of a lowered graph: takes a list of arguments, which it clears, and returns a tuple. An executable, else the graph's forward.

    cuda_graphs: replay it as one launch once its shapes repeat; where no input is a CUDA tensor that changes nothing. ``executable.text`` is the Text it was made of, ``executable.workspaces`` the memory it keeps (None if it needs none).
    """
    try:
        text = write(gm)
    except UnsupportedError as error:
        log.get("codegen").warning("no executable: %s; the graph runs node by node", error)
        return gm.forward
    run = load(text)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if cuda_graphs and any(is_tensor(n) and value(n).device.type == "cuda" for n in inputs):
        written = Liveness(gm.graph).written
        kept = [(n.target, [inputs.index(a) for a in n.args]) for n in gm.graph.nodes if isinstance(n.target, Folded)]
        return CudaGraphs(run, [k for k, n in enumerate(inputs) if (n, 0) in written], kept)
    return run


def load(text: Text) -> Callable:
    """The function that a text defines."""
    names = {"torch": torch, "restride": restride, "empty_strided": torch.empty_strided, "pointers": launch.pointers, "integers": launch.integers, "floats": launch.floats, **text.objects}
    file = f"<tileweld executable {next(_numbers)}>"
    linecache.cache[file] = (len(text.source), None, text.source.splitlines(keepends=True), file)  # so that a traceback shows its lines
    exec(compile(text.source, file, "exec"), names)
    workspaces = None
    if text.lives is not None:
        workspaces = Workspaces(names["sizes"], text.lives, names["prepare"], text.device or "cpu")
        names |= {"take": workspaces.take, "give": workspaces.give}
    graph = names["graph"]
    graph._boxed_call, graph.text, graph.workspaces = True, text, workspaces
    return graph
