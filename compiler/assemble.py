"""An executable from a lowered graph: the text of codegen/executable.py with the objects that it names, and its memory."""
from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from ..codegen.executable import write
from ..codegen.liveness import Liveness
from ..runtime.cuda_graphs import CudaGraphs
from . import log
from .errors import UnsupportedError
from .ir.graph import is_tensor, value
from .ir.lowered import is_launch
from .kept_together import KeptTogether, keep_together
from .load import load


def assemble(gm: GraphModule, cuda_graphs: bool = False, driver: Callable | None = None) -> Callable:
    """The function of a lowered graph: takes a list of arguments, which it clears, and returns a tuple. An executable, else the graph's forward.

    cuda_graphs: replay it as one launch once its shapes repeat; where no input is a CUDA tensor that changes nothing. ``executable.text`` is the Text it was made of, ``executable.workspaces`` the memory it keeps (None if it needs none),
    ``executable.launches`` the Launches. driver: what launches several kernels by one call (runtime/launches.py); without it there is a call a kernel.
    """
    keep_together(gm)
    try:
        text = write(gm, driver)
    except UnsupportedError as error:
        log.get("codegen").warning("no executable: %s; the graph runs node by node", error)
        return gm.forward
    run = load(text)
    run.driver, run.launches = driver, [n.target for n in gm.graph.nodes if is_launch(n)]
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if cuda_graphs and any(is_tensor(n) and value(n).device.type == "cuda" for n in inputs):
        written = Liveness(gm.graph).written
        kept = [(n.target, [inputs.index(a) for a in n.args]) for n in gm.graph.nodes if isinstance(n.target, KeptTogether)]
        return CudaGraphs(run, [k for k, n in enumerate(inputs) if (n, 0) in written], kept)
    return run
