"""The TARGET of a command: text to something that can be called, with example inputs.

    hf:llama[:eager|sdpa][:pad]    a tiny model of transformers' class for that name, made from its config; nothing is downloaded
    models:deepseek_mla[:variant]  a reference model of tileweld.models
    path/to/file.py:factory        factory() -> (module, example_inputs), or a module with `example_inputs`

Only a file that the user names is imported, and only when it is named.
"""
from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from .. import models  # imports torch only when a model is loaded: a typing error is answered at once
from .errors import OptionError, TileweldError

FORMS = "hf:llama, hf:llama:eager, hf:llama:sdpa:pad, models:deepseek_mla, models:llama_gqa:mqa, file.py:factory"
IMPLEMENTATIONS = ("eager", "sdpa")
DTYPES = ("float16", "bfloat16", "float32", "float64")


class TargetError(TileweldError):
    """A target that cannot be had: unknown, not importable, or without inputs."""


@dataclasses.dataclass(frozen=True)
class Target:
    """call(*args, **kwargs) runs it; batch and length shape the example inputs where the target lets us choose them."""

    name: str
    call: Callable
    args: tuple
    kwargs: dict


def parse_target(text: str, *, attn: str | None = None, batch: int = 2, length: int = 17) -> Target:
    """The target that ``text`` names. attn, batch, length: for hf: and models: targets. Raises TargetError or OptionError with what exists."""
    check(text, attn)
    kind, _, rest = text.partition(":")
    if kind == "hf":
        return _hugging_face(text, rest, attn, batch, length)
    return _reference_model(text, rest, batch, length) if kind == "models" else _file(text)


def check(text: str, attn: str | None = None) -> None:
    """Raise what `parse_target` would, as far as it can be told without loading anything."""
    kind, _, rest = text.partition(":")
    if attn is not None and kind != "hf":
        raise OptionError("--attn is for hf: targets", where=text, cure="leave it out")
    if kind == "hf" and rest:
        _implementation(text, rest, attn)
    elif kind == "models" and rest:
        name = rest.partition(":")[0]
        if name not in models.available():
            raise OptionError.unknown("model", name, models.available(), where=text)
    elif text.endswith(".py"):
        raise TargetError(f"{text!r} names no factory", cure="write file.py:factory, where factory() returns (module, example_inputs)")
    elif ".py:" in text:
        path = text.rpartition(":")[0]
        if not Path(path).is_file():
            raise TargetError(f"there is no file {path}", cure="give the path from the folder you are in")
    else:
        raise TargetError(f"unknown target {text!r}", cure=f"the forms are {FORMS}; models: {', '.join(models.available())}")


def _implementation(text, rest, attn) -> str:
    """"eager" or "sdpa", from the words behind the name or from --attn."""
    chosen = [w for w in rest.split(":")[1:] if w != "pad"] + ([attn] if attn else [])
    for word in chosen:
        if word not in IMPLEMENTATIONS:
            raise OptionError.unknown("attention implementation", word, IMPLEMENTATIONS, where=text)
    if len(set(chosen)) > 1:
        raise OptionError(f"both {' and '.join(chosen)} are asked for", where=text, cure="choose one")
    return chosen[0] if chosen else "eager"


def cast(target: Target, dtype: str | None) -> Target:
    """The target with its module's and inputs' floats in another dtype ("float16", ...); None leaves them."""
    if dtype is None:
        return target
    if dtype not in DTYPES:
        raise OptionError.unknown("dtype", dtype, DTYPES, where="--dtype")
    import torch

    wanted = getattr(torch, dtype)
    if isinstance(target.call, torch.nn.Module):
        target.call.to(wanted)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(wanted) if x.is_floating_point() else x, (target.args, target.kwargs))
    return dataclasses.replace(target, args=args, kwargs=kwargs)


# ---------------------------------------------------------------- tileweld.models


def _reference_model(text, rest, batch, length) -> Target:
    name, _, variant = rest.partition(":")
    module = models.load(name)
    if variant and variant not in module.VARIANTS:
        raise OptionError.unknown("variant", variant, module.VARIANTS, where=text)
    return Target(text, module.build(**module.VARIANTS[variant] if variant else {}), tuple(module.example_inputs(batch, length)), {})


# ---------------------------------------------------------------- a file of the user's


def _file(text) -> Target:
    path, _, attribute = text.rpartition(":")
    module = _import(Path(path))
    made = getattr(module, attribute, None)
    if made is None:
        names = [name for name, x in vars(module).items() if callable(x) and getattr(x, "__module__", None) == module.__name__]
        raise OptionError.unknown("factory", attribute, names or ["(the file defines no function)"], where=path)
    return _from_factory(text, made, f"{path}:{attribute}")


def _import(path: Path):
    name = f"tileweld_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` would: the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"{path} cannot be imported: {type(error).__name__}: {error}", where=_line_in(error, path), cure="run it with python first") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _line_in(error: BaseException, path: Path) -> str:
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if Path(traceback.tb_frame.f_code.co_filename).resolve() == path.resolve():
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"{path}:{line}" if line else str(path)


def _from_factory(text, made, where) -> Target:
    import torch

    if callable(made) and not isinstance(made, torch.nn.Module):
        try:
            made = made()
        except Exception as error:
            raise TargetError(f"the factory failed: {type(error).__name__}: {error}", where=where, cure="it is called without arguments") from error
    cure = "return (module, example_inputs), or a module with an `example_inputs` method or attribute"
    if isinstance(made, tuple) and len(made) == 2 and callable(made[0]):
        call, inputs = made
    elif isinstance(made, torch.nn.Module) and hasattr(made, "example_inputs"):
        call, inputs = made, made.example_inputs
        inputs = inputs() if callable(inputs) else inputs
    else:
        raise TargetError(f"the factory gave {type(made).__name__}", where=where, cure=cure)
    if isinstance(inputs, dict):
        return Target(text, call, (), inputs)
    if isinstance(inputs, torch.Tensor):
        return Target(text, call, (inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return Target(text, call, tuple(inputs), {})
    raise TargetError(f"example_inputs is {type(inputs).__name__}", where=where, cure="make it a tuple, a dict of keyword arguments, or one tensor")


# ---------------------------------------------------------------- transformers


def _hugging_face(text, rest, attn, batch, length) -> Target:
    from .tiny import tiny_inputs, tiny_model  # transformers is an optional dependency

    name, *words = rest.split(":")
    model = tiny_model(name, _implementation(text, rest, attn))
    return Target(text, model, (), tiny_inputs(model, batch, length, "pad" in words))
