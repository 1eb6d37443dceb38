"""Which linear layers feed which, seen while a model runs: where its MLPs and attentions are, whatever its modules are called and however they are nested.

Every tensor that comes out of a linear layer is followed through the operations behind it, until linear layers read it. Kept of a tensor:

    channels   column c of it is a function of row start + step c of these linear layers, element by element, and of numbers; None where it is not
    nearest    the linear layers it comes from, by any way
    scores     (queries, keys): the two sides of a product of such; through a softmax it becomes an attention

So linear layers that read tensors with channels read an MLP, and the one that reads an attention's result is its output projection.
"""
from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compiler.errors import ConversionError
from .linears import check_linear, is_linear, sizes_of
from .observe import Inputs, hooked, run_once

aten = torch.ops.aten
_KEEPING = frozenset({aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.contiguous.default})
_SHAPING = frozenset({aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default})
_SOFTMAX = frozenset({aten._softmax.default, aten._safe_softmax.default})
_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default, aten.mm.default, aten.addmm.default})
OTHER = ""  # in `nearest`: what comes from no linear layer, such as the residual stream behind an embedding
_ASKING = frozenset({aten.sym_size.int, aten.is_same_size.default, aten.empty_like.default, aten.new_empty.default, aten.zeros_like.default, aten.ones_like.default})


@dataclasses.dataclass(frozen=True)
class Source:
    """Row start + step c of a linear layer, for column c."""

    linear: str
    start: int = 0
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Attention:
    """Names of the linear layers that make queries, keys and values (one may be all three), and of the output projection."""

    q: tuple[str, ...]
    k: tuple[str, ...]
    v: tuple[str, ...] = ()
    output: str = ""


@dataclasses.dataclass(frozen=True)
class _Tag:
    nearest: frozenset[str]
    channels: frozenset[Source] | None = None
    scores: tuple | None = None  # (queries, keys), not yet behind a softmax
    attention: Attention | None = None


@dataclasses.dataclass
class Flow:
    """What was seen. channels: sources -> the linear layers that read them, and the width; left_out: linear layer -> why its channels are none that could be taken out, for those that others read;
    attentions in order of execution; calls: how often each linear layer ran; called: names of modules that were called."""

    channels: dict[frozenset[Source], list[str]]
    widths: dict[frozenset[Source], int]
    left_out: dict[str, str]
    attentions: list[Attention]
    calls: Counter
    called: set[str]

    def owner(self, names: Iterable[str]) -> str:
        """The innermost module that was called and has all of these below it."""
        parts = [name.split(".")[:-1] for name in names]
        common = os.path.commonprefix(parts)
        while common and ".".join(common) not in self.called:
            common = common[:-1]
        return ".".join(common)


def trace(model: nn.Module, inputs: Inputs) -> Flow:
    """Run the model once and watch. Raises ConversionError where it does not run, naming a layer whose weights are why."""
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    watch = _Watch(linears)
    with hooked() as keep:
        for name, linear in linears.items():
            keep(linear.register_forward_pre_hook(lambda module, args, kwargs, name=name: watch.enter(name, args[0] if args else kwargs["x" if "input" not in kwargs else "input"]), with_kwargs=True))
            keep(linear.register_forward_hook(lambda module, args, output, name=name: watch.leave(name, output)))
        for name, module in model.named_modules():
            keep(module.register_forward_pre_hook(lambda module, args, name=name: watch.called.add(name)))
        keep(model.register_forward_hook(lambda module, args, output: watch.returned(output)))
        try:
            with watch:
                run_once(model, inputs)
        except ConversionError:
            for name, linear in linears.items():
                check_linear(name, linear)
            raise
    return watch.flow()


class _Watch(TorchDispatchMode):
    def __init__(self, linears: dict[str, nn.Module]):
        super().__init__()
        self.linears = linears
        self.weights = {id(p): name for name, linear in linears.items() for p in linear.parameters()}
        self.tags: dict[int, _Tag] = {}
        self.alive: list[Tensor] = []  # an id is a tensor's as long as it lives
        self.inside = 0
        self.read: dict[frozenset[Source], list[str]] = {}
        self.widths: dict[frozenset[Source], int] = {}
        self.escaped: dict[str, str] = {}
        self.attentions: list[Attention] = []
        self.fed: set[str] = set()  # linear layers whose results alone another one reads
        self.calls, self.called = Counter(), set()

    # ---------------------------------------------------------------- linear layers

    def enter(self, name: str, x: Tensor) -> None:
        self.inside += 1
        self.calls[name] += 1
        tag = self.tags.get(id(x))
        if tag is None:
            return
        width = sizes_of(self.linears[name])[1]
        if OTHER not in tag.nearest and tag.attention is None and all(sizes_of(self.linears[n])[0] in (width, 2 * width) for n in tag.nearest):
            self.fed |= tag.nearest
        if tag.channels is not None:
            readers = self.read.setdefault(tag.channels, [])
            self.widths[tag.channels] = x.shape[-1]
            if name not in readers:
                readers.append(name)
        if tag.attention is not None and (found := dataclasses.replace(tag.attention, output=name)) not in self.attentions:
            self.attentions.append(found)

    def leave(self, name: str, output: Tensor) -> None:
        self.inside -= 1
        self._set(output, _Tag(frozenset({name}), frozenset({Source(name)})))

    # ---------------------------------------------------------------- what lies between

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.inside and func not in _ASKING:
            self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func, args, kwargs, result) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            if (name := self.weights.get(id(x))) is not None:
                self.escaped.setdefault(name, "its weight is also read outside of it")
        tagged = [t for x in given if (t := self.tags.get(id(x))) is not None]
        if not tagged:
            return
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        mixed = any(id(x) not in self.tags and x.is_floating_point() and x.shape == o.shape and x.numel() > 1 for x in given for o in outputs[:1])
        common = _Tag(frozenset([OTHER] if mixed else []).union(*(t.nearest for t in tagged)), None, next((t.scores for t in tagged if t.scores), None), next((t.attention for t in tagged if t.attention), None))
        channels = self._channels(func, args, given, outputs)
        if channels is None:
            for t in tagged:
                self.escape(t, f"{func._schema.name.split('::')[1]} reads all of its channels")
        for n, x in enumerate(outputs):
            self._set(x, dataclasses.replace(self._attention(func, args, common), channels=channels[n] if channels is not None else None))
        if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0]._base is not None:  # keys written into parts of one tensor
            old = self.tags.get(id(args[0]._base), _Tag(frozenset([OTHER])))
            for t in (old, *tagged):
                self.escape(t, "a part of it is written in place")
            self._set(args[0]._base, dataclasses.replace(common, nearest=old.nearest - {OTHER} | common.nearest))

    def _attention(self, func, args, common: _Tag) -> _Tag:
        of = lambda x: self.tags.get(id(x)) if isinstance(x, Tensor) else None
        names = lambda tag: tuple(sorted(tag.nearest - {OTHER})) if tag is not None else ()
        if "scaled_dot_product" in func._schema.name:
            q, k, v = map(of, args[:3])
            return dataclasses.replace(common, scores=None, attention=Attention(names(q), names(k), names(v)))
        if func in _SOFTMAX and common.scores is not None:
            return dataclasses.replace(common, scores=None, attention=Attention(*common.scores))
        if func in _PRODUCTS:
            a, b = map(of, args[-2:])
            if a is not None and b is not None and a.attention is None and b.attention is None and a.scores is None and b.scores is None:
                return dataclasses.replace(common, scores=(names(a), names(b)))
            if a is not None and b is not None and a.attention is not None and not a.attention.v and b.attention is None:
                return dataclasses.replace(common, attention=dataclasses.replace(a.attention, v=names(b)))
        return common

    def _channels(self, func, args, given, outputs) -> list[frozenset[Source] | None] | None:
        """Of every output; None where it is no function of the channels one by one."""
        tags = [self.tags[id(x)] for x in given if id(x) in self.tags]
        if any(t.channels is None for t in tags) or not outputs:
            return None
        sources, x = frozenset().union(*(t.channels for t in tags)), args[0] if args and isinstance(args[0], Tensor) else None
        width = next(x.shape[-1] for x in given if id(x) in self.tags)
        if torch.Tag.pointwise in func.tags:
            if any(id(o) not in self.tags and o.numel() > 1 or id(o) in self.tags and o.shape[-1] != width for o in given):
                return None  # a residual, a scale for each channel, a weight for each row
            if func._schema.is_mutable and id(args[0]) not in self.tags:
                return None
            return [sources] * len(outputs)
        if func._schema.is_mutable or x is None or id(x) not in self.tags:
            return None
        if func in _KEEPING or func in _SHAPING and outputs[0].dim() and outputs[0].shape[-1] == width:
            return [sources] * len(outputs)
        dims = {aten.slice.Tensor: 1, aten.split.Tensor: 2, aten.split_with_sizes.default: 2}
        if func in dims:
            dim = args[dims[func]] if len(args) > dims[func] else 0
            if dim % x.dim() != x.dim() - 1:
                return [sources] * len(outputs)
            first, step = (args[2] if len(args) > 2 and args[2] is not None else 0, args[4] if len(args) > 4 else 1) if func is aten.slice.Tensor else (0, 1)
            found, first = [], max(first + (width if first < 0 else 0), 0)
            for o in outputs:
                found.append(frozenset(Source(s.linear, s.start + s.step * first, s.step * step) for s in sources))
                first += o.shape[-1]
            return found
        if func is aten.index.Tensor or func is aten.index_select.default:  # of rows: experts
            dim = next((n for n, i in enumerate(args[1]) if i is not None), 0) if func is aten.index.Tensor else args[1] % x.dim()
            return [sources] * len(outputs) if func is aten.index_select.default and dim < x.dim() - 1 or func is aten.index.Tensor and len(args[1]) < x.dim() else None
        return None

    def returned(self, output) -> None:
        for x in tree_leaves(output):
            self.escape(self.tags.get(id(x)), "it is returned by the model")

    def escape(self, tag: _Tag | None, why: str) -> None:
        for source in (tag.channels or ()) if tag is not None else ():
            self.escaped.setdefault(source.linear, why)

    def _set(self, x: Tensor, tag: _Tag) -> None:
        self.tags[id(x)] = tag
        self.alive.append(x)

    # ---------------------------------------------------------------- the result

    def flow(self) -> Flow:
        """A linear layer whose channels escape, or are read in two ways, is left out with all that its channels meet."""
        rows = {name: sizes_of(linear)[0] for name, linear in self.linears.items()}
        problems, everything = dict(self.escaped), list(self.read)
        for sources in everything:
            covered: dict[str, set[int]] = {}
            for s in sources:
                covered.setdefault(s.linear, set()).update(range(s.start, s.start + s.step * self.widths[sources], s.step))
            for name, found in covered.items():
                if len(found) < rows[name] or sum(s.linear == name for s in sources) * self.widths[sources] != rows[name]:
                    problems.setdefault(name, "its channels go several ways")
                if sum(any(s.linear == name for s in other) for other in everything) > 1:
                    problems.setdefault(name, "its channels go several ways")
        taken = {name for a in self.attentions for name in (*a.q, *a.k, *a.v)}
        left_out = {s.linear: next(problems[t.linear] for t in sources if t.linear in problems) for sources in everything for s in sources if any(t.linear in problems for t in sources)}
        left_out |= {name: why for name, why in self.escaped.items() if name in self.fed and name not in taken}
        channels = {sources: readers for sources, readers in self.read.items() if not any(s.linear in problems for s in sources)}
        return Flow(channels, self.widths, left_out, self.attentions, self.calls, self.called)
