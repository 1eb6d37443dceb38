"""Run generated Triton modules on CPU tensors, in Triton's interpreter: for checking numerics, never for speed.

Triton decides when a function is decorated whether to compile or to interpret it, and its own library (tl.max, tl.sum, tl.cdiv)
was decorated when triton was imported. So a module is imported with interpretation on, and while one of its functions runs,
the library's compiled functions are replaced by interpreted ones. Works in a process that compiles kernels as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from types import ModuleType

import numpy as np

from .source_module import load_python_source

_lock = threading.RLock()  # the interpreter patches triton.language for the time of a run


def load_interpreted(name: str, source: str) -> ModuleType:
    """The module that `source` defines, with its @triton.jit functions interpreted. Call its host functions in `interpreting()`."""
    with interpreting():
        return load_python_source(f"{name}_interpreted", source)


@contextlib.contextmanager
def interpreting():
    """Triton interprets what is decorated or called inside."""
    import triton
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    runtime = triton.knobs.runtime
    with _lock, runtime.scope(), contextlib.ExitStack() as stack, np.errstate(all="ignore"):
        stack.callback(_restore, _snapshot(triton.language))
        runtime.interpret = True
        for module in (triton.language, triton.language.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, _interpreted(interpreter.InterpretedFunction, value.fn))
        patch_tensor = interpreter._patch_lang_tensor

        def patch_tensor_and_index(tensor, scope):
            patch_tensor(tensor, scope)
            # triton 3.6 takes int() of an array of one element, which numpy 2.4 refuses
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_tensor_and_index
        stack.callback(setattr, interpreter, "_patch_lang_tensor", patch_tensor)
        builder = interpreter.interpreter_builder
        stack.callback(setattr, builder, "options", builder.options)
        builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)  # assertions act in debug mode alone
        yield


def _snapshot(language) -> list[tuple[object, dict]]:
    """What the interpreter patches: modules of triton.language and the classes in them, each with its attributes.

    It restores triton.language itself, but not what a nested call patches: triton.language.core, through tl.max for one. A
    kernel compiled afterwards would meet the interpreter's functions.
    """
    modules = [language, language.core, language.math, language.standard]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type) and value.__module__.startswith("triton.language")}
    return [(owner, dict(vars(owner))) for owner in [*modules, *classes]]


def _restore(snapshot) -> None:
    for owner, attributes in snapshot:
        for name, value in list(vars(owner).items()):
            if name not in attributes:
                if isinstance(owner, type):  # names new in a module are what its rewritten functions read, once for all
                    delattr(owner, name)
            elif value is not attributes[name]:
                setattr(owner, name, attributes[name])


@functools.lru_cache(None)
def _interpreted(make, function):
    return make(function)


def interpreted_entry(name: str, source: str, entry: str):
    """``entry`` of a generated module as a function of (tensors, ints, floats) on CPU tensors."""
    function = getattr(load_interpreted(name, source), entry)

    def run(tensors, ints=(), floats=()):
        with interpreting():
            function(list(tensors), list(ints), list(floats))

    return run
