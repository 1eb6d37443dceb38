"""int8 weights in a model, in place. The schemes are those of ``options={"int8": ...}``; see compiler/ir/int8_linear.py for what they compute."""
from __future__ import annotations

import dataclasses
import inspect
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError, OptionError
from ..compiler.ir.heap import give_back
from ..compiler.ir.huge_pages import empty
from ..compiler.ir.int8_linear import dequantized, quantized
from ..compiler.ir.int8_scheme import Int8, matches
from .calibrate import input_maxima
from .int8_modules import Int8Embedding, Int8Linear
from .linears import check_plain
from .tables import choose_tables, is_finite

AT_ONCE = 1 << 20  # elements that are quantised at a time: what it needs beside the result stays below 20 MB
KEPT_BACK = 32 << 20  # bytes of float weights that the C library may have kept before they are given back: the int8 rows lie on pages of their own, so that the peak would have both
RELATIVE = 3  # SmolLM2: 4.8 % of the columns, perplexity +0.35 % (6: 3.3 %, +0.94 %; the threshold alone: 3.2 %, +2.1 %)


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """One weight: the module, [N, K], what became of it. error: |w - q scale| / |w| (Frobenius); sqnr_db: the same in dB; bytes with scales."""

    name: str
    shape: tuple[int, int]
    error: float
    bytes_before: int
    bytes_after: int
    note: str = ""

    @property
    def sqnr_db(self) -> float:
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """Layers that are int8 now, those left out with the reason, and the bytes of all parameters and buffers, each counted once."""

    scheme: Int8
    layers: list[QuantizedLayer]
    left_out: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"int8 {self.scheme.scheme}, {len(self.layers)} layers, {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB ({self.bytes_after / max(self.bytes_before, 1):.2f}x)", box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("layer")
        for heading in ("shape", "error", "SQNR dB", "bytes"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for x in self.layers:
            table.add_row(x.name, "x".join(map(str, x.shape)), f"{x.error:.3%}", f"{x.sqnr_db:.1f}", f"{x.bytes_before} -> {x.bytes_after}", x.note)
        for name, reason in self.left_out.items():
            table.add_row(name, "", "", "", "", reason)
        text = io.StringIO()
        Console(file=text, width=170).print(table)
        return text.getvalue()


def quantize_(model: nn.Module, scheme: str | dict = "weight_only", filter_fn: Callable[[nn.Module, str], bool] | None = None, *, group: int = 0, skip: Sequence[str] = (),
              lm_head: bool | None = None, threshold: float = 6.0, calibration=None, embedding: bool | None = None) -> QuantizeReport:
    """Replace linear layers by `Int8Linear` and large tables by `Int8Embedding`, in place. Everything is checked before anything is changed; on an error the model is as it was.

    model:     any module; its nn.Linear (and Hugging Face's Conv1D) are replaced, exact types only, one after the other, so that their float weights are freed on the way.
    scheme:    "weight_only", "dynamic", "llm_int8", or a dict as in options={"int8": ...}, to which the other arguments add.
    filter_fn: (module, name) -> bool, whether to replace it; in addition to skip and lm_head. Adapters (names with "lora_") are never replaced.
    group, skip, lm_head, threshold: see compiler/ir/int8_scheme.py.
    calibration: for llm_int8, batches (see convert/calibrate.py): the outlier columns are then those that reach the threshold on them, or RELATIVE times the
               median of their layer's columns (an absolute threshold means nothing behind a gate), the same for every call, so that a row's result does not
               depend on its batch. None: they are found anew in every call, by the threshold alone.
    embedding: tables, for memory alone. None: those tied to a layer that is replaced, and under weight_only without a filter_fn those of 2^20 numbers or more; True: all, and filter_fn is asked of those that are
               not tied; False: none.

    Weights that several layers share stay shared. An nn.Embedding tied to a layer that is replaced reads the same int8 rows. A table that cannot be replaced (max_norm, a subclass) stays, and the report says why. Biases and scales become buffers:
    there is nothing left to train in a replaced layer. Eager calls run on the op's definition; compile the model to be fast.
    Raises ConversionError, naming the layer: a weight that is no finite float16, bfloat16 or float32, groups that do not divide, K too large for int32 sums,
    hooks on a layer, nothing to replace; OptionError for wrong arguments, and for a name in skip that no module has.
    """
    settings = _settings(scheme, {"group": group, "skip": skip, "lm_head": lm_head, "threshold": threshold})
    _check_skip(model, settings)
    if calibration is not None and settings.scheme != "llm_int8":
        raise ConversionError(f"{settings.scheme} takes no calibration", cure="its scales come from the weights and, at each call, from the rows; smooth_ takes calibration")
    chosen, left_out = _choose(model, settings, filter_fn)
    for name, module in chosen.items():
        _check(name, module, settings)
    tables, stay = choose_tables(model, settings, embedding, filter_fn, chosen.values())
    left_out |= stay
    columns = {}
    if calibration is not None:
        for name, largest in input_maxima(model, chosen, calibration).items():  # equal ones are one tensor: what reads one x then fuses into one op
            found = largest >= min(settings.threshold, RELATIVE * largest.median().item() if math.isfinite(settings.threshold) else math.inf)
            columns[name] = next((c for c in columns.values() if c.device == found.device and torch.equal(c, found)), found)
    before, layers = _bytes(model), []
    uses = Counter(map(_key, (*chosen.values(), *tables.values())))
    shared, tied = {key: None for key, count in uses.items() if count > 1}, _embeddings(model, chosen)
    freed = 0
    for name in [*chosen, *tables]:
        module = chosen.pop(name, None) or tables.pop(name)
        layers.append(_replace_table(model, name, module, settings, shared) if isinstance(module, nn.Embedding) else _replace(model, name, module, settings, columns.get(name), shared, tied, embedding))
        freed += layers[-1].bytes_before
        del module  # the last reference to its float weight
        if freed >= KEPT_BACK:
            give_back()
            freed = 0
    give_back()
    return QuantizeReport(settings, layers, left_out, before, _bytes(model))


def _settings(scheme: str | dict, fields: dict) -> Int8:
    """The scheme with what was given beside it; what is said twice, and not alike, is refused."""
    if not isinstance(scheme, dict):
        return Int8.parse({**fields, "scheme": scheme}, "quantize_")
    given = {name: value for name, value in fields.items() if value != inspect.signature(quantize_).parameters[name].default}
    if twice := next((name for name in given if name in scheme and scheme[name] != given[name]), None):
        raise OptionError(f"{twice} is {scheme[twice]!r} in the scheme and {given[twice]!r} beside it", where="quantize_", cure="say it once")
    return Int8.parse({**given, **scheme}, "quantize_")


def _check_skip(model: nn.Module, settings: Int8) -> None:
    """A misspelt name must not quantise the layer that was to be left alone."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in settings.skip:
        if not any(matches(name, pattern) for name in names):
            near = get_close_matches(pattern, {part for name in names for part in (name, name.rpartition(".")[2])}, n=1)
            raise OptionError(f"skip names {pattern!r}, and the model has no such module", where="quantize_", cure=f"did you mean {near[0]!r}?" if near else f"its modules are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")


def _key(module: nn.Module) -> tuple:
    return id(module.weight), type(module)


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight as [N, K] of a module that is x w^T + b and nothing else; None for others."""
    if type(module) is nn.Linear:
        return module.weight
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2:
        return module.weight.T
    return None


def _choose(model: nn.Module, settings: Int8, filter_fn) -> tuple[dict[str, nn.Module], dict[str, str]]:
    chosen, left_out = {}, {}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():  # a module that stands in two places is listed, and replaced, in the first; the others follow in _replace
        if _matrix(module) is None:
            left_out |= _matrices_left(name, module)
        elif "lora_" in name:
            left_out[name] = "an adapter"
        elif (reason := settings.left_out(name, id(module.weight) in heads)) is not None:
            left_out[name] = reason
        elif filter_fn is not None and not filter_fn(module, name):
            left_out[name] = "left out by filter_fn"
        else:
            chosen[name] = module
    if not chosen and any(isinstance(m, Int8Linear) for m in model.modules()):
        raise ConversionError(f"{type(model).__name__} has no linear layer to quantise: those that it has are int8 already", cure="quantize_ a float model, once")
    if not chosen:
        raise ConversionError(f"{type(model).__name__} has no linear layer to quantise", cure="it needs nn.Linear modules" + ("; all of them are left out: " + ", ".join([*left_out][:4]) if left_out else ""))
    if "" in chosen:
        raise ConversionError("the model is a single nn.Linear, which cannot be replaced in place", cure="put it into a module, nn.Sequential(linear)")
    return chosen, left_out


def _matrices_left(name: str, module: nn.Module) -> dict[str, str]:
    """Float matrices of a module that is no linear layer, and no table: {their name: why they stay}. Experts in one tensor, or attention that multiplies by its own weights, may be most of a model."""
    found = {}
    if isinstance(module, nn.Embedding):
        return found
    for own, parameter in module._parameters.items():
        if parameter is not None and sum(n > 1 for n in parameter.shape) >= 2 and parameter.is_floating_point():
            kind = type(module).__name__
            why = "which its nn.MultiheadAttention multiplies by itself" if kind == "NonDynamicallyQuantizableLinear" else "a subclass of nn.Linear, whose forward may be another" if isinstance(module, nn.Linear) else "which is no nn.Linear"
            found[f"{name}.{own}" if name else own] = f"a parameter {[*parameter.shape]} of a {kind}, {why}"
    return found


def _check(name: str, module: nn.Module, settings: Int8) -> None:
    check_plain(name, module)
    weight = _matrix(module)
    if (problem := settings.problem(weight.shape[1], weight.dtype)) is not None:
        raise ConversionError(problem[0], where=name, cure=problem[1])
    if not (is_finite(weight) and (module.bias is None or is_finite(module.bias))):
        raise ConversionError("its weight or bias has inf or NaN", where=name, cure="leave it out with skip or filter_fn")
    check_unhooked(name, module)


def check_unhooked(name: str, module: nn.Module) -> None:
    """Refuse a module with hooks (weight_norm, pruning, accelerate set them): what takes its place would not have them. Raises ConversionError."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ConversionError("it has hooks, which its replacement would not have", where=name, cure="remove them, quantise, and set them again")


def _embeddings(model: nn.Module, chosen) -> dict[int, list[tuple[str, nn.Module]]]:
    """id of a weight -> embeddings that share it with a chosen layer."""
    wanted, found = {id(m.weight) for m in chosen.values()}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in wanted:
            found.setdefault(id(module.weight), []).append((name, module))
    return found


def _rows(module, matrix: Tensor, settings: Int8, shared: dict) -> tuple[Tensor, Tensor, float, bool]:
    """(q, scale, error, whether it is the first module with this weight)"""
    key = _key(module)
    is_first = shared.get(key) is None
    made = _quantise(matrix.detach(), settings.group) if is_first else shared[key][0]
    if key in shared:
        shared[key] = made, module.weight  # the weight too, so that no other gets its id
    return *made, is_first


def _row(name: str, weight: Tensor, q: Tensor, scale: Tensor, error: float, is_first: bool, notes: list[str]) -> QuantizedLayer:
    sizes = (weight.numel() * weight.element_size(), q.numel() + 4 * scale.numel()) if is_first else (0, 0)
    return QuantizedLayer(name, tuple(q.shape), error, *sizes, "; ".join(notes))


def _replace_table(model, name: str, table: nn.Embedding, settings: Int8, shared: dict) -> QuantizedLayer:
    q, scale, error, is_first = _rows(table, table.weight, settings, shared)
    _put(model, table, Int8Embedding(q, scale, table.weight.dtype, table.padding_idx, error).train(table.training))
    return _row(name, table.weight, q, scale, error, is_first, ["a table" if is_first else "shares the int8 rows of another table"])


def _replace(model, name, module, settings, columns, shared, tied, embedding) -> QuantizedLayer:
    weight = module.weight
    q, scale, error, is_first = _rows(module, _matrix(module), settings, shared)
    bias = module.bias.detach() if module.bias is not None else None
    threshold = settings.threshold if settings.activation == "mixed" else math.inf
    new = Int8Linear(q, scale, bias, settings.activation, threshold, columns, weight.dtype, error)
    _put(model, module, new.train(module.training))
    notes = [] if is_first else ["shares the int8 rows of another layer"]
    for where, table in tied.pop(id(weight), []):
        if (asked := "left out by embedding=False" if embedding is False else settings.left_out(where)) is not None:
            notes.append(f"{where}, which was tied to it, keeps its float weight: {asked}")
        elif type(table) is nn.Embedding and table.max_norm is None and _matrix(module) is weight:
            _put(model, table, Int8Embedding(q, scale, weight.dtype, table.padding_idx, error).train(table.training))
            notes.append(f"{where} reads the same int8 rows")
        else:
            notes.append(f"{where}, a {type(table).__name__} that was tied to it, keeps its float weight")
    if columns is not None:
        notes.append(f"{int(columns.sum())} outlier columns")
    return _row(name, weight, q, scale, error, is_first, notes)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """new wherever old is a child."""
    for parent in [*model.modules()]:
        for child, module in [*parent._modules.items()]:
            if module is old:
                parent._modules[child] = new


def _quantise(weight: Tensor, group: int) -> tuple[Tensor, Tensor, float]:
    """(q, scale, relative error), by blocks of rows."""
    n, k = weight.shape
    q = empty((n, k), torch.int8, weight.device)
    scale = torch.empty((n, k // group if group else 1), device=weight.device)
    lost = total = 0.0
    for first in range(0, n, max(1, AT_ONCE // max(k, 1))):
        rows = slice(first, first + max(1, AT_ONCE // max(k, 1)))
        q[rows], scale[rows] = quantized(weight[rows], group)
        exact = weight[rows].float()
        lost += (exact - dequantized(q[rows], scale[rows], torch.float32)).square().sum(dtype=torch.float64).item()
        total += exact.square().sum(dtype=torch.float64).item()
    return q, scale, math.sqrt(lost / total) if total else 0.0


def _bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(sizes.values())
