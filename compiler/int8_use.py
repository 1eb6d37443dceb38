"""A row of the report for every weight that was to be int8 (int8_choice.py); apart, since executables from disk have rows too and import no compiler."""
from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Int8Use:
    """A weight that was to be int8: its module, [N, K], the activations ("float", "int8", "mixed"), what it runs in and why, |w - q scale| / |w| (None: it came as
    int8, or its values are not known), its bytes as floats and with scales as int8, the number of the graph."""

    name: str
    shape: tuple[int, int]
    activation: str
    kept: bool
    reason: str
    error: float | None
    bytes_before: int
    bytes_after: int
    graph: int

    @property
    def sqnr_db(self) -> float | None:
        return None if self.error is None else math.inf if self.error == 0 else -20 * math.log10(self.error)
