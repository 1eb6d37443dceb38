"""All or nothing: what a conversion writes is taken back if anything fails."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def taken_back(owners: Iterable[object], linears: Iterable[nn.Module]) -> Iterator[None]:
    """On an error inside, the counts that `owners` (modules, configs) keep, and parameters and sizes of `linears`, are as they were; it goes on."""
    linears = [*linears]
    counts = [(owner, name, value) for owner in (*owners, *linears) for name, value in list(vars(owner).items()) if type(value) in (int, list, tuple, type(None))]
    tensors = [(linear, linear.weight, linear.bias) for linear in linears]
    try:
        yield
    except BaseException:
        for linear, weight, bias in tensors:
            linear.weight, linear.bias = weight, bias
        for owner, name, value in counts:
            setattr(owner, name, value)
        raise


def configs_of(model: nn.Module, names: Iterable[str]) -> list[object]:
    """The configs of the modules of these names and of everything they are part of, each once."""
    wanted = {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(len(parts) + 1)}
    found = [getattr(module, "config", None) for name, module in model.named_modules() if name in wanted]
    return [*{id(config): config for config in found if config is not None and hasattr(config, "__dict__")}.values()]
