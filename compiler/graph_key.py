"""The name under which the executable of a graph is kept: a hash of all that decides what the compiler makes of it.

Two graphs have one key only if everything below is equal: the graph as Dynamo traced it (ops, arguments, order), what is known of its inputs
(sizes, strides, offset, dtype, device, whether it is a parameter, stays in place, requires grad, and its name in the model), options and mode, torch's
settings that ops or passes read, the machine and its torch, and every source file of this package. What has no text here, or text that
may mean another thing tomorrow (a function of the user's, a custom op), has no key: `NotKept` says what it was.
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
import types
from pathlib import Path

import sympy
import torch
from torch.fx import GraphModule, Node

from ..runtime import cache
from .labels import label_inputs

#: gqa is not among them: its pass looks at weights. int8's does not: which layers there are is in the graph and its labels, rows and scales are folded weights, and what pays is timed by shape as for float products
OPTIONS = frozenset({"target", "strict", "fold_weights", "passes", "int8"})
MODULES = frozenset({"torch", "torch._C", "torch._C._nn", "torch._C._linalg", "torch._C._special", "torch._C._fft", "torch.functional", "torch.nn.functional", "torch.amp.autocast_mode", "_operator", "math"})
ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag"})
NAMESPACES = ("aten", "prims")
OURS = frozenset({"tileweld.quantize_rows", "tileweld.dequantize_rows"})  # computations of weights; what they mean is in SOURCES
SOURCES = ("compiler", "passes", "codegen", "runtime")


class NotKept(Exception):
    """Why a graph's executable has no place on disk."""


def key_of(gm: GraphModule, example_inputs, options, mode) -> str:
    """sha256 in hex. Raises NotKept for graphs that are not fully static inference graphs on the CPU, or hold what has no lasting text."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise NotKept("autocast is on around the graph")  # AOT's wrapper turns it off for the call
    given = dict(options or {})
    if unknown := sorted(map(str, set(given) - OPTIONS)):
        raise NotKept(f"the option {unknown[0]}")
    try:
        asked = json.dumps([given, mode], sort_keys=True)
    except (TypeError, ValueError):
        raise NotKept("options that are no JSON") from None
    inputs = _inputs(gm, example_inputs)
    return cache.entry_key("executable 1", graph_text(gm), inputs=inputs, options=asked, state=_state(), sources=_sources(), torch=[torch.__file__, str(torch.version.git_version)],
                           sympy=sympy.__version__, compiler=os.environ.get("CXX", ""), brgemm=os.environ.get("TILEWELD_BRGEMM", ""))


def graph_text(gm: GraphModule) -> str:
    """The graph, a line a node; nodes by number, so that names say nothing."""
    numbers: dict[Node, int] = {}
    lines = []
    for node in gm.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            lines.append("placeholder")
        elif node.op in ("call_function", "call_method", "output"):
            target = "output" if node.op == "output" else f"method {_method(node)}" if node.op == "call_method" else f"attribute {_attribute(node)}" if node.target is getattr else _function(node.target)
            lines.append(f"{target} {_argument(node.args, numbers)} {_argument(node.kwargs, numbers)}")
        else:
            raise NotKept(f"a {node.op} node, {node.target}")
        _static(node)
    return "\n".join(lines)


def _method(node: Node) -> str:
    first = node.args[0] if node.args else None
    if not (isinstance(first, Node) and isinstance(first.meta.get("example_value"), torch.Tensor)):
        raise NotKept(f"the method {node.target} of what is no tensor")
    return node.target


def _attribute(node: Node) -> str:
    if len(node.args) != 2 or node.args[1] not in ATTRIBUTES or not isinstance(node.args[0], Node) or not isinstance(node.args[0].meta.get("example_value"), torch.Tensor):
        raise NotKept(f"the attribute {node.args[1:]}")
    return node.args[1]


def _function(target) -> str:
    """A function by a name that leads to it, in torch, Python's operators or its mathematics. Not a function that looks its meaning up elsewhere (a Triton kernel's number, a process group)."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(target)
        if not is_lasting(name) or resolve(name) is not target:
            raise NotKept(f"the op {name}")
        return f"{type(target).__name__} {name}"
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not isinstance(target, (types.FunctionType, types.BuiltinFunctionType)) or module not in MODULES:
        raise NotKept(f"the function {name or target!r} of {module}")
    for place, path in ((module, name), (module, name.split(".")[-1])):  # torch.tanh calls itself _VariableFunctionsClass.tanh
        found = sys.modules.get(place)
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is target:
            return f"{type(target).__name__} {place}:{path}"
    raise NotKept(f"the function {module}.{name}, which is not found under its name")


def is_lasting(name: str) -> bool:
    """Will an op's name mean tomorrow what it means today?"""
    return name.split(".")[0] in NAMESPACES or name.removesuffix(".default") in OURS


def resolve(name: str):
    """The overload or packet of torch.ops with this name; None if there is none."""
    if name.removesuffix(".default") in OURS:
        from .ir import int8_linear  # noqa: F401 (registers them)
    found = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _argument(x, numbers: dict[Node, int]) -> str:
    if isinstance(x, Node):
        return f"%{numbers[x]}"
    if isinstance(x, (list, tuple)) and (type(x) in (list, tuple, torch.Size) or type(x).__name__ == "immutable_list"):
        kind = "t" if isinstance(x, tuple) else "l"
        return f"{kind}[{', '.join(_argument(y, numbers) for y in x)}]"
    if isinstance(x, dict) and type(x).__name__ in ("dict", "immutable_dict"):
        return "d{" + ", ".join(f"{_argument(k, numbers)}: {_argument(v, numbers)}" for k, v in x.items()) + "}"
    if isinstance(x, slice):
        return f"slice({', '.join(_argument(y, numbers) for y in (x.start, x.stop, x.step))})"
    if type(x) in (bool, int, str, complex, type(None), type(Ellipsis)):
        return repr(x)  # True and 1, '1' and 1 are written apart
    if type(x) is float:
        return x.hex() if math.isfinite(x) else f"float {x}"  # -0.0 and 0.0, 1.0 and 1 too
    if isinstance(x, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return f"<{x}>"
    raise NotKept(f"an argument of type {type(x).__name__}")


def _static(node: Node) -> None:
    """Every size in the graph is a number."""
    for x in torch.utils._pytree.tree_leaves(node.meta.get("example_value")):
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) or (isinstance(x, torch.Tensor) and not _is_static(x)):
            raise NotKept("a size or number that is known when it runs only")
        if isinstance(x, torch.Tensor) and x.device.type != "cpu":
            raise NotKept(f"a tensor on {x.device.type}")


def _is_static(x: torch.Tensor) -> bool:
    return x.layout is torch.strided and all(type(n) is int for n in (*x.shape, *x.stride(), x.storage_offset()))


def _inputs(gm: GraphModule, example_inputs) -> list:
    """What is known of every input; no two may share memory, so that who is whose alias is no question."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise NotKept("inputs and placeholders that differ in number")
    label_inputs(gm, gm)
    rows, storages = [], set()
    for node, x in zip(placeholders, example_inputs):
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            raise NotKept(f"an input of type {type(x).__name__}")
        traced = node.meta.get("example_value")
        if not (isinstance(traced, torch.Tensor) and x.device.type == "cpu" and _is_static(x) and not x.is_conj() and not x.is_neg()) or (traced.shape, traced.stride(), traced.dtype) != (x.shape, x.stride(), x.dtype):
            raise NotKept("an input that is no plain static tensor of the CPU")
        if x.requires_grad and torch.is_grad_enabled():
            raise NotKept("gradients")
        if (storage := x.untyped_storage()).nbytes() and storage._cdata in storages:
            raise NotKept("two inputs that share memory")
        storages.add(storage._cdata)
        rows.append([list(x.shape), list(x.stride()), x.storage_offset(), str(x.dtype), str(x.device), isinstance(x, torch.nn.Parameter), x.requires_grad, x.is_inference(),
                     str(getattr(x, "_dynamo_static_input_type", None)), node.meta.get("label")])
    return rows


def _state() -> list:
    """torch's settings."""
    cuda = torch.backends.cuda
    return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.is_anomaly_enabled(),
            cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]


@functools.cache
def _sources() -> str:
    """A hash of the package's files: a compiler that was edited, and not given a new version, makes other code."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in (".py", ".h", ".hpp", ".cpp")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
