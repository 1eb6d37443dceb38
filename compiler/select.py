"""Selectors: which implementation a fused op gets. One function an op, a row in `SELECTORS`."""
from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch.fx import Node

from ..codegen.cpp import pointwise as cpp_pointwise
from ..codegen.regions import Region, kept_dims
from .errors import UnsupportedError
from .ir import rms_norm as _rms_norm_op  # noqa: F401 (registers the op)
from .ir.attention import Variant, empty_output, variant_of
from .ir.graph import value
from .ir.kernel import Kernel
from .ir.views import VIEWS
from .options import Options


@dataclasses.dataclass
class Choice:
    """How one fused op runs: ``function(*args)`` of the op's own arguments, or a kernel from which ``bind(launch)`` makes that function."""

    op: str
    reason: str
    name: str = "reference"
    function: Callable | None = None
    kernel: Kernel | None = None
    bind: Callable[[Callable], Callable] | None = None
    interpreted: bool = False
    inputs: list[Node] | None = None  # a region: the nodes that its function takes, in place of the op's arguments


def attention(node: Node, target: str, options: Options) -> Choice:
    """tileweld::attention: the generated kernel (on CPUs 1.1 to 16x torch's SDPA, benchmarks/kernels_cpu.py); where there is none, torch's SDPA or the definition."""
    q, k, v, captures, sizes, *texts = node.args
    tensors = [value(x) for x in (q, k, v)]
    captured = [value(c) for c in captures]
    variant = variant_of(captured, *texts)
    dtype, width, value_width = tensors[0].dtype, tensors[0].shape[3], tensors[2].shape[3]
    if target == "reference":
        return Choice("attention", "options ask for it")
    if dtype == torch.float64:
        return Choice("attention", "float64 has no kernel")
    width, value_width = int(width), int(value_width)  # a symbolic head dim becomes a guard: the kernel is made for one
    choice = _generated("attention", target, tensors[0], _bind_attention, variant, q_dtype=dtype, capture_dtypes=[c.dtype for c in captured], capture_ranks=[c.dim() for c in captured],
                        head_dim=width, value_dim=value_width, num_sizes=len(sizes))
    if choice.kernel is None and (function := _library(variant)) is not None:
        return Choice("attention", choice.reason, "aten:scaled_dot_product_attention", function)
    return choice


def rms_norm(node: Node, target: str, options: Options) -> Choice:
    """tileweld::rms_norm: a generated kernel, or the definition for float64."""
    x, weight, eps, offset, cast = node.args
    tensor, scale = value(x), value(weight) if weight is not None else None
    if target == "reference":
        return Choice("rms_norm", "options ask for it")
    if torch.float64 in (tensor.dtype, scale.dtype if scale is not None else None):
        return Choice("rms_norm", "float64 has no kernel")
    out_dtype = value(node).dtype

    def bind(launch):
        def rms_norm_kernel(x, weight, eps, offset, cast):
            out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
            launch([out, x] if weight is None else [out, x, weight], (), (eps, offset))
            return out

        return rms_norm_kernel

    return _generated("rms_norm", target, tensor, bind, tensor.dtype, scale.dtype if scale is not None else None, tensor.dim(), cast)


def pointwise(region: Region) -> Choice:
    """A region of pointwise ops as one C++ loop nest."""
    known = value(region.root)
    sizes, strides = tuple(known.shape), tuple(known.stride())
    expected = [tuple(value(n).stride()) for n in region.inputs]
    kernel = cpp_pointwise.emit(region.index, region.expr, sizes=sizes, strides=strides, inputs=[(value(n).dtype, [value(n).stride(d) for d in kept_dims(n)]) for n in region.inputs])

    def bind(launch):
        def pointwise_kernel(*inputs):
            out = torch.empty_strided(sizes, strides)
            launch([out, *(x if x.stride() == stride else torch.empty_strided(x.shape, stride, dtype=x.dtype).copy_(x) for x, stride in zip(inputs, expected))], (), ())
            return out

        return pointwise_kernel

    ops = sum(1 for n in region.nodes if n.target not in VIEWS)
    return Choice("pointwise", f"{ops} ops in one pass over memory", kernel=kernel, bind=bind, inputs=region.inputs)


def _generated(op: str, target: str, tensor: torch.Tensor, bind, *args, **kwargs) -> Choice:
    """The kernel that codegen/{target}/{op}.emit makes; what it does not support runs on the definition."""
    if target == "triton" and not _has_triton():
        return Choice(op, "triton is not installed: pip install 'tileweld[gpu]'")
    emit = importlib.import_module(f"..codegen.{target}.{op}", __package__).emit  # triton is an optional dependency
    try:
        kernel = emit(*args, **kwargs)
    except UnsupportedError as error:
        return Choice(op, error.what)
    kernel = dataclasses.replace(kernel, name=f"{kernel.name}_{hashlib.sha256(kernel.source.encode()).hexdigest()[:6]}")  # so that a report tells two apart
    interpreted = target == "triton" and tensor.device.type == "cpu"
    return Choice(op, "CPU tensors on the triton target: interpreted, for checking only" if interpreted else "generated for this op", kernel=kernel, bind=bind, interpreted=interpreted)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _library(variant: Variant) -> Callable | None:
    """torch's own SDPA for a scaled score, no mask or the causal one, and rows that always see a key."""
    if variant.linear_scale is None or variant.sink or variant.mask not in ("True", "j <= i") or variant.fill != float("-inf"):
        return None
    causal, scale = variant.is_causal, variant.linear_scale

    def scaled_dot_product_attention(q, k, v, captures, sizes, *texts):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    return scaled_dot_product_attention


def _bind_attention(launch):
    def attention_kernel(q, k, v, captures, sizes, *texts):
        out = empty_output(q, v.shape[3])
        launch([out, q, k, v, *captures], sizes, ())
        return out

    return attention_kernel


#: op -> selector(node, target, options) -> Choice
SELECTORS = {torch.ops.tileweld.attention.default: attention, torch.ops.tileweld.rms_norm.default: rms_norm}
