"""Linear layers whatever way round they keep their weight: nn.Linear [N, K], and Hugging Face's Conv1D [K, N] (GPT-2's). Everything here speaks of [N, K]."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from .int8_modules import Int8Linear

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, which is a linear layer: known by its own, so that transformers need not be there."""
    return type(module).__name__ == "Conv1D" and {"nf", "nx"} <= vars(module).keys()


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K): outputs and inputs, as the module states them."""
    return (linear.nf, linear.nx) if is_conv1d(linear) else (linear.out_features, linear.in_features)


def as_rows(linear: nn.Module, weight: Tensor) -> Tensor:
    """[N, K], a view of what is laid out as the layer's weight."""
    return weight.T if is_conv1d(linear) else weight


def matrix(linear: nn.Module) -> Tensor:
    """[N, K], a view without its gradient."""
    return as_rows(linear, linear.weight.detach())


def augmented(linear: nn.Module) -> Tensor:
    """[N, K + 1]: the bias, or zeros, is the column of the constant input 1."""
    weight = matrix(linear)
    return torch.cat([weight, (weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach())[:, None]], 1)


def replace_weight(linear: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """New parameters of these values, [N, K] and [N] (None: the bias as it is), and the sizes that the module states."""
    conv = is_conv1d(linear)
    set_parameter(linear, "weight", weight.T if conv else weight)
    if bias is not None:
        set_parameter(linear, "bias", bias)
    for name, n in zip(("nf", "nx") if conv else ("out_features", "in_features"), weight.shape):
        setattr(linear, name, n)


def set_parameter(linear: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter of this value, in the dtype of the old one and trained if that is."""
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))


def check_linear(name: str, linear: nn.Module) -> None:
    """Refuse what is no linear layer with plain float weights of its size: quantised, sharded (DTensor), without numbers. Raises ConversionError."""
    if isinstance(linear, Int8Linear):
        raise ConversionError("it is int8 already", where=name, cure="convert first, then quantize_")
    if not is_linear(linear):
        raise ConversionError(f"it is a {type(linear).__module__}.{type(linear).__qualname__}, not torch.nn.Linear: quantised, sharded, with an adapter, or a layer of its own kind", where=name,
                              cure="dequantise, gather or merge it first, or put an nn.Linear with its weight in its place")
    check_plain(name, linear)
    for tensor in (linear.weight, linear.bias):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise ConversionError(f"its weight is {tensor.dtype}: quantised", where=name, cure="dequantise it first")


def check_plain(name: str, linear: nn.Module) -> None:
    """Refuse weights that are another kind of tensor (DTensor, a library's quantised one), have no numbers, or not the size that the layer states. Raises ConversionError."""
    for tensor in (linear.weight, linear.bias):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
            raise ConversionError(f"its weight is a {type(tensor.data).__name__}: quantised or sharded", where=name, cure="dequantise or gather it first")
        if tensor.is_quantized:
            raise ConversionError(f"its weight is {tensor.dtype}: quantised", where=name, cure="dequantise it first")
        if tensor.device.type == "meta":
            raise ConversionError("its weight is on the meta device, without numbers", where=name, cure="load the weights first")
    if (found := tuple(linear.weight.shape[::-1] if is_conv1d(linear) else linear.weight.shape)) != sizes_of(linear):
        raise ConversionError(f"its weight is {[*found]}, expected {[*sizes_of(linear)]}: sharded", where=name, cure="gather it first")


def refuse_int8(model: nn.Module, why: str, cure: str) -> None:
    """A ConversionError that names the first layer that `quantize_` has made."""
    if (name := next((name for name, m in model.named_modules() if isinstance(m, Int8Linear)), None)) is not None:
        raise ConversionError(f"it is int8 already{why}", where=name, cure=cure)


def check_unshared(model: nn.Module, places: Iterable[tuple[str, nn.Module, list[str]]]) -> None:
    """Refuse modules and weights that stand at two places: changed for the one, they would be wrong for the other. places: (name, module, the names of its linear layers)."""
    ours: dict[int, str] = {}
    for name, module, children in places:
        for child in children:
            ours |= {id(p): f"{name}.{child}" for p in module.get_submodule(child).parameters()}
        ours |= {id(m): name for m in (module, *map(module.get_submodule, children))}
    seen: dict[int, str] = {}
    everything = [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    for name, thing in everything:
        if id(thing) in ours and seen.setdefault(id(thing), name) != name:
            raise ConversionError(f"it is also {name}: one {'weight' if isinstance(thing, Tensor) else 'module'} in two roles", where=seen[id(thing)],
                                  cure="give each its own copy (copy.deepcopy)")
