"""The names of a generated function: of its variables, and of the objects that its text cannot spell."""
from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from torch.fx import Node

from .spelling import identifier, literal


class Vocabulary:
    """objects: what the text names, by name; a name is given once, and none of ``reserved`` is."""

    def __init__(self, reserved: Sequence[str]):
        self.taken = set(reserved)
        self.objects: dict[str, object] = {}

    def _packer(self, count: int) -> str:
        """What packs this many pointers."""
        name = f"pointers_{count}"
        if name not in self.objects:
            self.objects[name] = struct.Struct(f"{count}P").pack
            self.taken.add(name)
        return name

    def _written(self, x, name: Callable[[Node], str]) -> str:
        if isinstance(x, Node):
            return name(x)
        if isinstance(x, (list, tuple)):
            inner = ", ".join(self._written(y, name) for y in x)
            return f"[{inner}]" if isinstance(x, list) else f"({inner}{',' if len(x) == 1 else ''})"
        if isinstance(x, slice):
            return f"slice({', '.join(self._written(y, name) for y in (x.start, x.stop, x.step))})"
        made = literal(x)
        return made if made is not None else self._object("constant", x)

    def _object(self, name: str, x) -> str:
        for known, other in self.objects.items():
            if other is x and x is not None:
                return known
        name = self._name(name)
        self.objects[name] = x
        return name

    def _name(self, text: str) -> str:
        name = base = identifier(text)
        number = 1
        while name in self.taken:
            name, number = f"{base}_{number}", number + 1
        self.taken.add(name)
        return name
