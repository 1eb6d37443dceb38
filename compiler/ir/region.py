"""The noun between partition and kernels: loop nests over one index space each, as expressions of the scalar language.

A nest runs over *rows* and, within each, over *columns*:

    for rows:                                   # in parallel
        for columns: r0 += inner(r0)            # reductions, level by level: one of level 2 may use those of level 1
        for columns: out[rows, columns] = expr  # full outputs
        out[rows] = expr                        # row outputs

Without reductions there is a single loop and no row output. Index symbols, reduction symbols ``r0 r1 ...``, captures ``c0 c1 ...``
(the region's inputs) and shape symbols are the free symbols of the expressions.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Symbol
from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a kernel must know of a tensor: dtype, sizes and strides (in elements) as sympy integers of shape symbols."""

    dtype: torch.dtype
    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]

    @property
    def kept(self) -> list[int]:
        """Dims longer than one: those that a load of the scalar language indexes."""
        return [d for d, n in enumerate(self.sizes) if n != 1]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """symbol = kind over the columns of expr. kind "sum", "max" or "min"; level: 1 + the highest level that expr uses."""

    symbol: Symbol
    kind: str
    expr: sympy.Expr
    level: int


@dataclasses.dataclass(frozen=True)
class Output:
    """out[number][index] = expr; ``is_row``: one value a row."""

    number: int
    index: tuple[sympy.Expr, ...]
    expr: sympy.Basic
    is_row: bool = False


@dataclasses.dataclass(frozen=True)
class Nest:
    """One loop nest: (symbol, size) of rows and columns from the outside in."""

    rows: tuple[tuple[Symbol, sympy.Expr], ...]
    columns: tuple[tuple[Symbol, sympy.Expr], ...]
    reductions: tuple[Reduction, ...]
    outputs: tuple[Output, ...]

    @property
    def ranges(self) -> dict:
        """Inclusive ranges of the index symbols."""
        return {x: (sympy.Integer(0), n - 1) for x, n in (*self.rows, *self.columns)}


@dataclasses.dataclass(frozen=True)
class Check:
    """An index read from data that eager would refuse outside [low, high): (rows and columns it runs over are the nest's)."""

    nest: int
    index: sympy.Expr
    low: sympy.Expr
    high: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Body:
    """What a kernel is made of; equal layers have equal bodies.

    inputs: c0, c1, ...; outputs in order; sizes: the shape symbols it uses; ops: how many ops of the graph it stands for.
    """

    nests: tuple[Nest, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sizes: tuple[Symbol, ...]
    checks: tuple[Check, ...] = ()
    ops: int = 0


@dataclasses.dataclass
class Region:
    """A body at one place of a graph: ``inputs`` (tensors, then the nodes of ``body.sizes``), ``outputs`` and the inner nodes."""

    body: Body
    inputs: list[Node]
    outputs: list[Node]
    nodes: set[Node]
