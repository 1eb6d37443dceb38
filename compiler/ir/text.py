"""The noun between codegen and what runs: the text of an executable, with the objects that it names."""
from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Text:
    """source: defines ``graph`` (boxed: it takes a list and clears it) and, if there is an arena, ``sizes`` and ``prepare``.

    objects: what the source names besides torch and the helpers (`take`, `give`, `restride`, `pointers`, `integers`, `floats`).
    lives: first and last line of each buffer of the arena, None if nothing is prepared; arena, naive: bytes, with places reused and with each buffer freed behind its
    last reader (None where a size is symbolic).
    """

    source: str
    objects: dict[str, object]
    lives: list[tuple[int, int]] | None
    device: torch.device | None
    arena: int | None = None
    naive: int | None = None
