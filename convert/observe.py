"""Run a model to see what its attention modules are given: inputs made or checked, hooks that are always taken off again."""
from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from .probe import Call
from .sites import Site


class Stop(Exception):
    """Raised by a hook when nothing later in the model is of interest (the output layer makes logits of 49,152 numbers a token)."""


@dataclass(frozen=True)
class Inputs:
    """A call of the model: args and kwargs, with the batch in dim 0 of every tensor. tokens: how many; keep [B, T] bool or None: which are no padding."""

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] | None = None
    tokens: int = 0
    keep: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return replace(self, args=tuple(map(change, self.args)), kwargs={n: change(x) for n, x in (self.kwargs or {}).items()})


def embedding_of(model: nn.Module) -> tuple[str, nn.Embedding]:
    """(name, the token embedding): what get_input_embeddings says, else the first one."""
    try:
        chosen = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        chosen = None
    for name, module in model.named_modules():
        if module is chosen or (chosen is None and isinstance(module, nn.Embedding)):
            return name, module
    raise ConversionError(f"{type(model).__name__} has no token embedding to feed", cure="convert the whole model, not a part of it")


def random_inputs(model: nn.Module) -> Inputs:
    """Two rows of 12 random tokens, the same ones every time."""
    embedding = embedding_of(model)[1]
    tokens = torch.randint(embedding.num_embeddings, (2, 12), generator=torch.Generator().manual_seed(0))
    return Inputs((tokens.to(embedding.weight.device),), tokens=tokens.numel())


def calibration_inputs(model: nn.Module, calibration: Tensor | Mapping[str, Tensor]) -> Inputs:
    """Checked against the token embedding. Raises ConversionError that names it."""
    if isinstance(calibration, Tensor):
        _check_tokens(model, calibration)
        return Inputs((calibration,), tokens=calibration.numel())
    if not isinstance(calibration, Mapping) or not calibration or not all(isinstance(x, Tensor) for x in calibration.values()):
        raise ConversionError(f"calibration is a {type(calibration).__name__}", cure="pass tokens [B, T] int64, or the model's keyword arguments as a dict of tensors")
    if len({x.shape[:1] for x in calibration.values()}) > 1:
        raise ConversionError("calibration has tensors of different batch sizes: " + ", ".join(f"{n} {[*x.shape]}" for n, x in calibration.items()))
    where, embedding = embedding_of(model)
    if away := next((n for n, x in calibration.items() if x.device != embedding.weight.device), None):
        raise ConversionError(f"calibration's {away} is on {calibration[away].device}, the embedding on {embedding.weight.device}", where=where,
                              cure=f"move every tensor with .to({str(embedding.weight.device)!r})")
    if "input_ids" in calibration:
        _check_tokens(model, calibration["input_ids"])
    mask = calibration.get("attention_mask")
    main = calibration.get("input_ids", next(iter(calibration.values())))
    if mask is not None and mask.ndim == 2 and mask.shape != main.shape[:2]:
        raise ConversionError(f"calibration's attention_mask has shape {[*mask.shape]}, expected {[*main.shape[:2]]}, True or 1 where a token is no padding", where=where)
    keep = mask.bool() if mask is not None and mask.ndim == 2 else None
    return Inputs(kwargs=calibration, keep=keep, tokens=int(keep.sum()) if keep is not None else main.shape[0] * main.shape[1])


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    where, embedding = embedding_of(model)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ConversionError(f"calibration tokens are {tokens.dtype}, expected torch.int64", where=where)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ConversionError(f"calibration tokens have shape {[*tokens.shape]}, expected [B, T] with T of at least 2", where=where)
    if tokens.device != embedding.weight.device:
        raise ConversionError(f"calibration tokens are on {tokens.device}, the embedding on {embedding.weight.device}", where=where, cure=f"calibration.to({str(embedding.weight.device)!r})")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= embedding.num_embeddings:
        raise ConversionError(f"calibration tokens lie in {low}..{high}, the embedding has {embedding.num_embeddings} rows", where=where)


def run(model: nn.Module, inputs: Inputs) -> None:
    """Call the model, without a KV cache where it has a say in that. A `Stop` from a hook ends it."""
    takes = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in takes else {}
    with contextlib.suppress(Stop):
        model(*inputs.args, **(inputs.kwargs or {}), **extra)


def run_once(model: nn.Module, inputs: Inputs) -> None:
    """`run`; a failure becomes a ConversionError that says what the model was called with."""
    try:
        run(model, inputs)
    except Exception as error:
        raise ConversionError(f"the model does not run on {', '.join(str([*x.shape]) for x in (*inputs.args, *(inputs.kwargs or {}).values()))}: {error}",
                              cure="pass calibration as a dict of the model's keyword arguments") from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout meanwhile; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def hooked() -> Iterator[Callable]:
    """keep(handle) for every hook set inside; all are taken off at the end, whatever happens."""
    handles: list = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def probe_calls(model: nn.Module, sites: list[Site], inputs: Inputs, cross: dict[str, str] | None = None) -> dict[str, Call]:
    """site's name -> what it is called with, in order of execution. Refuses a module or projection that does not run exactly once a forward. Cross attention
    is refused too, or, where `cross` is given, left out and named there."""
    calls: dict[str, Call] = {}
    counts: Counter = Counter()
    seen: dict[str, Tensor] = {}

    with hooked() as keep:
        for site in sites:
            def at_module(module, args, kwargs, name=site.name):
                counts[name] += 1
                calls[name] = Call(args, kwargs, torch.empty(0))

            def at_child(module, args, name=site.name, child=""):
                counts[f"{name}.{child}"] += 1
                seen[f"{name}.{child}"] = args[0]

            keep(site.module.register_forward_pre_hook(at_module, with_kwargs=True))
            for child in site.children:
                keep(site.linear(child).register_forward_pre_hook(lambda m, a, f=at_child, n=site.name, c=child: f(m, a, n, c)))
        run_once(model, inputs)
    for site in sites:
        for name in (site.name, *(f"{site.name}.{child}" for child in site.children)):
            if counts[name] != 1:
                raise ConversionError(f"it runs {counts[name]} times in one forward, expected once" + (": its calls have different roles" if counts[name] > 1 else ""), where=name)
        if len({id(seen[f"{site.name}.{r.child}"]) for r in (site.q, site.k, site.v)}) > 1 and not _equal(*(seen[f"{site.name}.{r.child}"] for r in (site.q, site.k, site.v))):
            if cross is None:
                raise ConversionError("queries, keys and values are made from different inputs: cross attention", where=site.name, cure="only self attention is converted")
            cross[f"{site.name}.{site.output}"] = "cross attention: queries, keys and values are made from different inputs"
            del calls[site.name]
    return {name: replace(call, x=seen[f"{name}.{next(s for s in sites if s.name == name).k.child}"]) for name, call in calls.items()}


def _equal(*tensors: Tensor) -> bool:
    return all(torch.equal(tensors[0], x) for x in tensors[1:])
