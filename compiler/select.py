"""Selectors: which implementation a fused op gets. One function an op, a row in `SELECTORS`."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import operator
from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from ..runtime import brgemm
from .errors import UnsupportedError
from .ir import attention_keys as _attention_keys_op  # noqa: F401 (registers the op)
from .ir import attention_lse as _attention_lse_op  # noqa: F401 (registers the op)
from .ir import attention_parts as _attention_parts_op  # noqa: F401 (registers the op)
from .ir import rms_norm as _rms_norm_op  # noqa: F401 (registers the op)
from .ir.attention import Variant, variant_of
from .ir import cross_entropy as _cross_entropy_op  # noqa: F401 (registers the op)
from .ir.graph import is_tensor, value
from .ir.int8_linear import arguments
from .ir.kernel import Kernel
from .ir.linear import spec_of
from .ir.region import Body, Region
from .options import Options
from .runs import checked, with_targets


@dataclasses.dataclass
class Choice:
    """How one fused op or region runs: a kernel, else ``function(*args)`` of the op's own arguments, else (both None) its definition.

    A kernel writes into outputs that it is given and allocates nothing. ``outputs`` says which values those are: the op's node, a region's
    roots, for an op that returns a list one entry a result (`results`). Sizes, strides and dtype of a buffer are those of the fake value.
    Without ``run`` the kernel is launched with [*outputs, *inputs], ``ints`` and ``floats``: the fast way, packed ahead of the call. With it
    ``run(launch)`` is a function of (outs: list[Tensor], *ins) that calls ``launch(tensors, ints, floats)``.
    """

    op: str
    reason: str
    name: str = "reference"
    function: Callable | None = None
    node: Node | None = None  # the fused op; choose() fills it in
    kernel: Kernel | None = None
    inputs: list[Node] = dataclasses.field(default_factory=list)  # nodes of tensors, or of symbolic integers if there is a ``run``
    outputs: list = dataclasses.field(default_factory=list)  # nodes; a fake tensor where nobody reads that output
    ints: tuple = ()  # integers or nodes of symbolic ones
    floats: tuple = ()
    run: Callable[[Callable], Callable] | None = None
    has_layout: bool = False  # the kernel holds its tensors' sizes and strides: none are passed
    interpreted: bool = False
    nodes: frozenset[Node] = frozenset()  # all that the kernel computes, of a region
    inplace: tuple[tuple[int, int], ...] = ()  # (output, input) that may be one memory: the kernel reads that input's element once, before it writes the same one of the output


def results(node: Node) -> list:
    """The outputs of an op that returns a list: for each its first getitem node, or the fake value where nobody reads it."""
    found = list(value(node))
    for user in reversed(node.users):
        if user.target is operator.getitem:
            found[user.args[1]] = user
    return found


def attention(node: Node, target: str, options: Options) -> Choice:
    """tileweld::attention, attention_keys, attention_parts and attention_lse: the generated kernel (on CPUs 1.1 to 16x torch's SDPA, benchmarks/kernels_cpu.py); where there is none, torch's SDPA or the definition."""
    q, k, v, captures, sizes, *texts = node.args
    parts = list(k) if isinstance(k, (list, tuple)) else [k]
    tensors = [value(x) for x in (q, parts[0], v)]
    captured = [value(c) for c in captures]
    variant = variant_of(captured, *texts)
    dtype, width, value_width = tensors[0].dtype, tensors[0].shape[3], tensors[2].shape[3]
    if target == "reference":
        return Choice("attention", "options ask for it")
    if dtype == torch.float64:
        return Choice("attention", "float64 has no kernel")
    width, value_width = int(width), int(value_width)  # a symbolic head dim becomes a guard: the kernel is made for one
    queries = tensors[0].shape[2]
    known = {"queries": queries if isinstance(queries, int) else None} if target == "cpp" else {}  # one of the kernel's two ways: half the compiler's time
    if len(parts) > 1:
        known["key_dims"] = [int(value(x).shape[3]) for x in parts]
    has_lse = node.target is torch.ops.tileweld.attention_lse.default
    if has_lse:
        known["lse"] = True
    known |= {name: x.dtype for name, x in (("k_dtype", tensors[1]), ("v_dtype", tensors[2])) if x.dtype != dtype}
    choice = _generated("attention", target, node, [q, *parts, v, *captures], sizes, (), variant, q_dtype=dtype, capture_dtypes=[c.dtype for c in captured], capture_ranks=[c.dim() for c in captured],
                        head_dim=width, value_dim=value_width, num_sizes=len(sizes), **known)
    if has_lse:
        choice.outputs = results(node) if choice.kernel is not None else []
        return choice
    if choice.kernel is None and len(parts) == 1 and not variant.key and len({x.dtype for x in tensors}) == 1 and (function := _library(variant)) is not None:
        return Choice("attention", choice.reason, "aten:scaled_dot_product_attention", function)
    return choice


def attention_backward(node: Node, target: str, options: Options) -> Choice:
    """tileweld::attention_backward: the generated kernel, on CPUs; else its definition, blocks of torch operations, whose products are the library's."""
    grad, q, k, v, captures, sizes, *texts = node.args
    tensors, captured = [value(x) for x in (q, k, v, grad)], [value(c) for c in captures]
    floats = [n for n, c in enumerate(captured) if c.dtype.is_floating_point]
    wanted = sorted({floats[u.args[1] - 3] for u in node.users if u.target is operator.getitem and u.args[1] >= 3})
    reason = "options ask for it" if target == "reference" else "float64 has no kernel" if tensors[0].dtype == torch.float64 else ""
    large = [n for n in wanted if not all(isinstance(size, int) for size in captured[n].shape) or captured[n].numel() > MOST_SUMS or captured[n].dtype == torch.float64]
    if large and not reason:
        reason = f"the gradient of the captured {', '.join(f'c{n}' for n in large)} is wanted: no kernel sums that many elements, a size that is not known, or float64"
    if len({x.dtype for x in tensors}) > 1 and not reason:
        reason = "q, k, v and the output's gradient have several dtypes"
    if not reason:
        choice = _generated("attention_backward", target, node, [grad, q, k, v, *captures], sizes, (), variant_of(captured, *texts), q_dtype=tensors[0].dtype, capture_dtypes=[c.dtype for c in captured],
                            capture_ranks=[c.dim() for c in captured], head_dim=int(tensors[0].shape[3]), value_dim=int(tensors[2].shape[3]), num_sizes=len(sizes), **({"wanted": wanted} if wanted else {}))
        if choice.kernel is not None:
            made = results(node)
            choice.outputs = made[:3] + [made[3 + floats.index(n)] for n in wanted]
            return choice
        reason = choice.reason
    return Choice("attention_backward", reason, BLOCKS)


#: how attention_backward runs without a kernel: on its definition, which is no loss to warn of
BLOCKS = "torch:blocks"
MOST_SUMS = 1 << 16  # elements of a captured tensor whose gradient a kernel sums, about four sums a thread: 1 MiB each


def rms_norm(node: Node, target: str, options: Options) -> Choice:
    """tileweld::rms_norm that is still whole. Every other has been taken apart (ir/expansions.py), and is part of a region."""
    if target == "reference":
        return Choice("rms_norm", "options ask for it")
    return Choice("rms_norm", "float64 has no kernel" if any(value(a).dtype == torch.float64 for a in node.all_input_nodes if is_tensor(a)) else "there is nothing to compute")


def linear(node: Node, target: str, options: Options) -> Choice:
    """tileweld::linear: a generated kernel, or the definition for float64."""
    x, weights, captures, sizes, norm, eps, prologue, epilogues, pairs = node.args[:9]
    maxima = list(node.args[9]) if len(node.args) > 9 else []
    tensor, matrices, captured = value(x), [value(w) for w in weights], [value(c) for c in captures]
    if target == "reference":
        return Choice("linear", "options ask for it")
    if torch.float64 in (tensor.dtype, *(w.dtype for w in matrices)):
        return Choice("linear", "float64 has no kernel")
    known = {}
    if target == "cpp":  # a kernel for these rows and strides alone is made in half the time
        rows, tensors = tensor.shape[0], [*value(node)[:len(epilogues)], tensor, *matrices, *captured]
        known = {"rows": rows if isinstance(rows, int) else None, "unit": [[isinstance(stride, int) and stride == 1 for stride in t.stride()] for t in tensors]}
    choice = _generated("linear", target, node, [x, *weights, *captures], sizes, (eps, *[1.0] * bool(maxima)), spec_of(captured, norm, prologue, epilogues, pairs), x_dtype=tensor.dtype,
                        weight_dtypes=[w.dtype for w in matrices], capture_dtypes=[c.dtype for c in captured], capture_ranks=[c.dim() for c in captured],
                        widths=[int(w.shape[0]) for w in matrices], k=int(tensor.shape[1]), num_sizes=len(sizes), maxima=maxima, **known)
    if choice.kernel is not None:
        choice.outputs = results(node)
    return choice


def int8_linear(node: Node, target: str, options: Options) -> Choice:
    """tileweld::int8_linear: a generated kernel, or the definition for float64."""
    x, weights, scales, captures, sizes, norm, eps, prologue, epilogues, pairs, activation, threshold, columns, row_max, maxima = arguments(node.args)
    tensor, matrices, steps, captured = value(x), [value(w) for w in weights], [value(s) for s in scales], [value(c) for c in captures]
    if target == "reference":
        return Choice("int8_linear", "options ask for it")
    if tensor.dtype == torch.float64:
        return Choice("int8_linear", "float64 has no kernel")
    inputs, known = [x, *weights, *scales, *captures, *([columns] if columns is not None else [])], {}
    if target == "cpp":
        rows, tensors = tensor.shape[0], [*value(node)[:len(epilogues)], *(value(n) for n in inputs)]
        known = {"brgemm": brgemm.is_wanted(), "rows": rows if isinstance(rows, int) else None, "unit": [[isinstance(stride, int) and stride == 1 for stride in t.stride()] for t in tensors]}
    has_row_max = row_max is not None
    choice = _generated("int8_linear", target, node, [*inputs, *([row_max] if has_row_max else [])], sizes, (eps, threshold, *[1.0] * (has_row_max or bool(maxima))), spec_of(captured, norm, prologue, epilogues, pairs), x_dtype=tensor.dtype,
                        capture_dtypes=[c.dtype for c in captured], capture_ranks=[c.dim() for c in captured], widths=[int(w.shape[0]) for w in matrices], k=int(tensor.shape[1]), num_sizes=len(sizes),
                        activation=activation, groups=[int(s.shape[1]) for s in steps], has_columns=columns is not None, maxima=list(maxima), has_row_max=has_row_max, **known)
    if choice.kernel is not None:
        choice.outputs = results(node)
        choice.ints += (1,) * choice.kernel.link_torch  # brgemm or not, see int8_brgemm.py
    return choice


def cross_entropy(node: Node, target: str, options: Options) -> Choice:
    """tileweld::cross_entropy and its backward: a generated kernel, or the definition for float64."""
    backward = node.target is torch.ops.tileweld.cross_entropy_backward.default
    *tensors, ignored, softcap, smoothing = node.args
    logits, targets = (value(x) for x in tensors[-3:-1]) if backward else map(value, tensors)
    if target == "reference":
        return Choice("cross_entropy", "options ask for it")
    if logits.dtype == torch.float64:
        return Choice("cross_entropy", "float64 has no kernel")
    choice = _generated("cross_entropy", target, node, tensors, (ignored,), (softcap, smoothing), logits.dtype, targets.dim(), softcap > 0, backward)
    if choice.kernel is not None and not backward:
        with logits.fake_mode:
            status = torch.empty(1, dtype=torch.int32, device=logits.device)
        choice.outputs, choice.run = [*results(node), status], with_targets(ignored, (softcap, smoothing))
    return choice


def region(found: Region, target: str = "cpp") -> Choice:
    """A region as one generated kernel."""
    body = found.body
    reason = f"{body.ops} ops in one kernel"
    if target == "triton":
        return _triton_region(found, reason)
    try:
        kernel = _region_kernel("cpp", body)
    except UnsupportedError as error:
        return Choice("region", error.what)
    if not body.checks:
        count = len(body.inputs)
        return Choice("region", reason, kernel=kernel, inputs=found.inputs[:count], outputs=found.outputs, ints=tuple(found.inputs[count:]), has_layout=not body.sizes, nodes=frozenset(found.nodes))
    with value(found.outputs[0]).fake_mode:
        status = torch.empty(1, dtype=torch.int32)
    return Choice("region", reason, kernel=kernel, inputs=found.inputs, outputs=[*found.outputs, status], run=checked(len(body.inputs)), has_layout=not body.sizes, nodes=frozenset(found.nodes))


def _triton_region(found: Region, reason: str) -> Choice:
    """A region as a Triton kernel. Positions from data are asserted on the device, as ATen does: no status to wait for."""
    if not _has_triton():
        return Choice("region", "triton is not installed: pip install 'tileweld[gpu]'")
    body, device = found.body, value(found.outputs[0]).device
    if body.checks and torch.version.hip:
        return Choice("region", "reads positions from data, which is not asserted on HIP")
    try:
        kernel = _region_kernel("triton", body)
    except UnsupportedError as error:
        return Choice("region", error.what)
    count = len(body.inputs)
    choice = Choice("region", reason, kernel=kernel, inputs=found.inputs[:count], outputs=found.outputs, ints=tuple(found.inputs[count:]), has_layout=not body.sizes, interpreted=device.type == "cpu", nodes=frozenset(found.nodes))
    if any(value(x).device != device for x in choice.inputs):  # scalars that live on the host
        choice.inputs, choice.ints, choice.run = found.inputs, (), _moved(count, device)
    return choice


def _moved(tensors: int, device: torch.device):
    def run(launch):
        def region_kernel(outs, *ins):
            launch([*outs, *(x.to(device) for x in ins[:tensors])], ins[tensors:], ())

        return region_kernel

    return run


def _generated(op: str, target: str, node: Node, inputs: list[Node], ints: Sequence, floats: Sequence, *args, **kwargs) -> Choice:
    """The kernel that codegen/{target}/{op}.emit(*args, **kwargs) makes, launched with [node, *inputs], ints, floats; what it does not support runs on the definition."""
    if target == "triton" and not _has_triton():
        return Choice(op, "triton is not installed: pip install 'tileweld[gpu]'")
    if importlib.util.find_spec(f"..codegen.{target}.{op}", __package__) is None:
        return Choice(op, f"no {target} kernel of this op")
    try:
        kernel = _emitted(target, op, tuple(map(_hashable, args)), tuple((name, _hashable(x)) for name, x in kwargs.items()))
    except UnsupportedError as error:
        return Choice(op, error.what)
    interpreted = target == "triton" and value(inputs[0]).device.type == "cpu"
    return Choice(op, "CPU tensors on the triton target: interpreted, for checking only" if interpreted else "generated for this op", kernel=kernel, inputs=inputs, outputs=[node],
                  ints=tuple(ints), floats=tuple(floats), interpreted=interpreted)


@functools.lru_cache(512)
def _emitted(target: str, op: str, args: tuple, kwargs: tuple) -> Kernel:
    """The layers of a model have the same kernels: each is written once. Its name ends in a hash, so that a report tells two apart."""
    kernel = importlib.import_module(f"..codegen.{target}.{op}", __package__).emit(*args, **dict(kwargs))  # triton is an optional dependency
    return dataclasses.replace(kernel, name=f"{kernel.name}_{hashlib.sha256(kernel.source.encode()).hexdigest()[:6]}")


@functools.lru_cache(512)
def _region_kernel(target: str, body: Body) -> Kernel:
    return importlib.import_module(f"..codegen.{target}.region", __package__).emit(body)


def _hashable(x):
    return tuple(map(_hashable, x)) if isinstance(x, list) else x


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _library(variant: Variant) -> Callable | None:
    """torch's own SDPA for a scaled score, no mask or the causal one, and rows that always see a key."""
    if variant.linear_scale is None or variant.sink or variant.value or variant.mask not in ("True", "j <= i") or variant.fill != float("-inf"):
        return None
    causal, scale = variant.is_causal, variant.linear_scale

    def scaled_dot_product_attention(q, k, v, captures, sizes, *texts):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    return scaled_dot_product_attention


#: op -> selector(node, target, options) -> Choice
SELECTORS = {torch.ops.tileweld.attention.default: attention, torch.ops.tileweld.attention_keys.default: attention, torch.ops.tileweld.attention_parts.default: attention, torch.ops.tileweld.attention_lse.default: attention, torch.ops.tileweld.rms_norm.default: rms_norm, torch.ops.tileweld.linear.default: linear,
             torch.ops.tileweld.attention_backward.default: attention_backward, torch.ops.tileweld.int8_linear.default: int8_linear, torch.ops.tileweld.cross_entropy.default: cross_entropy, torch.ops.tileweld.cross_entropy_backward.default: cross_entropy}
