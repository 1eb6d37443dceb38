"""The contract of a rewrite.

A pass is one file with a function ``find(graph)`` that yields, for every place where it could act, a `Match` (what to put
there) or a `Refusal` (why not), or `Kept` where it weighed and found nothing better. The driver in compiler/pipeline.py inserts, verifies, and reports; a pass changes nothing
itself, so that a refused or failed match leaves the graph as it was.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

from torch.fx import Graph, Node


@dataclasses.dataclass
class Match:
    """A place to rewrite.

    root:   the node whose value is replaced
    inputs: the nodes at which the replaced region starts (verification replays from there to root)
    build:  inserts the replacement before root and returns the node that takes root's place (same shape and dtype)
    detail: one line for the report, e.g. "score=0.125*s mask=j <= i"
    also:   further nodes that are replaced, all after root in the graph; build then returns a tuple, root's node first
    tolerance: what verification lets the replacement differ by, relative to the largest value; a rewrite that keeps the result has 1e-9
    """

    root: Node
    inputs: tuple[Node, ...]
    build: Callable[[Graph], Node | tuple[Node, ...]]
    detail: str = ""
    also: tuple[Node, ...] = ()
    tolerance: float = 1e-9  # float64 rounding over a softmax of a thousand terms stays below 1e-12


@dataclasses.dataclass
class Refusal:
    """A place that looks like the pattern and is left alone: the reason, what was expected and found, and the node it failed at."""

    reason: str
    node: Node
    cure: str = ""


@dataclasses.dataclass
class Kept:
    """A place that is best as it is, of a pass that weighs alternatives: what was weighed, for the report."""

    node: Node
    detail: str


class Refused(Exception):
    """Raised inside a pass: the place has the pattern, and this is why it stays as it is."""

    def __init__(self, reason: str, node: Node, cure: str = ""):
        super().__init__(reason)
        self.refusal = Refusal(reason, node, cure)


class NotThePattern(Exception):
    """Raised inside a pass: a place that only looked like the pattern (a router's softmax); nothing to report."""


class Rewrite(Protocol):
    """What passes/__init__.PIPELINE lists: a module. With OPTION = "int8" find is given that option's value too: find(graph, options.int8).

    With SETTLES = (op, ...) the kernels of those ops' nodes are begun behind the pass: later passes may still change them, at the price of kernels that nobody wants.
    """

    NAME: str

    def find(self, graph: Graph) -> Iterator[Match | Refusal | Kept]: ...
