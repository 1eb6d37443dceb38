"""Columns of a stream: the elements of its products as functions of the column j, and the accumulators and partners that they are.

Over the columns (their number is static) an element acc[row, column] is looked at as a function of j:

    column(j) = offset + step j            an accumulator a: the weight's rows offset, offset + step, ... (a slice, no copy)
    column(j) = that of a at partner(j)    p: rotary's other half. partner is read off from the distances, not from a spelling

    column(j) = offset + period (j // block) + j % block       a packed accumulator: a part of every head's columns, [heads, 3, dim] (NeoX). Its columns are no view of the weight,
                                                               so the parts of such a product stay together (linear_packed.py)

An element that a condition guards (t < D/2) need fit where it is read; a branch that no column takes is dropped. So half-split
and interleaved, whole and partial rotary come out of one analysis, and so do packed projections.
"""
from __future__ import annotations

import dataclasses
import functools

import sympy
import torch
from sympy import Integer, Symbol

from . import scalar as sc
from .evaluate import Evaluator
from .unliftable import Unliftable

MAX_COLUMNS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Columns offset, offset + step, ... of the stream's product number ``product``; with ``block``, that many of every ``period``."""

    product: int
    offset: int
    step: int
    block: int = 0
    period: int = 0

    def at(self, j):
        """The product's column of the accumulator's column j."""
        return self.offset + (self.period * (j // self.block) + j % self.block if self.block else self.step * j)


def kind(element) -> str:
    return element.args[0].name.rstrip("0123456789")


def number(element) -> int:
    return int(element.args[0].name[len(kind(element)):])


class Grid:
    """All columns of a stream's root: what expressions of the column dims are there."""

    def __init__(self, dims: list[tuple[Symbol, sympy.Expr]]):
        if not all(n.is_Integer for _, n in dims):
            raise Unliftable("a symbolic number of columns")
        self.symbols = {s for s, _ in dims}
        self.sizes = [int(n) for _, n in dims]
        self.width = functools.reduce(int.__mul__, self.sizes, 1)
        if self.width > MAX_COLUMNS:
            raise Unliftable(f"{self.width} columns")
        self.j = torch.arange(self.width)
        self.everywhere = torch.ones(self.width, dtype=torch.bool)
        env, stride = {}, self.width
        for (s, _), n in zip(dims, self.sizes):
            stride //= max(n, 1)
            env[s.name] = self.j // max(stride, 1) % max(n, 1)
        self.single = dims[0][0] if len(dims) == 1 else None
        self._evaluate = Evaluator(env, (), torch.float64)

    def knows(self, e) -> bool:
        return e.free_symbols <= self.symbols and not e.has(sc.load)

    def __call__(self, e):
        return self._evaluate(e).expand(self.width)

    def simplified(self, e):
        """e without branches that no column takes. An element that is read in several branches becomes one for each, told apart by a
        number in front of its index: x[2 t] is an even column's own value and an odd one's partner."""
        memo, branches = {}, {}

        def marked(x, mask):
            number = branches.setdefault(mask.numpy().tobytes(), len(branches))
            return x.xreplace({a: a.func(a.args[0], Integer(number), *a.args[1:]) for a in x.atoms(sc.load) if kind(a) in ("acc", "bias")})

        def visit(x, mask):
            if not x.has(sc.load):
                return x
            if isinstance(x, sc.load) or not x.has(sc.where):
                return marked(x, mask)
            key = (x, mask.numpy().tobytes())
            if key not in memo:
                memo[key] = self._branch(x, mask, visit) if isinstance(x, sc.where) and self.knows(x.args[0]) else x.func(*(visit(a, mask) for a in x.args))
            return memo[key]

        return visit(e, self.everywhere)

    def _branch(self, x, mask, visit):
        condition = self(x.args[0])
        yes, no = mask & condition, mask & ~condition
        if not no.any():
            return visit(x.args[1], mask)
        if not yes.any():
            return visit(x.args[2], mask)
        return sc.where(x.args[0], visit(x.args[1], yes), visit(x.args[2], no))

    def readings(self, e) -> dict:
        """Every element of e, with the columns where it is read."""
        found: dict = {}
        seen: dict = {}

        def visit(x, mask):
            before = seen.get(x)
            if before is not None and not (mask & ~before).any():
                return
            seen[x] = mask if before is None else mask | before
            if isinstance(x, sc.load):
                found[x] = found[x] | mask if x in found else mask
            elif isinstance(x, sc.where) and self.knows(x.args[0]):
                condition = self(x.args[0])
                visit(x.args[0], mask)
                visit(x.args[1], mask & condition)
                visit(x.args[2], mask & ~condition)
            else:
                for a in x.args:
                    visit(a, mask)

        visit(e, self.everywhere)
        return found


def classify(readings: dict, grid: Grid) -> tuple[tuple[int, int], dict]:
    """(pair, element -> (accumulator, is partner))."""
    if grid.single is not None and all(_affine(x.args[-1], grid.single) for x in readings) and all(m.all() for m in readings.values()):
        terms = {}
        for x in readings:
            step, offset = _affine(x.args[-1], grid.single)
            terms[x] = (Accumulator(number(x), offset, step), False)
        return (0, 0), terms
    columns, covered = {}, {}
    for x, mask in readings.items():
        if not grid.knows(x.args[-1]):
            raise Unliftable("its columns depend on rows or on data")
        columns[x] = grid(x.args[-1])
        fit = _fit(columns[x], mask, grid)
        if fit is not None:
            key = Accumulator(number(x), *fit)
            covered[key] = covered[key] | mask if key in covered else mask
    own = [key for key, mask in covered.items() if mask.all()]
    terms, pairs = {}, set()
    for x, mask in readings.items():
        fitting = next((a for a in own if a.product == number(x) and not ((columns[x] - a.at(grid.j)) * mask).any()), None)
        if fitting is not None:
            terms[x] = (fitting, False)
            continue
        for a in own:
            pair = _pair(columns[x], mask, a, grid) if a.product == number(x) else None
            if pair is not None:
                terms[x] = (a, True)
                pairs.add(pair)
                break
        else:
            raise Unliftable("its columns are no slice of the weight's, nor partners in a slice")
    if len(pairs) > 1:
        raise Unliftable("it pairs columns in two ways")
    return (pairs.pop() if pairs else (0, 0)), terms


def _affine(column, symbol):
    """(step, offset) of step*symbol + offset."""
    if column == symbol:
        return 1, 0
    step = column.coeff(symbol)
    offset = column - step * symbol
    return (int(step), int(offset)) if step.is_Integer and step > 0 and offset.is_Integer else None


def _fit(columns, mask, grid: Grid) -> tuple[int, ...] | None:
    """(offset, step) with columns = offset + step j where mask holds; or (offset, 1, block, period)."""
    where = mask.nonzero().flatten()
    if where.numel() == 0:
        return None
    offset = int(columns[where[0]] - grid.j[where[0]])
    if not ((columns - offset - grid.j) * mask).any():
        return (offset, 1) if offset >= 0 else None
    if mask.all() and grid.width > 1:
        offset, step = int(columns[0]), int(columns[1] - columns[0])
        if step > 1 and not (columns - offset - step * grid.j).any():
            return offset, step
    return _fit_blocks(columns, mask, where, grid)


def _fit_blocks(columns, mask, where, grid: Grid) -> tuple[int, ...] | None:
    block = 1
    for n in reversed(grid.sizes[1:]):
        block *= n
        group, rest = grid.j // block, columns - grid.j % block
        first, last = where[0], where[-1]
        if group[first] == group[last]:
            continue
        period = int(rest[last] - rest[first]) // int(group[last] - group[first])
        offset = int(rest[first]) - period * int(group[first])
        if offset >= 0 and offset + block <= period and not ((rest - offset - period * group) * mask).any():
            return offset, 1, block, period
    return None


def _pair(columns, mask, a: Accumulator, grid: Grid) -> tuple[int, int] | None:
    """(block, half) with columns = those of the accumulator at partner(j), where mask holds."""
    if a.step != 1 or not mask.any():
        return None
    distances = ((columns - a.at(grid.j))[mask]).unique().tolist()
    half = max(map(abs, distances))
    if half == 0:
        return None
    strides, stride = [], 1
    for n in reversed(grid.sizes):
        stride *= n
        strides.append(stride)
    for block in dict.fromkeys([*strides, 2 * half]):
        if block < 2 * half or grid.width % block:
            continue
        t = grid.j % block
        partner = grid.j + torch.where(t < half, half, torch.where(t < 2 * half, -half, 0))
        if not ((columns - a.at(partner)) * mask).any():
            return block, half
    return None
