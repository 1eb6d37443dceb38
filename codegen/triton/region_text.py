"""The text of a region's nests: one jit function each (region_index.py brings their index arithmetic into shape).

    flat         a program takes BLOCK elements in the order of memory
    whole rows   a program holds ROWS rows of up to BLOCK columns in registers: each element is read once
    long rows    a program walks over its rows in steps of BLOCK columns, once a level of reductions; of sums alone, several programs may
                 share a row (SPLIT): each stores its share, and a second function adds them in order
"""
from __future__ import annotations

import sympy

from ...compiler.ir import scalar as sc
from ...compiler.ir.printer import ATOM
from ...compiler.ir.region import Body, Nest
from .printer import HELPERS, TritonText
from .region_index import Flattened
from .region_plan import DOWN_BLOCK, REGISTERS
from .source import fill, used

IDENTITY = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
#: reductions that NaN passes through
REDUCERS = '''
@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
'''

FUNCTION = '''
@triton.jit
def $name($arguments):
    """$what"""
    $body
'''


class _Text(TritonText):
    """Values that have a name are printed as it."""

    def __init__(self, flat: Flattened, tile: bool):
        super().__init__()
        self.flat, self.tile = flat, tile
        self.row_symbols, self.column_symbols = flat.row_symbols, flat.column_symbols

    def mask(self, e) -> list[str]:
        """What must hold for this value to exist, by the indices that it depends on."""
        symbols = e.free_symbols
        if not self.tile:
            return ["inside"] if symbols & self.row_symbols else []
        return [name for name, own in (("row_inside", self.row_symbols), ("col_inside", self.column_symbols)) if symbols & own]

    def _load(self, e, condition):
        symbol, offset, guard = e.args
        masks = self.mask(e) + ([] if guard is sympy.true else [self._guard(guard)])
        masked = f", mask={' & '.join(masks)}, other=0" if masks else ""
        return f"tl.load({symbol}_ptr + {self.place(offset)}{masked}).to({'tl.int64' if sc.is_int(e) else 'tl.float32'})"

    def _guard(self, guard) -> str:
        """With how many neighbours share its truth, which Triton sees of whole blocks alone: rotary's halves would be loaded element by element."""
        count = self.flat.constancy(guard)
        if count == 1:
            return self.emit(guard, ATOM)
        shape = str(count) if not self.tile else f"[{count}, 1]" if self.flat.is_down else f"[1, {count}]"
        return f"tl.max_constancy({self(guard)}, {shape})"

    def place(self, offset) -> str:
        return self(offset)


class NestText:
    """One nest as jit functions. ``helpers``: functions of printer.HELPERS in use."""

    def __init__(self, body: Body, nest: Nest, number: int):
        self.body, self.nest, self.number = body, nest, number
        self.flat = Flattened(body, nest, number)
        self.is_flat = not nest.reductions
        width, fits = self.flat.width, DOWN_BLOCK if self.flat.is_down else REGISTERS // 4
        self.always_whole, self.always_long = bool(width.is_Integer and width <= fits), bool(width.is_Integer and width > REGISTERS)
        self.is_splittable = not self.is_flat and not self.always_whole and all(r.level == 1 for r in nest.reductions) and all(o.is_row for o in nest.outputs)
        self.printer = _Text(self.flat, not self.is_flat)
        self.temporaries = 0

    @property
    def helpers(self) -> set[str]:
        return self.printer.helpers

    @property
    def held(self) -> int:
        """How many values of the whole tile are used on two levels, or on a level and in a result."""
        stages = [[e for r, e in zip(self.nest.reductions, self.flat.reductions) if r.level == level] for level in self._level_numbers()] + [self.flat.outputs]
        seen: dict = {}
        for k, stage in enumerate(stages):
            for load in {x for e in stage for x in sc.loads(e)}:
                if load.free_symbols & self.flat.row_symbols or not self.flat.rows:
                    if load.free_symbols & self.flat.column_symbols:
                        seen.setdefault(load, set()).add(k)
        return sum(len(stages) > 1 for stages in seen.values())

    def plan(self, spell) -> str:
        """The arguments of region_plan.py for this nest; ``spell``: a size as Python."""
        if self.is_flat:
            return f"Flat({spell(self.flat.total)})"
        return f"Rows({spell(self.flat.total)}, {spell(self.flat.width)}, is_down={self.flat.is_down}, held={self.held}, is_splittable={self.is_splittable})"

    # ---- functions

    def functions(self) -> dict[str, tuple[str, list[str]]]:
        """name -> (text, its parameters)"""
        name = f"nest{self.number}"
        if self.is_flat:
            return {name: self._function(name, "BLOCK elements in the order of memory.", self._flat_lines(), ["BLOCK"])}
        made = {}
        if not self.always_long:
            made[name] = self._function(name, "ROWS rows, each in registers.", self._whole_lines(), ["ROWS", "BLOCK"])
        if not self.always_whole:
            made[f"{name}_long"] = self._function(f"{name}_long", "ROWS rows in steps of BLOCK columns.", self._long_lines(), ["ROWS", "BLOCK", *(["SPLIT"] if self.is_splittable else [])])
        if self.is_splittable:
            made[f"{name}_shares"] = self._function(f"{name}_shares", "The shares of LANES rows, added in order.", self._share_lines(), ["LANES", "SHARES"])
        return made

    def _function(self, name, what, lines, constants):
        parameters = ["program", *used("\n".join(lines), self._names()), "INDEX", *constants]
        typed = [p if p not in ("INDEX", *constants) else f"{p}: tl.constexpr" for p in parameters]
        return fill(FUNCTION, name=name, arguments=", ".join(typed), what=what, body=lines), parameters

    def _names(self):
        return [*(f"out{k}_ptr" for k in range(len(self.body.outputs))), "partial_ptr", *(f"c{k}_ptr" for k in range(len(self.body.inputs))), *map(str, self.body.sizes), "splits"]

    def _flat_lines(self) -> list[str]:
        self._start()
        lines = ["index = tl.cast(program, INDEX) * BLOCK + tl.arange(0, BLOCK)", f"inside = index < {self.printer(self.flat.total)}", *self._split_index(self.flat.rows, "index")]
        linear = self.flat.linear()
        self.printer.place = lambda offset: self._place(offset, linear)
        lines += self._check_lines(lambda e: True)
        lines += self._name(self.flat.outputs) + [self._store(k, "[BLOCK]") for k in range(len(self.flat.outputs))]
        return lines

    def _whole_lines(self) -> list[str]:
        self._start()
        lines = [*self._row_lines("program"), "col = tl.arange(0, BLOCK).to(INDEX)[None, :]", *self._column_lines(), *self._check_lines(lambda e: True)]
        for level in self._level_numbers():
            now = [(r, e) for r, e in zip(self.nest.reductions, self.flat.reductions) if r.level == level]
            lines += self._name([e for _, e in now])
            lines += [f"{r.symbol} = {self._reduced(r, self._inside(r, e))}" for r, e in now]
        lines += self._name(self.flat.outputs)
        return lines + [self._store(k, "[ROWS, 1]" if o.is_row else "[ROWS, BLOCK]") for k, o in enumerate(self.nest.outputs)]

    def _long_lines(self) -> list[str]:
        self._start()
        width = self.printer(self.flat.width)
        if self.is_splittable:
            lines = [*self._row_lines("program // splits"), f"steps = tl.cdiv(tl.cdiv(tl.cast({width}, INDEX), BLOCK), splits) * BLOCK", "start = program % splits * steps", f"stop = tl.minimum(start + steps, {width})"]
        else:
            lines = [*self._row_lines("program"), f"start, stop = 0, {width}"]
        first = True
        for level in self._level_numbers():
            now = [(r, e) for r, e in zip(self.nest.reductions, self.flat.reductions) if r.level == level]
            lines += [f"all_{r.symbol} = tl.full([ROWS, BLOCK], {IDENTITY[r.kind]}, tl.float32)" for r, _ in now]

            def step(now=now, first=first):
                inner = self._check_lines(lambda e: bool(e.free_symbols & self.flat.column_symbols)) if first else []
                inner += self._name([e for _, e in now])
                return inner + [f"all_{r.symbol} {'+=' if r.kind == 'sum' else '='} {self._joined(r, self._inside(r, e))}" for r, e in now]

            lines += (self._check_lines(lambda e: not e.free_symbols & self.flat.column_symbols) if first else []) + self._steps([e for _, e in now], step)
            lines += [f"{r.symbol} = {self._reduced(r, f'all_{r.symbol}')}" for r, _ in now]
            first = False
        rows = [k for k, o in enumerate(self.nest.outputs) if o.is_row]
        full = [k for k, o in enumerate(self.nest.outputs) if not o.is_row]
        results = self._name([self.flat.outputs[k] for k in rows]) + [self._store(k, "[ROWS, 1]") for k in rows]
        if self.is_splittable:
            total = self.printer(self.flat.total)
            shares = [f"tl.store(partial_ptr + ({n} * splits + program % splits) * {self._bracketed(total)} + row, {r.symbol}, mask=row_inside)" for n, r in enumerate(self.nest.reductions)]
            return [*lines, "if SPLIT:", *("    " + x for x in shares), "else:", *("    " + x for x in results)]
        if full:
            exprs = [self.flat.outputs[k] for k in full]
            results += self._steps(exprs, lambda: self._name(exprs) + [self._store(k, "[ROWS, BLOCK]") for k in full])
        return lines + results

    def _share_lines(self) -> list[str]:
        self._start()
        total = self._bracketed(self.printer(self.flat.total))
        lines = [*(x.replace("ROWS", "LANES") for x in self._row_lines("program")), "share = tl.arange(0, SHARES)[None, :]", "share_inside = row_inside & (share < splits)"]
        for n, r in enumerate(self.nest.reductions):
            lines.append(f"{r.symbol} = {self._reduced(r, f'tl.load(partial_ptr + ({n} * splits + share) * {total} + row, mask=share_inside, other={IDENTITY[r.kind]})')}")
        return lines + self._name(self.flat.outputs) + [self._store(k, "[LANES, 1]") for k in range(len(self.flat.outputs))]

    # ---- pieces

    def _start(self):
        self.printer.hoisted, self.temporaries = {}, 0

    def _level_numbers(self):
        return range(1, max((r.level for r in self.nest.reductions), default=0) + 1)

    @staticmethod
    def _bracketed(text: str) -> str:
        return text if text.isidentifier() or text.isdigit() else f"({text})"

    def _split_index(self, loops, name) -> list[str]:
        """The symbols of merged loops from one number."""
        if len(loops) == 1:
            return [f"{loops[0][0]} = {name}"]
        lines, rest = [], name
        for k, (x, n) in reversed(list(enumerate(loops))):
            size = self._bracketed(self.printer(n))
            lines.append(f"{x} = {rest} % {size}" if k else f"{x} = {rest}")
            rest = f"{rest} // {size}"
        return lines

    def _row_lines(self, program) -> list[str]:
        return [f"row = (tl.cast({program}, INDEX) * ROWS + tl.arange(0, ROWS))[:, None]", f"row_inside = row < {self.printer(self.flat.total)}", *(self._split_index(self.flat.rows, "row") if self.flat.rows else [])]

    def _column_lines(self) -> list[str]:
        return [f"col_inside = col < {self.printer(self.flat.width)}", *(self._split_index(self.flat.columns, "col") if self.flat.columns else [])]

    def _steps(self, exprs, inside) -> list[str]:
        """A loop over the columns; what they do not move is named before it."""
        fixed = self._name([e for e in self._parts(exprs) if isinstance(e, sc.load) and not e.free_symbols & self.flat.column_symbols])
        before = dict(self.printer.hoisted)
        body = ["col = (first + tl.arange(0, BLOCK)).to(INDEX)[None, :]", *self._column_lines(), *inside()]
        if self.is_splittable:
            body[1] = "col_inside = col < stop"
        self.printer.hoisted = before
        return [*fixed, "for first in tl.range(start, stop, BLOCK):", *("    " + x for x in body)]

    def _inside(self, reduction, e) -> str:
        """The value where the tile has elements, what adds nothing elsewhere."""
        text = f"tl.cast({self.printer(e)}, tl.float32)" if sc.is_int(e) else self.printer(e)
        return f"tl.where(col_inside, {text}, {IDENTITY[reduction.kind]})"

    def _joined(self, reduction, text) -> str:
        return text if reduction.kind == "sum" else f"{'larger' if reduction.kind == 'max' else 'smaller'}(all_{reduction.symbol}, {text})"

    @staticmethod
    def _reduced(reduction, text) -> str:
        return f"tl.sum({text}, 1)[:, None]" if reduction.kind == "sum" else f"tl.reduce({text}, 1, {'larger' if reduction.kind == 'max' else 'smaller'})[:, None]"

    def _store(self, k, shape) -> str:
        """The k-th output of the nest."""
        offset, value = self.flat.offsets[k], self.printer(self.flat.outputs[k])
        place = self.printer.place(offset)
        if not offset.free_symbols & (self.flat.row_symbols | self.flat.column_symbols):
            place = f"tl.zeros({shape}, tl.int32)" + ("" if place == "0" else f" + {place}")
        masks = ["inside"] if self.is_flat else ["row_inside"] if self.nest.outputs[k].is_row else ["row_inside", "col_inside"]
        return f"tl.store(out{self.nest.outputs[k].number}_ptr + {place}, {value}, mask={' & '.join(masks)})"

    def _place(self, offset, linear) -> str:
        """An offset that runs with the number of the element is that number and a constant: Triton sees it is contiguous."""
        rest = sympy.expand(offset - linear)
        if rest.free_symbols & self.flat.row_symbols or rest.atoms(sc.load):
            return self.printer(offset)
        return "index" if rest == 0 else self.printer(rest) + " + index" if not rest.could_extract_minus_sign() else f"index - {self.printer(-rest)}"

    def _check_lines(self, wanted) -> list[str]:
        lines = []
        for e, low, high in self.flat.checks:
            if wanted(e):
                lines += self._name([e])
                position = self.printer.emit(e, ATOM)
                outside = [f"~{m}" for m in self.printer.mask(e)]
                lines.append(f'tl.device_assert({" | ".join([*outside, f"(({position} >= {self.printer(low)}) & ({position} < {self.printer(high)}))"])}, "index out of range")')
        return lines

    # ---- names

    def _parts(self, exprs) -> list:
        """Every value within that is worth a name, inner ones first: loads, and what occurs more than once."""
        count: dict = {}
        order: list = []

        def visit(e):
            if not isinstance(e, sympy.Basic) or not e.args or e.is_number or isinstance(e, sympy.Symbol) or e in self.printer.hoisted:
                return
            count[e] = count.get(e, 0) + 1
            if count[e] > 1:
                return
            for a in e.args[1:] if isinstance(e, (sc.load, sc.call, sc.compare)) else e.args:
                visit(a)
            order.append(e)

        for e in exprs:
            visit(e)
        return [e for e in order if isinstance(e, sc.load) or count[e] > 1 and isinstance(e, (sc.FloatOp, sc.where, sc.floordiv, sc.mod, sc.trunc))]

    def _name(self, exprs) -> list[str]:
        lines = []
        for e in self._parts(exprs):
            text = self.printer(e)
            name = f"v{self.temporaries}" if isinstance(e, sc.load) else f"t{self.temporaries}"
            self.temporaries += 1
            self.printer.hoisted[e] = name
            lines.append(f"{name} = {text}")
        return lines


def helpers(nests: list[NestText], text: str) -> str:
    """The functions that the nests call."""
    names = sorted(set().union(*(n.helpers for n in nests)))
    return "\n\n".join([*(HELPERS[n] for n in names), *([REDUCERS.strip("\n") + "\n"] if used(text, ["larger", "smaller"]) else [])])
