"""Generated Python source (Triton kernels) to an imported module."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from ..compiler.errors import BuildError, OptionError
from . import cache

_lock = threading.RLock()


class _Loader(SourceFileLoader):
    """Compiles the text that was asked for, never a .pyc: those carry no hash, and one would stay if the source were repaired."""

    def __init__(self, fullname: str, path: Path, source: str):
        super().__init__(fullname, str(path))
        self._source = source

    def get_code(self, fullname: str):
        return self.source_to_code(self._source.encode(), self.path)


def load_python_source(name: str, source: str) -> ModuleType:
    """The module that `source` defines; the same object for the same name and source.

    It lies in the cache as a file (mode 0600), because Triton reads a kernel's text back with inspect.getsource.
    name: a Python identifier, part of the module's name. Raises BuildError if the source cannot be imported.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise OptionError(f"{name!r} is no name for a module", cure="use a Python identifier")
    key = cache.entry_key("python", source, name=name)
    full_name = f"tileweld_generated.{name}_{key[:16]}"

    def produce(scratch: Path) -> Path:
        made = scratch / f"{name}.py"
        made.write_bytes(source.encode())
        return made

    with _lock:
        path = cache.fetch(key, ".py", produce, name=name)
        known = sys.modules.get(full_name)
        if known is not None and known.__file__ == str(path):
            return known
        spec = importlib.util.spec_from_file_location(full_name, path, loader=_Loader(full_name, path, source))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module  # dataclasses and pickle look a class's module up by name
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[full_name]
            if not isinstance(error, Exception):
                raise
            raise BuildError(f"generated module {name} does not import: {type(error).__name__}: {error}",
                             source_path=str(path)) from error
    return module
