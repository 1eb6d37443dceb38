"""Small reference models: one file an architecture, spelled out the way code bases write it.

They import torch alone. Every module has
  Config                          a dataclass; its fields are what `build` takes
  build(**overrides)              -> nn.Module: tiny, eval mode, the same weights every time (the caller's random state is left alone)
  example_inputs(batch, length)   -> a tuple of tensors to call it with
  CAUSAL_INPUT                    which of those inputs is a token stream [B, T] read left to right (None: the model looks both ways)
  VARIANTS                        {label: overrides}: other settings worth running

    >>> from tileweld import models
    >>> module = models.load("llama_gqa")
    >>> logits = module.build(layers=1)(*module.example_inputs(batch=2, length=16))      # [2, 16, 256]
"""
import importlib
from pathlib import Path
from types import ModuleType


class UnknownModel(KeyError):
    """No file of that name in this folder; the message lists what there is."""

    def __str__(self) -> str:       # KeyError would print the repr, quotes and all
        return self.args[0]


def available() -> list[str]:
    """Names that `load` takes, sorted: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of the model called `name`, imported on demand. Raises UnknownModel (a KeyError) for a name not in `available()`."""
    if name not in available():
        raise UnknownModel(f"there is no model {name!r} in tileweld.models; use one of: {', '.join(available())}")
    return importlib.import_module(f".{name}", __name__)
