"""The options of ``torch.compile(model, backend="tileweld", options={...})``: one table, from which docs/options.md is made."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from .errors import OptionError
from .ir.int8_scheme import Int8

TARGETS = ("auto", "triton", "cpp", "reference")


@dataclasses.dataclass(frozen=True)
class Option:
    """A row of the table: default, what a value may be (in words), what it does, and the check."""

    default: object
    values: str
    meaning: str
    check: Callable[[object], bool]


def _passes_ok(value) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, bool) for k, v in value.items())


TABLE: dict[str, Option] = {
    "target": Option("auto", " | ".join(TARGETS), "what kernels are generated for; auto: triton on a GPU, cpp on a CPU, reference for dtypes without a kernel", lambda v: v in TARGETS),
    "verify": Option(False, "True | False", "replay every rewrite in float64 on random inputs at compile time and refuse what differs", lambda v: isinstance(v, bool)),
    "strict": Option(False, "True | False", "raise RefusalError where a rewrite is refused, UnsupportedError where a fused op has no kernel, BuildError where a kernel cannot be built, DegradedError at Dynamo's recompile limit", lambda v: isinstance(v, bool)),
    "fold_weights": Option(True, "True | False", "in inference, keep what depends on weights alone between calls, and compute it again when they change; False: compute it at every call", lambda v: isinstance(v, bool)),
    "passes": Option({}, "{pass name: True | False}", "turn passes on or off by name", _passes_ok),
    "int8": Option(None, "weight_only | dynamic | llm_int8 | {'scheme': ..., 'group': 0, 'skip': [], 'lm_head': None, 'threshold': 6.0, 'force': False}", "in inference, run matrix products with weights of int8; see int8.md", lambda v: v is None or bool(Int8.parse(v))),
    "expanded_kv": Option(1 << 30, "int", "bytes that the keys and values of one attention may have where a constant makes them from something smaller (multi-head latent attention, naive): above it they are made in chunks, merged by log-sum-exp", lambda v: type(v) is int and v >= 1),
    "gqa": Option(None, "int", "in inference, merge the KV heads of every attention into so many: lossy, opt-in, the residual is in the report; see accuracy.md", lambda v: v is None or type(v) is int and v >= 1),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    target: str = "auto"
    verify: bool = False
    strict: bool = False
    fold_weights: bool = True
    passes: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    expanded_kv: int = 1 << 30
    gqa: int | None = None
    int8: Int8 | None = None

    @classmethod
    def parse(cls, given: Mapping | None, pass_names: tuple[str, ...] = ()) -> Options:
        """Check a user's dict; an unknown key or value raises OptionError with the list of what exists."""
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise OptionError(f"options must be a dict, not {type(given).__name__}", where='torch.compile(backend="tileweld")', cure=f"the keys are {', '.join(TABLE)}")
        for key, value in given.items():
            if key not in TABLE:
                raise OptionError.unknown("option", key, TABLE, where='torch.compile(backend="tileweld")')
            if not TABLE[key].check(value):
                raise OptionError(f"option {key!r} has the value {value!r}", where='torch.compile(backend="tileweld")', cure=f"choose from: {TABLE[key].values}")
        for name in given.get("passes", {}):
            if name not in pass_names:
                raise OptionError.unknown("pass", name, pass_names, where="options['passes']")
        return cls(**{**given, "int8": Int8.parse(given.get("int8"))})
