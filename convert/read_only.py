"""A tensor that is made anew at each reading, and says so to whoever writes to it: what is written would be lost without a word."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..compiler.errors import ConversionError

_NO_VALUES = ("requires_grad_", "retain_grad_", "share_memory_", "rename_")  # in place, but of no element


class ReadOnly(Tensor):
    """Computes as a plain tensor and gives plain tensors; its views are read-only too.

    peft's merge is `layer.weight.data += delta`: behind a property that dequantises, the adapter would be gone and nothing merged.
    Raises ConversionError where an element is written: in-place methods, item and `data` assignment, out=.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        is_data = getattr(func, "__self__", None) is Tensor.data
        in_place = name == "__setitem__" or is_data and name == "__set__" or name.endswith("_") and not name.startswith("__") and name.rpartition(".")[2] not in _NO_VALUES
        if in_place and _holds(args[:1]) or _holds(kwargs.get("out")):
            raise ConversionError("the weight of an int8 layer is computed at each reading, and what is written to it would be lost", cure="merge adapters and edit weights first, then quantize_; to compute with it, take .clone()")
        with torch._C.DisableTorchFunctionSubclass():
            own = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, cls)} - {0}
            result = func(*tree_map_only(cls, lambda x: x.as_subclass(Tensor), args), **tree_map_only(cls, lambda x: x.as_subclass(Tensor), kwargs))
            return tree_map_only(Tensor, lambda x: x.as_subclass(cls) if type(x) is Tensor and x.layout is torch.strided and x.untyped_storage().data_ptr() in own else x, result)


def _holds(given) -> bool:
    return any(isinstance(x, ReadOnly) for x in tree_leaves(given))
