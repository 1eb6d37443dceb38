"""Every error tileweld raises: what went wrong, where, and the cure, in one line.

    CompilerNotFound: g++ is not on PATH (model.py:41); install it or pass options={"target": "reference"}

This module imports nothing from the package, so that every stage may import it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_STDERR_LINES = 40  # g++ prints template notes by the hundred; the first error and its context fit in these


class TileweldError(Exception):
    """Base of all tileweld errors.

    what:  the fault, without a full stop.
    where: the user's source line ("model.py:41"), a file, an option's name; None where there is no such place.
    cure:  what the reader can do about it; None where nothing can be said.
    """

    def __init__(self, what: str, *, where: str | None = None, cure: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = where
        self.cure = cure

    def __str__(self) -> str:
        line = f"{type(self).__name__}: {self.what}"
        if self.where:
            line += f" ({self.where})"
        if self.cure:
            line += f"; {self.cure}"
        return line

    def __reduce__(self):
        # The default calls cls(*args), which subclasses with other arguments reject: process pools could not return them.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[TileweldError], args: tuple, state: dict) -> TileweldError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class OptionError(TileweldError, ValueError):
    """An unknown option, or a value that the option does not take. Lists what exists."""

    @classmethod
    def unknown(cls, kind: str, got: object, choices: Iterable[object], *, where: str | None = None) -> OptionError:
        """`kind` names what was given ("option", "target"); `got` is no member of `choices`, which the cure lists."""
        names = [str(choice) for choice in choices]
        near = get_close_matches(str(got), names, n=1)
        cure = (f"did you mean {near[0]!r}? " if near else "") + f"choose from: {', '.join(names)}"
        return cls(f"unknown {kind} {got!r}", where=where, cure=cure)


class CompilerNotFound(TileweldError):
    """No C++ compiler on this machine. The backend warns and uses the reference target."""


class BuildError(TileweldError):
    """A compiler ran on a generated source and failed, or its result could not be loaded.

    stderr:      the first lines of the compiler's messages, printed below the one-line message.
    source_path: the generated source, kept for reading.
    """

    def __init__(self, what: str, *, stderr: str = "", source_path: str | None = None, where: str | None = None,
                 cure: str | None = None):
        super().__init__(what, where=where or source_path, cure=cure)
        lines = stderr.strip().splitlines()
        if len(lines) > _STDERR_LINES:
            lines = [*lines[:_STDERR_LINES], f"... {len(lines) - _STDERR_LINES} more lines"]
        self.stderr = "\n".join(lines)
        self.source_path = source_path

    def __str__(self) -> str:
        return super().__str__() + (f"\n{self.stderr}" if self.stderr else "")


class CacheError(TileweldError):
    """The kernel cache cannot be used: the folder belongs to somebody else, others may write to it, the disk is full."""


class UnsupportedError(TileweldError):
    """The request has a meaning, but this target has no kernel for it (a dtype, a head dim, a device)."""


class DegradedError(TileweldError):
    """With options={"strict": True}: a function that Dynamo gives up at its recompile limit. Without strict a `DegradedWarning`."""


class RefusalError(TileweldError):
    """With options={"strict": True}: a rewrite was refused. `rewrite` is its stem, `what` the reason."""

    def __init__(self, what: str, *, rewrite: str | None = None, where: str | None = None, cure: str | None = None):
        super().__init__(what, where=where, cure=cure)
        self.rewrite = rewrite


class ConversionError(TileweldError, ValueError):
    """tileweld.convert cannot rewrite this model, or not with these arguments. `where` is the layer; the model is as it was."""


class ScalarSyntaxError(TileweldError):
    """Text that is no expression of the scalar language. `position` counts characters of `text` from 0."""

    def __init__(self, what: str, *, text: str = "", position: int | None = None, cure: str | None = None):
        where = repr(text)
        if position is not None:
            found = repr(text[position]) if position < len(text) else "the end"
            where = f"at {found}, position {position} of {text!r}"
        super().__init__(what, where=where, cure=cure)
        self.text = text
        self.position = position
