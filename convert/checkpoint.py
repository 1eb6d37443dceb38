"""Quantised models on disk: one safetensors file whose header says what is in it. Nothing in it is executed; pickle is never read.

    header, a JSON text under "tileweld.int8" in the metadata:
      {"format": "tileweld int8", "version": 1, "modules": {name: {"kind": "linear", "activation": "float", "threshold": null, "group": 0, "shape": [N, K],
       "dtype": "float32", "bias": true, "columns": false, "scale": [least, largest], "error": |w - q scale| / |w|}, ...}, "shared": {name of a tensor: the one it is}}
    tensors: the model's state dict: q int8, scale float32, bias and columns of every quantised module, and every other parameter and buffer

`python -c "import safetensors; print(safetensors.safe_open('model.safetensors', 'pt').metadata())"` shows the header.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from ..compiler.ir.huge_pages import drop_pages, settled
from ..compiler.ir.int8_linear import ACTIVATIONS, MOST_K
from .int8_modules import Int8Embedding, Int8Linear
from .quantize import _matrix, _put, check_unhooked

KEY, FORMAT, VERSION = "tileweld.int8", "tileweld int8", 1
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}


def save_quantized(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the state of a model that `quantize_` changed to `path`. Written beside it first and moved there at the end: the file is whole or as it was.

    Raises ConversionError where no module of the model is quantised.
    """
    from safetensors.torch import save_file

    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, (Int8Linear, Int8Embedding))}
    if not modules:
        raise ConversionError(f"{type(model).__name__} has no int8 modules", cure="quantize_ it first; a float model is saved by safetensors.torch.save_model")
    tensors, shared, first = {}, {}, {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in first:
            shared[name] = first[key]
        else:
            first[key], tensors[name] = name, tensor.detach().contiguous()
    header = {"format": FORMAT, "version": VERSION, "modules": {name: _described(module) for name, module in modules.items()}, "shared": shared}
    path = Path(os.fsdecode(path))
    beside = path.with_name(f".tileweld-{secrets.token_hex(8)}")
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the rights of any new file; one that is there keeps its own
    try:
        rights = (path if path.exists() else beside).stat().st_mode & 0o777
        save_file(tensors, beside, {KEY: json.dumps(header), "format": "pt"})
        os.chmod(beside, rights)  # versions of safetensors put a file of their owner's alone in its place
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _described(module) -> dict:
    scale = module.scale
    common = {"shape": [*module.q.shape], "group": module.group, "dtype": str(module.dtype).removeprefix("torch."), "scale": [float(scale.min()), float(scale.max())] if scale.numel() else [], "error": module.error}
    if isinstance(module, Int8Embedding):
        return {"kind": "embedding", "padding_idx": module.padding_idx, **common}
    return {"kind": "linear", "activation": module.activation, "threshold": None if math.isinf(module.threshold) else module.threshold, "bias": module.bias is not None, "columns": module.columns is not None, **common}


def load_quantized(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Bring `model`, made by the same code as the one that was saved (its own weights do not matter, they may be on the meta device, but for buffers that no state dict has), to the saved state, in place; returns it.

    Everything is read and checked first. Raises ConversionError, and the model is as it was, where the file is missing, truncated, no such checkpoint, of a
    newer version, or of another model: a name, shape or dtype that does not fit.
    """
    path = Path(os.fsdecode(path))
    header, tensors = _read(path)
    devices = {t.device for t in (*model.parameters(), *model.buffers())} - {torch.device("meta")}
    target = devices.pop() if len(devices) == 1 else torch.device("cpu")
    tensors = {name: tensor.to(target) for name, tensor in tensors.items()}  # before they are shared: module.to() would part them
    stored = {**tensors}
    for name, other in header["shared"].items():
        if other not in stored or name in stored:
            raise _foreign(path, f"{name!r} is said to be {other!r}, which is not in it" if other not in stored else f"{name!r} is in it, and said to be {other!r}")
        tensors[name] = stored[other]
    made = {name: _module(model, path, name, row, tensors) for name, row in header["modules"].items()}
    inside = {f"{name}.{own}" for name, (_, new) in made.items() for own in new.state_dict()}
    replaced = {id(old) for old, _ in made.values()}
    expected = {f"{name}.{key}" if name else key: (module, key) for name, module in model.named_modules(remove_duplicate=False) if id(module) not in replaced
                for key in {**module._parameters, **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}}}
    expected = {name: (module, key) for name, (module, key) in expected.items() if getattr(module, key) is not None}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise _foreign(path, f"it lacks {_listed(missing)}")
    if extra := sorted(tensors.keys() - expected.keys() - inside):
        raise _foreign(path, f"the model has no {_listed(extra)}")
    for name, (module, key) in expected.items():
        old, new = getattr(module, key), tensors[name]
        if old.shape != new.shape:
            raise _foreign(path, f"{name} is {[*new.shape]} in it, {[*old.shape]} in the model")
        if old.dtype != new.dtype:
            raise _foreign(path, f"{name} is {new.dtype} in it, {old.dtype} in the model")
    _check_whole(model, replaced)
    parameters: dict = {}
    for name, (module, key) in expected.items():
        old, tensor = getattr(module, key), tensors[name]
        tensor = tensor if old.is_meta else tensor.to(old.device)
        if key in module._parameters:
            kept = parameters.setdefault(header["shared"].get(name, name), nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point()))
            module._parameters[key] = kept
        else:
            module._buffers[key] = tensor
    for old, new in made.values():
        _put(model, old, new.train(old.training))
    return model


def _check_whole(model: nn.Module, replaced) -> None:
    """Refuse a model that would keep a buffer without numbers: the file has none for what is in no state dict."""
    for name, module in model.named_modules():
        left = [key for key, x in module._buffers.items() if x is not None and x.is_meta and key in module._non_persistent_buffers_set] if id(module) not in replaced else []
        if left:
            raise ConversionError(f"its buffer {left[0]!r} is on the meta device, and no checkpoint has it: it is not persistent", where=name or type(model).__name__,
                                  cure="make the model with real buffers (accelerate.init_empty_weights() leaves them so), or outside of the meta device; it is as it was")


def _loaded(x: Tensor, is_table: bool) -> Tensor:
    """A tensor of the file. int8 rows of layers are read whole at every step: they move to large pages, and the file's are let go. What is looked up stays in the mapping, of which only what is read becomes resident."""
    if x.dtype != torch.int8 or is_table or (moved := settled(x)) is x:
        return x
    drop_pages(x)
    return moved


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConversionError("there is no such file", where=str(path))
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise _foreign(path, "a safetensors file without its header")
            header = json.loads(text)
            problem = _problem(header)
            if problem:
                raise _foreign(path, problem)
            multiplied = {header["shared"].get(name, name) for module, row in header["modules"].items() if row["kind"] == "linear" for name in [f"{module}.q"]}
            return header, {name: _loaded(file.get_tensor(name), name not in multiplied) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:  # the last from JSON that is nested thousands deep
        if isinstance(error, ConversionError):
            raise
        raise _foreign(path, f"truncated, or no safetensors file ({error})") from error


def _problem(header) -> str | None:
    if not isinstance(header, dict) or header.get("format") != FORMAT or not isinstance(header.get("modules"), dict) or not isinstance(header.get("shared"), dict):
        return "its header is not what it should be"
    if type(header.get("version")) is not int or header["version"] != VERSION:
        return f"version {header.get('version')!r}, this tileweld reads {VERSION}"
    if not all(isinstance(other, str) for other in header["shared"].values()):
        return "its header is not what it should be"
    return next((f"its header says of {name!r} {row!r}" for name, row in header["modules"].items() if not (isinstance(row, dict) and _is_row(row))), None)


def _is_row(row: dict) -> bool:
    """Whether the header's row of a module has everything, of its kind; what it says of the tensors is checked with them (_module)."""
    def number(x, most: float = math.inf) -> bool:
        return type(x) in (int, float) and 0 <= x <= most

    common = row.get("dtype") in [*_DTYPES] and type(row.get("group")) is int and isinstance(row.get("shape"), list) and isinstance(row.get("scale"), list) and (row.get("error") is None or number(row["error"]))
    if row.get("kind") == "embedding":
        return common and type(row.get("padding_idx", "")) in (int, type(None))
    return (common and row.get("kind") == "linear" and row.get("activation") in ACTIVATIONS and type(row.get("bias")) is type(row.get("columns")) is bool
            and (row.get("threshold", "") is None or number(row.get("threshold"), 1e300)))


def _module(model: nn.Module, path, name: str, row: dict, tensors: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """(the model's module, the one that takes its place)"""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise _foreign(path, f"the model has no module {name}") from None
    is_table = row["kind"] == "embedding"
    if (shape := _shape(old)) is None or is_table != isinstance(old, (nn.Embedding, Int8Embedding)):
        raise _foreign(path, f"the model's {name} is a {type(old).__name__}, no {row['kind']}")
    check_unhooked(name, old)
    q, scale, bias, columns = (tensors.get(f"{name}.{own}") for own in ("q", "scale", "bias", "columns"))
    fits = q is not None and scale is not None and q.dtype == torch.int8 and scale.dtype == torch.float32 and q.dim() == scale.dim() == 2 and scale.shape[0] == q.shape[0]
    if not fits or scale.shape[1] == 0 or q.shape[1] % scale.shape[1]:
        raise _foreign(path, f"the rows or scales of {name} are missing or of another kind")
    if tuple(q.shape) != shape:
        raise _foreign(path, f"{name} is {[*q.shape]} in it, {[*shape]} in the model")
    dtype = _DTYPES[row["dtype"]]
    if dtype != (known := _dtype(old)):
        raise _foreign(path, f"{name} is {row['dtype']} in it, {str(known).removeprefix('torch.')} in the model")
    threshold = math.inf if row.get("threshold") is None else float(row["threshold"])
    new = Int8Embedding(q, scale, dtype, row["padding_idx"], row.get("error")) if is_table else Int8Linear(q, scale, bias, row["activation"], threshold, columns, dtype, row.get("error"))
    found = _described(new)
    if lies := next((key for key in ("shape", "group", "scale", "bias", "columns") if row.get(key) != found.get(key)), None):
        raise _foreign(path, f"the header says of {name} {lies} {row[lies]!r}, and its tensors {found[lies]!r}")
    if not all(0 <= end < math.inf for end in found["scale"]):
        raise _foreign(path, f"the scales of {name} are {found['scale']}, expected finite ones of at least 0")
    if is_table:
        return old, new
    if (bias is not None) != (old.bias is not None) or bias is not None and (bias.shape != (shape[0],) or bias.dtype != old.bias.dtype):
        raise _foreign(path, f"the bias of {name} is not the model's")
    if columns is not None and (columns.dtype != torch.bool or columns.shape != (shape[1],) or new.activation != "mixed"):
        raise _foreign(path, f"the columns of {name} are not bool [{shape[1]}] of llm_int8")
    if new.activation != "float" and (scale.shape[1] > 1 or shape[1] > MOST_K):
        raise _foreign(path, f"{name} has activations of int8 with groups, or with more than {MOST_K} columns")
    return old, new


def _dtype(module: nn.Module) -> torch.dtype:
    """That the weight has, or had."""
    return module.dtype if isinstance(module, (Int8Linear, Int8Embedding)) else module.weight.dtype


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, (Int8Linear, Int8Embedding)):
        return tuple(module.q.shape)
    if isinstance(module, nn.Embedding):
        return tuple(module.weight.shape)
    return tuple(weight.shape) if (weight := _matrix(module)) is not None else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _foreign(path, what: str) -> ConversionError:
    return ConversionError(f"not a checkpoint of this model: {what}", where=str(path), cure="the model is as it was; save_quantized writes such files, and the model must be made by the same code")
