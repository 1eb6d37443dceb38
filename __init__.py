"""tileweld: a graph compiler and operator-fusion toolkit for transformer models in PyTorch.

`torch.compile(model, backend="tileweld")` needs no import of this package: an entry point registers the backend.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it. Loaded on first use, so that `import tileweld` costs no import of torch.
_LAZY = {
    "explain": ".compiler.explain",
    "Report": ".compiler.report",
    "DegradedWarning": ".compiler.degrade",
    "refold": ".compiler.folded",
    "Int8KV": ".runtime.kv_cache",
    "Int8Cache": ".runtime.int8_cache",
}

_PACKAGES = ("convert",)  # subpackages for users, reached as attributes without importing them first

__all__ = ["__version__", *_LAZY, *_PACKAGES]


def __getattr__(name: str):
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module 'tileweld' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
