"""Weights that are computed from weights: kept between calls, and made again when what they were made of changes.

`W + scale B A`, a cast under autocast, int8 rows and their scales: in an inference graph they depend on weights alone, so a call needs not compute them.
`fold_weights` replaces them by a `Folded`, which is called with the weights and returns the kept value if, for every one of them, all of this is as it was (watched.py):

    the tensor (a weak reference to it), its storage (a weak reference too: an address may be used again, a storage that is referred to is not),
    its address, shape, strides, dtype and version; and, on a CPU, 8 of its elements, spread over it

- A weight that is replaced (`load_state_dict(assign=True)`, `m.weight = ...`), whose data is (`.to()`, `p.data = ...`, `set_`), or that is written in place (`load_state_dict`, an edit under
  no_grad, an optimizer's step) is seen by the first six.
- What torch does not count as a write is seen otherwise. Steps of torch.optim's *fused* optimizers leave the version as it is: they are announced, by a hook behind every step.
  `p.data.add_()` writes through an alias with a version of its own, numpy and foreign kernels through none: the 8 elements see them if they change most of the tensor
  (on a CPU; a GPU would have to be waited for). A write of this kind to a few elements, or on a GPU, has to be said: `tileweld.refold()`.
- Weights made under torch.inference_mode() have no version: what is computed from them is computed at every call.

Equal computations of the same tensors share one value, so that prefill and decode do not hold it twice. A value lives as long as its weights and the graphs that use it.
Nothing here is done in graphs that train.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..codegen.liveness import Liveness, is_view
from . import log
from .errors import TileweldError
from .ir.graph import computed_from, value
from .ir.huge_pages import settled
from .ir.weights import is_getitem, is_pure
from .watched import Seen

LEAST = 1 << 15  # elements read and written: what is less takes no longer than to ask whether it is still right (about a microsecond a weight)
GROWTH = 2  # a kept value has at most so many times the bytes of its sources: dequantised int8 weights would undo what they are for


class _Kept:
    """A value of one computation on certain weights, and what they were when it was made. Shared between the graphs that have it."""

    def __init__(self, sources: Sequence[torch.Tensor]):
        self._references = tuple(weakref.ref(w, self._gone) for w in sources)
        self._lock = threading.Lock()
        self._state: tuple[Seen, object] | None = None  # one assignment: another thread sees all of it or nothing
        self._readers: list[weakref.ref[_Values]] = []
        self.times = 0  # that it was computed

    def _set(self, state: tuple[Seen, object] | None) -> None:
        self._state = state
        for reader in self._readers.copy():  # takes no lock: weights go at any time, in any thread
            if (values := reader()) is not None:
                values.drop()

    def _gone(self, _) -> None:
        self._set(None)

    def tell(self, values: _Values) -> None:
        """Have them dropped when this value goes."""
        with self._lock:
            if all(r() is not values for r in self._readers):
                self._readers = [r for r in self._readers if r() is not None] + [weakref.ref(values)]

    @property
    def is_dead(self) -> bool:
        return not self._references or any(r() is None for r in self._references)

    def is_of(self, weights: set[int]) -> bool:
        """Was it computed from one of these ids?"""
        return any(id(r()) in weights for r in self._references)

    def forget(self) -> None:
        """Hold nothing, not even weak references to the weights; the next call makes another one."""
        with self._lock:
            self._references = ()
            self._set(None)

    def current(self, sources: Sequence[torch.Tensor]):
        """The value, if it is still right; else None."""
        state, references = self._state, self._references
        if state is None or not references or any(r() is not w for r, w in zip(references, sources)) or not state[0].is_same(sources):
            return None
        return state[1]

    def make(self, sources: Sequence[torch.Tensor], compute):
        with self._lock:
            if (known := self.current(sources)) is not None:  # another thread was first
                return known
            if not self._references:  # forgotten meanwhile
                return compute(*sources)
            seen = Seen(sources)  # before it is computed: a write meanwhile is seen at the next call
            made = compute(*sources)
            made = [settled(x) for x in made] if isinstance(made, list) else settled(made)
            self._set((seen, made))
            self.times += 1
            return made


_shared: weakref.WeakValueDictionary[tuple, _Kept] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _kept(key: str, sources: Sequence[torch.Tensor]) -> _Kept:
    """The one value of this computation on these tensors."""
    place = key, tuple(map(id, sources))
    with _lock:
        found = _shared.get(place)
        if found is None or found.is_dead:
            found = _shared[place] = _Kept(sources)
        return found


def refold(*weights: torch.Tensor) -> int:
    """Have what was computed from these weights (from any, without arguments) computed again at the next call; returns how many values that are.

    For writes that leave no trace, see compiler/folded.py: through `.data` to a few elements, through numpy, by a kernel of one's own, on a GPU. Before
    torch.utils.swap_tensors too, which takes no tensor that somebody has a weak reference to.
    """
    with _lock:
        found = [k for k in _shared.values() if not weights or k.is_of(set(map(id, weights)))]
    for kept in found:
        kept.forget()
    return len(found)


def _after_step(optimizer, args, kwargs) -> None:
    """Fused optimizers write weights and leave their version as it is."""
    if _shared:
        touched = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with _lock:
            found = [k for k in _shared.values() if k.is_of(touched)]
        for kept in found:
            kept.forget()


_hook = None


def _watch_optimizers() -> None:
    global _hook
    with _lock:
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_step)


class Folded:
    """Called with weights: the value of a graph that depends on them alone, computed when one of them has changed.

    Its strides are those that the graph was compiled for (``layouts``: sizes and strides of each tensor). key: the computation as text, equal for equal computations; sources: names of the weights; bytes: of the value; operations: what computes it.
    """

    def __init__(self, graph: Graph, name: str, sources: Sequence[str], layouts: Sequence[tuple], nbytes: int):
        self.graph, self.layouts = graph, layouts
        self._gm = GraphModule({}, graph)
        self._by_weights: dict[tuple[int, ...], _Kept] = {}
        self._said = False
        self.name, self.sources, self.bytes, self.key = name, tuple(sources), nbytes, f"{_text(graph)} {layouts}"
        self.operations = tuple(dict.fromkeys(str(n.target).removeprefix("aten.").split(".")[0] if str(n.target).startswith("aten.") else ".".join(str(n.target).split(".")[:2]) for n in graph.nodes if n.op == "call_function" and is_pure(n) and not is_view(n)))
        self.__name__ = self.__qualname__ = f"folded_{name}"
        for n in graph.nodes:
            n.meta = {}  # fake tensors, which would be held

    has_known_layout = True  # for codegen/executable.py

    def __call__(self, *weights: torch.Tensor):
        return self.value(weights)[0]

    def value(self, weights: Sequence[torch.Tensor]) -> tuple[object, _Kept | None]:
        """The value, and who keeps it; None where nobody does."""
        kept = self._by_weights.get(tuple(map(id, weights)))
        if kept is not None and (known := kept.current(weights)) is not None:
            return known, kept
        if any(w.is_inference() for w in weights):
            if not self._said:
                log.get("runtime").warning("%s: weights made under torch.inference_mode() have no version, so that it is computed at every call; load the model outside of it", self.__name__)
            self._said = True
            return self._compute(*weights), None
        _watch_optimizers()
        kept = _kept(self.key, weights)
        with _lock:
            self._by_weights = {ids: k for ids, k in self._by_weights.items() if not k.is_dead} | {tuple(map(id, weights)): kept}
        return kept.make(weights, self._compute), kept

    def _compute(self, *weights):
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                made = self._gm(*weights)
        except TileweldError as error:  # a weight that int8 cannot hold: which one of a hundred
            error.where = error.where or ", ".join(self.sources)
            raise
        if not isinstance(made, (list, tuple)):
            return _laid_out(made, *self.layouts[0])
        return [_laid_out(x, *layout) for x, layout in zip(made, self.layouts)]

    def __deepcopy__(self, memo) -> Folded:  # a copied graph is shown or run with the same values
        return self


def _laid_out(x: torch.Tensor, shape, strides) -> torch.Tensor:
    return x if x.stride() == strides else torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _text(graph: Graph) -> str:
    """A computation, written so that equal ones are written equally; the inputs are numbered."""
    numbers = {node: k for k, node in enumerate(graph.nodes)}
    return "; ".join(f"{node.op} {node.target if node.op == 'call_function' else ''} {torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _Number(numbers[n]))}" for node in graph.nodes)


class _Number(int):
    """A node in a text: no number of the model is written like it."""

    def __repr__(self):
        return f"%{int(self)}"


def fold_weights(gm: GraphModule) -> list[Folded]:
    """Replace what depends on weights alone in an inference graph, whose weights have meta["weight"] (their name); returns what is kept.

    Left as they are: views, which cost nothing; little things (LEAST) of torch's own operations; what would be larger than its sources (GROWTH); what leaves the graph, since its receiver may write to it.
    """
    graph = gm.graph
    if not any(n.meta.get("weight") for n in graph.find_nodes(op="placeholder")):
        return []
    live = Liveness(graph)
    fixed = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta.get("weight") and not live.bases[node] & live.written:
            fixed.add(node)
        elif (is_pure(node) or is_getitem(node)) and all(a in fixed for a in node.all_input_nodes):  # also what has no input at all
            fixed.add(node)
    running, made = {n for n in graph.nodes if n not in fixed}, []
    start = next(n for n in graph.nodes if n.op != "placeholder")  # kept values are there before anything is computed, so that a region may read them wherever it runs
    for node in reversed([n for n in graph.nodes if n in fixed]):
        if node.op == "placeholder" or not any(u in running for u in node.users):
            continue
        if is_view(node) or is_getitem(node) or (folded := _folded(node, live)) is None:
            running.add(node)
            continue
        target, sources = folded
        with graph.inserting_before(start):
            new = graph.call_function(target, tuple(sources))
        new.meta = node.meta | {"kept": True}
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user in running)
        made.append(target)
    if made:
        graph.eliminate_dead_code()
        gm.recompile()
    return made[::-1]


def _folded(node: Node, live: Liveness) -> tuple[Folded, list[Node]] | None:
    """What computes this node from weights; None where that is not worth it."""
    ordered = sorted(computed_from(node))
    sources = [n for n in ordered if n.op == "placeholder"]
    results = value(node) if isinstance(value(node), (list, tuple)) else [value(node)]
    work = sum(_elements(n) + sum(_elements(a) for a in n.all_input_nodes) for n in ordered if n.op == "call_function" and not is_view(n) and not is_getitem(n))
    size = sum(_bytes(x) for x in results)
    is_own = any(n.op == "call_function" and n.target.namespace == "tileweld" for n in ordered if not is_getitem(n))  # quantize_rows is a dozen calls of torch's
    if not sources or (work < LEAST and not is_own) or size > GROWTH * sum(_bytes(value(n)) for n in sources) or live.bases[node] & (live.leaves | live.written):
        return None
    graph, copies = Graph(), {}
    for n in [*sources, *(n for n in ordered if n.op != "placeholder")]:
        copies[n] = graph.node_copy(n, copies.__getitem__)
        if n.op == "placeholder":
            copies[n].target = copies[n].name
    graph.output(copies[node])
    layouts = [(tuple(x.shape), tuple(x.stride())) for x in results]
    return Folded(graph, node.name, [n.meta["weight"] for n in sources], layouts, size), sources


def _elements(node: Node) -> int:
    known = value(node)
    return sum(x.numel() for x in (known if isinstance(known, (list, tuple)) else [known]) if isinstance(x, torch.Tensor))


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
