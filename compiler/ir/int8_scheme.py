"""What int8 is asked for: the value of ``options={"int8": ...}`` and the arguments of ``convert.quantize_``, checked. Needs no torch: the command line reads options first."""
from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    import torch

#: scheme -> activation of `tileweld::int8_linear`
SCHEMES = {"weight_only": "float", "dynamic": "int8", "llm_int8": "mixed"}
DTYPES = ("float32", "float16", "bfloat16")
HEADS = ("lm_head", "embed_out", "output_projection")  # what models call the projection to the vocabulary


@dataclasses.dataclass(frozen=True)
class Int8:
    """A scheme and where it applies.

    group:     columns that share a scale, 0 for the whole row; for weight_only alone.
    skip:      names of modules that stay as they are, with all that is in them: "model.layers.0.mlp.down_proj", its last parts ("down_proj", "layers.0"),
               or a pattern ("model.layers.0.*") of either.
    lm_head:   quantise the projection to the vocabulary. None: for weight_only, where its error is that of any other layer and decoding reads it
               whole for every token; not for the other two, whose rounding of its input reaches every logit directly.
    threshold: of llm_int8, the magnitude that makes a column an outlier.
    force:     keep int8 also where the float product was timed to be faster: less memory.
    """

    scheme: str
    group: int = 0
    skip: tuple[str, ...] = ()
    lm_head: bool | None = None
    threshold: float = 6.0
    force: bool = False

    @classmethod
    def parse(cls, given, where: str = "options['int8']") -> Int8 | None:
        """A scheme's name, or a dict with it and further fields; None stays None. Raises OptionError."""
        if given is None or isinstance(given, Int8):
            return given
        if not isinstance(given, (str, Mapping)):
            raise OptionError(f"int8 is {given!r}", where=where, cure=f"a scheme ({', '.join(SCHEMES)}), or a dict with 'scheme' and further fields")
        given = {"scheme": given} if isinstance(given, str) else dict(given)
        names = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in names:
                raise OptionError.unknown("field of int8", key, names, where=where)
        if given.get("scheme") not in [*SCHEMES]:  # a list, which has no hash, is no scheme either
            raise OptionError.unknown("int8 scheme", given.get("scheme"), SCHEMES, where=where)
        skip = given.get("skip", ())
        checks = {"group": lambda v: type(v) is int and v >= 0, "skip": lambda v: isinstance(v, (list, tuple)) and all(isinstance(s, str) for s in v), "lm_head": lambda v: v is None or isinstance(v, bool),
                  "threshold": lambda v: type(v) in (int, float) and v >= 0, "force": lambda v: isinstance(v, bool)}
        expected = {"group": "0 for rows, or columns that share a scale (64, 128)", "skip": "a list of module names", "lm_head": "True, False or None", "threshold": "a number of at least 0", "force": "True or False"}
        for key, check in checks.items():
            if key in given and not check(given[key]):
                raise OptionError(f"int8 field {key!r} is {given[key]!r}", where=where, cure=f"expected {expected[key]}")
        made = cls(**given | {"skip": tuple(skip), "threshold": float(given.get("threshold", 6.0))})
        if made.group and made.scheme != "weight_only":
            raise OptionError(f"groups of {made.group} with {made.scheme}", where=where, cure="an int32 sum has one scale a row: leave group at 0, or take weight_only")
        if made.threshold != cls.threshold and made.scheme != "llm_int8":
            raise OptionError(f"a threshold of {made.threshold:g} with {made.scheme}", where=where, cure="outliers belong to llm_int8: leave it out, or take that scheme")
        return made

    @property
    def activation(self) -> str:
        """As `tileweld::int8_linear` calls it."""
        return SCHEMES[self.scheme]

    @property
    def takes_head(self) -> bool:
        return self.lm_head if self.lm_head is not None else self.scheme == "weight_only"

    def left_out(self, name: str, is_head: bool = False) -> str | None:
        """Why the module of this name stays as it is by what was asked for; None if it does not."""
        if named := next((pattern for pattern in self.skip if matches(name, pattern)), None):
            return f"left out by skip={named!r}"
        if (is_head or name.rpartition(".")[2] in HEADS) and not self.takes_head:
            return f"the projection to the vocabulary is left out of {self.scheme} (lm_head=True takes it in)"
        return None

    def problem(self, columns: int, dtype: torch.dtype) -> tuple[str, str] | None:
        """(reason, cure) why a weight [N, columns] of dtype cannot be quantised, None if it can."""
        from .int8_linear import limit_of

        if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
            return f"its weight is {name}, expected {DTYPES[0]}, {DTYPES[1]} or {DTYPES[2]}", "convert the model first, model.float()"
        if self.group and columns % self.group:
            return f"groups of {self.group} do not divide its {columns} columns", f"leave it out with skip, or choose a group that divides {columns}, or 0"
        if columns > limit_of(self.activation):
            return f"{columns} columns overflow sums in int32, at most {limit_of(self.activation)}", "take weight_only for it"
        return None


def matches(name: str, pattern: str) -> bool:
    """Whether an entry of `skip` means the module of this name, or one that it is in: by its name, the last parts of that, or a pattern of either."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[first:end]), pattern) for end in range(1, len(parts) + 1) for first in range(end))
