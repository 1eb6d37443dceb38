"""All values that one graph keeps (folded.py), asked for by one call: one look at all weights instead of one a value."""
from __future__ import annotations

import operator
import struct
import threading
import weakref
from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from .folded import Folded
from .ir.graph import value
from .watched import Seen


class Values(tuple):
    """Tensors; ``addresses``: of their data, packed as pointers."""

    addresses: bytes


class _Known:
    """The values of one set of weights. It holds them until one of those who keep them lets go."""

    __slots__ = ("state", "generation", "__weakref__")

    def __init__(self):
        self.state: tuple[int, Seen, Values, list] | None = None  # the generation that it is of, ..., and who keeps the values
        self.generation = 0

    def drop(self) -> None:
        self.generation += 1
        self.state = None


class KeptTogether:
    """Called with the weights of all members: their values, flat. A member is asked alone, and computes, only when a weight has changed.

    members: (what is kept, positions of its weights among the arguments).
    """

    has_known_layout = True  # for codegen/executable.py
    __name__ = __qualname__ = "kept_weights"

    def __init__(self, members: Sequence[tuple[Folded, tuple[int, ...]]]):
        self.members = [(folded, tuple(places)) for folded, places in members]
        self._known: dict[tuple[int, ...], _Known] = {}
        self._lock = threading.Lock()

    def __call__(self, *weights: torch.Tensor) -> Values:
        known = self._known.get(tuple(map(id, weights)))
        if known is not None:
            state = known.state  # dropped when a weight dies: its id may be another's by now
            if state is not None and state[0] == known.generation and state[1].is_same(weights):
                return state[2]
        return self._ask(weights)

    def _ask(self, weights: tuple) -> Values:
        ids = tuple(map(id, weights))
        seen = None if any(w.is_inference() for w in weights) else Seen(weights)  # before they are asked: a write meanwhile is seen at the next call
        asked = [(*folded.value(own), own) for folded, own in self._of_members(weights)]
        values = _flat([made for made, _, _ in asked])
        keepers = [kept for _, kept, _ in asked]
        if seen is None or None in keepers:
            return values
        with self._lock:
            known = self._known.get(ids) or _Known()
            self._known = {i: k for i, k in self._known.items() if k.state is not None} | {ids: known}
        for kept in keepers:
            kept.tell(known)
        generation = known.generation
        if all(kept.current(own) is made for made, kept, own in asked):  # nobody let go before they were told whom to tell
            known.state = generation, seen, values, keepers
        return values

    def _of_members(self, weights: Sequence[torch.Tensor]):
        return [(folded, [weights[k] for k in places]) for folded, places in self.members]

    def __deepcopy__(self, memo) -> KeptTogether:
        return self


def _flat(made: Sequence) -> Values:
    values = Values(x for row in made for x in (row if isinstance(row, (list, tuple)) else [row]))
    values.addresses = struct.pack(f"{len(values)}P", *(x.data_ptr() for x in values))
    return values


def keep_together(gm: GraphModule) -> None:
    """Replace the calls of Folded in a lowered graph by one, ahead of everything else."""
    graph = gm.graph
    nodes = [n for n in graph.nodes if isinstance(n.target, Folded)]
    if not nodes:
        return
    weights = list(dict.fromkeys(a for n in nodes for a in n.args))
    together = KeptTogether([(n.target, tuple(weights.index(a) for a in n.args)) for n in nodes])
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        call = graph.call_function(together, tuple(weights))
        call.meta["val"] = []
        for node in nodes:
            made, first = value(node), len(call.meta["val"])
            is_list = isinstance(made, (list, tuple))
            call.meta["val"] += made if is_list else [made]
            for old in [*node.users] if is_list else [node]:
                new = graph.call_function(operator.getitem, (call, first + (old.args[1] if is_list else 0)))
                new.meta = dict(old.meta)
                old.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    gm.recompile()
