"""The kernels of ``tileweld::linear`` as text: a tiled product, a product of few rows, the sum of split shares, and the rows made ready.

Outputs whose epilogues share a weight are one *group*: a program computes all accumulators of its columns in one loop over K, and
applies the epilogues to them. A loop with partner columns takes *slots* in place of columns: slot s stands for a column and its
partner (for columns without one, two of those), each an accumulator of its own, so that a rotation needs no exchange between
threads. Groups of one form (q, k and v) share the loop, with the pointers of theirs: two loops would not share their memory.

Where the prologue is r times the rest, the sum of squares is taken in the same loop and r multiplies the accumulators:

    sum_k (x_k r g_k) w_jk = r sum_k (x_k g_k) w_jk          r = rsqrt(sum_k x_k^2 / K + eps)
"""
from __future__ import annotations

import dataclasses
import functools

from ...compiler.errors import UnsupportedError
from ...compiler.ir import scalar as sc
from ...compiler.ir.linear import Spec
from ...compiler.ir.nodes import fdiv, fmul
from .linear_templates import COMBINE, FUNCTION, GEMV, HEAD, KERNEL, PREPARE, RECIPROCAL, STATISTICS, TILED, WALK
from .printer import HELPERS, TritonText
from .source import fill, used

CONSTANTS = ("ROWS", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK", "FUSED", "SPLIT", "EVEN_K", "INDEX")  # of the jit functions


@dataclasses.dataclass(frozen=True)
class Group:
    """Outputs that share weights, and so a width. before: the weights of the groups in front of it."""

    number: int
    outputs: tuple[int, ...]
    weights: tuple[int, ...]
    pair: tuple[int, int]
    before: tuple[str, ...]

    @property
    def width(self) -> str:
        return f"N{self.number}"


@dataclasses.dataclass(frozen=True)
class Loop:
    """Groups that one loop over K can serve, as q, k and v: as many weights each, of the same dtypes, and at most one kind of pairs."""

    groups: tuple[Group, ...]
    block: int
    half: int

    @property
    def weights(self) -> range:
        """The weights of any of the groups, as the loop counts them."""
        return range(len(self.groups[0].weights))

    @property
    def parts(self) -> tuple[int, ...]:
        """Columns of a slot: (0,), or (0, 1) where columns have partners."""
        return (0, 1) if self.half else (0,)

    @property
    def per_block(self) -> int:
        """Slots of a block of columns."""
        return (self.block + 1) // 2

    @property
    def spread(self) -> int:
        """By how much a program's BLOCK_N is divided: its accumulators, up to a power of two."""
        return 1 << (len(self.weights) * len(self.parts) - 1).bit_length()

    def slots(self, width: str) -> str:
        return f"({width} + {self.block - 1}) // {self.block} * {self.per_block}" if self.half else width

    def each(self):
        """(weight, part, accumulator's name), in the order of the loop."""
        return [(w, q, f"a{w}_{q}") for w in self.weights for q in self.parts]


def loops_of(spec: Spec, weight_dtypes) -> tuple[Loop, ...]:
    """The outputs, joined where they share a weight, and these groups where they share a loop. Raises UnsupportedError where one weight has two kinds of pairs."""
    joined: list[tuple[list[int], set[int]]] = []
    for o in range(len(spec.epilogues)):
        outputs, weights = [o], set(spec.accumulators(o))
        for other in [x for x in joined if x[1] & weights]:
            joined.remove(other)
            outputs, weights = other[0] + outputs, weights | other[1]
        joined.append((outputs, weights))
    groups: list[Group] = []
    for outputs, weights in joined:
        pairs = {spec.pairs[o] for o in outputs if spec.partners(o)}
        if len(pairs) > 1:
            raise UnsupportedError(f"no Triton linear kernel for pairs {sorted(pairs)} of the same weight", cure="make them outputs of two ops, or use the reference target")
        before = tuple(g.width for g in groups for _ in g.weights)
        groups.append(Group(len(groups), tuple(sorted(outputs)), tuple(sorted(weights)), pairs.pop() if pairs else (0, 0), before))
    loops: list[list[Group]] = []
    for group in sorted(groups, key=lambda g: g.pair == (0, 0)):  # those with pairs first: the others can follow any
        for loop in loops:
            same = [weight_dtypes[w] for w in loop[0].weights] == [weight_dtypes[w] for w in group.weights]
            if same and group.pair in (loop[0].pair, (0, 0)):
                loop.append(group)
                break
        else:
            loops.append([group])
    return tuple(Loop(tuple(sorted(loop, key=lambda g: g.number)), *loop[0].pair) for loop in loops)


def without_r(e):
    """e / r where e is r times something without r, else None."""
    if e == sc.R:
        return sc.number(1)
    if isinstance(e, fmul):
        x, y = e.args
        inner, other = (x, y) if x.has(sc.R) else (y, x)
        rest = None if other.has(sc.R) else without_r(inner)
        return None if rest is None else sc.mul(other, rest) if inner is y else sc.mul(rest, other)
    if isinstance(e, fdiv) and not e.args[1].has(sc.R):
        rest = without_r(e.args[0])
        return None if rest is None else sc.div(rest, e.args[1])
    return None


class LinearText:
    """The jit functions of one Spec. wide: fp32 products, of fp32 inputs or of mixed ones; overflows: dot inputs are fp16; maxima: outputs whose rows' largest magnitudes are taken."""

    def __init__(self, spec: Spec, *, weight_dtypes, wide: bool, overflows: bool, capture_ranks, num_sizes: int, maxima=()):
        self.spec, self.wide, self.loops, self.maxima = spec, wide, loops_of(spec, weight_dtypes), tuple(maxima)
        if any(not 0 <= o < len(spec.epilogues) for o in maxima):
            raise UnsupportedError(f"maxima of the outputs {list(maxima)}, there are {len(spec.epilogues)}")
        self.groups = tuple(sorted((g for loop in self.loops for g in loop.groups), key=lambda g: g.number))
        self.prologue = spec.prologue_expr
        self.has_prologue = self.prologue != sc.X
        self.needs = {s for s in (sc.R, sc.U) if self.prologue.has(s)}
        self.rest = without_r(self.prologue) if self.needs == {sc.R} and spec.norm == "rms" else None
        self.deferred = self.rest is not None
        # in the tiled loop the rest is rounded to the dot's dtype before r has shrunk it: x w may exceed fp16 where x r w does not
        self.fusable = self.has_prologue and (not self.needs or (self.deferred and (self.rest == sc.X or not overflows)))
        self.helpers: set[str] = set()
        g, outputs = self.groups, range(len(spec.epilogues))
        weights = sorted({w for group in g for w in group.weights})
        self.captures = [name for k, rank in enumerate(capture_ranks)
                         for name in (f"c{k}_ptr", *(f"c{k}_s{axis}" for axis in range(rank)), *(f"c{k}_n{axis}" for axis in range(rank)))]
        self.parameters = [*(f"out{o}_ptr" for o in outputs), *(f"top{n}_ptr" for n in range(len(self.maxima))), "x_ptr", *(f"w{w}_ptr" for w in weights), "y_ptr", "partial_ptr", "squares_ptr", *self.captures,
                           "M", "K", *(group.width for group in g), "splits", *(f"stride_o{o}{axis}" for o in outputs for axis in "mn"), "stride_xm", "stride_xk",
                           *(f"stride_w{w}n" for w in weights), "stride_wk", "eps", *(f"n{n}" for n in range(num_sizes))]
        self.total = " + ".join(f"{len(group.weights)} * {group.width}" if len(group.weights) > 1 else group.width for group in g)
        self.signatures: dict[str, list[str]] = {}  # kernel -> its parameters; constexprs follow as `constants` says
        self.constants: dict[str, list[str]] = {}

    # ------------------------------------------------------------------------------------------ printing
    def print(self, e, names: dict, guards: dict) -> str:
        printer = TritonText(names, guards)
        text = printer(e)
        self.helpers |= printer.helpers
        return text

    def transformed(self, deferred: bool, rows: bool = True) -> str:
        """The prologue of the tile xf, at columns k."""
        e = self.rest if deferred else self.prologue
        row = "[:, None]" if rows else ""
        text = self.print(e, {"x": "xf", "r": f"r{row}", "u": f"u{row}", "j": "k"}, {"j": "k < K"} | ({"i": "i < M"} if rows else {}))
        return text if e.has(sc.X) else f"{text} + tl.zeros_like(xf)"

    @functools.cached_property
    def zero_stays(self) -> bool:
        """Is the prologue 0 where x is 0, so that columns beyond K need no second mask? Products with x, no more."""
        def holds(e):
            return e == sc.X or (isinstance(e, fmul) and any(map(holds, e.args)) and all(isinstance(a, (fmul, sc.load)) or a in (sc.X, sc.R) or sc.is_const(a) for a in e.args))
        return holds(self.rest if self.deferred else self.prologue)

    def statistics(self, axis: int, x: str, mask: str, block: str) -> list[str]:
        """Mean and reciprocal deviation of the rows in passes of their own: x: pointer at column k."""
        if not self.needs or (axis and self.deferred):
            return []
        zeros = "tl.zeros([ROWS], tl.float32)" if axis else "0.0"
        row = "[:, None]" if axis else ""
        mean = [f"u = {zeros}", f"for k0 in tl.range(0, K, {block}):", f"    k = {'(k0 + ks)[None, :]' if axis else 'k0 + ks'}", f"    u += tl.sum(tl.load({x}, mask={mask}, other=0.0).to(tl.float32), {axis})",
                "u = u / K"] if self.spec.norm == "layer" else []
        centred = f"tl.where({mask}, xf - u{row}, 0.0)" if mean else "xf"
        return [fill(STATISTICS, mean=mean, zeros=zeros, block=block, k="(k0 + ks)[None, :]" if axis else "k0 + ks", x=x, mask=mask, centred=centred, axis=axis,
                     reciprocal=RECIPROCAL)] if sc.R in self.needs else mean

    # ------------------------------------------------------------------------------------------ columns
    def select(self, loop: Loop, count: str, weights: bool = True, base: bool = True) -> list[str]:
        """The group that the program belongs to: its width N, pointers and strides of its weights, and its column ``base`` in partial; tile counts within it."""
        def values(group):
            lines = [f"N = {group.width}", *([f"base = {' + '.join(group.before) or 'tile * 0'}"] if base else [])]
            return lines + [line for n, w in enumerate(group.weights) for line in (f"v{n}_ptr = w{w}_ptr", f"stride_v{n}n = stride_w{w}n") if weights]

        first, *others = loop.groups
        lines = values(first)
        if others:
            lines += ["first = tile * 0", f"first1 = {count.format(self._tiles(loop, first))}"]
        for n, group in enumerate(others, 1):
            lines += [f"if tile >= first{n}:", f"    first = first{n}", *("    " + line for line in values(group))]
            if n < len(others):
                lines.append(f"first{n + 1} = first{n} + {count.format(self._tiles(loop, group))}")
        return [*lines, "program = tile", "tile -= first"] if others else lines

    @staticmethod
    def _tiles(loop: Loop, group: Group) -> str:
        return f"tl.cdiv({loop.slots(group.width)}, BLOCK_N // {loop.spread})"

    def columns(self, loop: Loop) -> list[str]:
        """columns0, columns1: the columns of the program's slots, N and more where there is none."""
        slots = "block_n * WIDTH + tl.arange(0, WIDTH).to(INDEX)"
        if not loop.half:
            return [f"columns0 = {slots}", "j0 = columns0[None, :]"]
        block, half, per_block = loop.block, loop.half, loop.per_block
        singles = block - 2 * half
        lines = [f"slots = {slots}"]
        if not singles:
            first = f"slots + slots // {half} * {half}" if half > 1 else "slots * 2"
            lines += [f"columns0 = {first}", f"columns1 = columns0 + {half}"]
        else:
            rest = (singles + 1) // 2  # columns 2 half + u and 2 half + rest + u, which are their own partners, share a slot
            lines += [f"within = slots % {per_block}", f"paired = (within < {half})[None, :]",
                      f"columns0 = slots // {per_block} * {block} + tl.where(within < {half}, within, within + {half})",
                      f"columns1 = columns0 + tl.where(within < {half}, {half}, {rest})"]
            if singles % 2:
                lines.append(f"columns1 = tl.where(within < {per_block - 1}, columns1, N)  # the odd one is alone")
        return [*lines, "j0 = columns0[None, :]", "j1 = columns1[None, :]"]

    # ------------------------------------------------------------------------------------------ after the loop
    def finish(self, loop: Loop, scale: str = "") -> list[str]:
        """Scale the accumulators, apply the epilogues, store. scale: "always", "" or a flag of the kernel."""
        lines = []
        if scale:
            scaled = [RECIPROCAL, *(f"{name} *= r[:, None]" for *_, name in loop.each())]
            lines = scaled if scale == "always" else [f"if {scale}:", *("    " + line for line in scaled)]
        for n, group in enumerate(loop.groups):
            stores = self._outputs(loop, group)
            if len(loop.groups) == 1:
                lines += stores
            else:
                head = "else:" if n == len(loop.groups) - 1 else f"{'el' if n else ''}if program < first{n + 1}:"
                lines += [head, *("    " + line for line in stores)]
        return lines

    def _outputs(self, loop: Loop, group: Group) -> list[str]:
        lines = []
        for o in group.outputs:
            for q in loop.parts:
                names = {f"a{w}": f"a{n}_{q}" for n, w in enumerate(group.weights)} | {"j": f"j{q}"}
                if loop.half:
                    singles = loop.block > 2 * loop.half
                    names |= {f"p{w}": f"tl.where(paired, a{n}_{1 - q}, a{n}_{q})" if singles else f"a{n}_{1 - q}" for n, w in enumerate(group.weights)}
                lines.append(f"y{q} = ({self.print(self.spec.epilogue_exprs[o], names, {'i': 'i < M', 'j': f'j{q} < N'})}).to(out{o}_ptr.dtype.element_ty)")
            if (loop.block, loop.half) == (2, 1):  # neighbours: one store of whole runs
                lines += ["j = (block_n * (2 * WIDTH) + tl.arange(0, 2 * WIDTH).to(INDEX))[None, :]",
                          f"tl.store(out{o}_ptr + i * stride_o{o}m + j * stride_o{o}n, tl.interleave(y0, y1), mask=(i < M) & (j < N))"]
            else:
                lines += [f"tl.store(out{o}_ptr + i * stride_o{o}m + j{q} * stride_o{o}n, y{q}, mask=(i < M) & (j{q} < N))" for q in loop.parts]
            lines += [line for n, number in enumerate(self.maxima) if number == o for line in self._maximum(n, loop.parts)]
        return lines

    @staticmethod
    def _maximum(number: int, parts: tuple[int, ...]) -> list[str]:
        """The largest magnitude of the results y0, y1 as they are stored, into the rows' numbers: as bits, which are ordered as magnitudes are (NaN above inf), so that the order of programs is no matter."""
        bits = [f"tl.where((i < M) & (j{q} < N), y{q}.to(tl.float32), 0.0).to(tl.int32, bitcast=True) & 0x7fffffff" for q in parts]
        return [f"top = {bits[0] if len(bits) == 1 else f'tl.maximum({bits[0]}, {bits[1]})'}", f"tl.atomic_max(top{number}_ptr + i, tl.max(top, 1)[:, None], mask=i < M, sem=\"relaxed\")"]

    def _partials(self, loop: Loop, split: str):
        """(accumulator, pointer to its share, mask) of every accumulator; a weight's columns lie side by side."""
        row = f"(tl.cast({split}, tl.int64) * M + i) * ({self.total})"
        return [(name, " + ".join([f"partial_ptr + {row} + base", *["N"] * n, f"j{q}"]), f"(i < M) & (j{q} < N)") for n, q, name in loop.each()]

    # ------------------------------------------------------------------------------------------ the kernels
    def head(self, loop: Loop, weights: bool) -> str:
        return fill(HEAD, select=self.select(loop, "tl.cdiv(M, BLOCK_M) * {}", weights), spread=f"BLOCK_N // {loop.spread}", slots=loop.slots("N"), columns=self.columns(loop))

    @staticmethod
    def zeros(loop: Loop, shape: str) -> list[str]:
        return [f"{name} = tl.zeros({shape}, tl.float32)" for *_, name in loop.each()]

    @property
    def squares(self) -> bool:
        """Does the tiled loop take the sum of squares?"""
        return self.deferred and self.fusable

    def tiled(self, loop: Loop) -> str:
        products = []
        for n, q, name in loop.each():
            tile = f"tile{n}_{q}"
            products += [f"if EVEN_K:\n    w = tl.load({tile}, mask=j{q} < N, other=0.0)\nelse:\n    w = tl.load({tile}, mask=(j{q} < N) & (k0 + ks < K)[:, None], other=0.0)",
                         self.multiply(n, q, name), f"{tile} += BLOCK_K * tl.cast(stride_wk, INDEX)"]
        transform = ["y = x"]
        if self.fusable:
            keep = [] if self.zero_stays else ["    if not EVEN_K:  # there w is 0 and y need not be finite", "        y = tl.where(k < K, y, 0.0)"]
            transform = ["if FUSED:", "    k = (k0 + ks)[None, :]", "    xf = x.to(tl.float32)", *(["    sq += tl.sum(xf * xf, 1)"] if self.deferred else []),
                         f"    y = {self.transformed(self.deferred)}", *keep, "    y = y.to(x.dtype)", "else:", "    y = x"]
        tiles = [f"tile{n}_{q} = v{n}_ptr + (k_first + ks).to(INDEX)[:, None] * stride_wk + j{q} * stride_v{n}n" for n, q, _ in loop.each()]
        walk = fill(WALK, tiles=tiles, squares=["sq = tl.zeros([BLOCK_M], tl.float32)"] if self.squares else [], zeros=self.zeros(loop, "[BLOCK_M, WIDTH]"), transform=transform, products=products)
        store = [f"tl.store({pointer}, {name}, mask={mask})" for name, pointer, mask in self._partials(loop, "split")]
        if self.squares and loop is self.loops[0]:
            first = "block_n" if len(loop.groups) == 1 else "block_n + first"
            store += ["if FUSED:", f"    if {first} == 0:  # one column of programs is enough", "        tl.store(squares_ptr + tl.cast(split, tl.int64) * M + rows, sq, mask=rows < M)"]
        return fill(TILED, head=self.head(loop, True), walk=walk, scaled=self.scaled(loop), store=store, finish=self.finish(loop, "FUSED" if self.squares else ""))

    def multiply(self, n: int, q: int, name: str) -> str:
        """Adds the product of the tiles y and w, the columns q of the loop's weight n."""
        return f"{name} = tl.dot(y.to(tl.float32), w.to(tl.float32), {name}, input_precision=\"ieee\")" if self.wide else f"{name} = tl.dot(y, w, {name})"

    def weight(self, n: int, q: int) -> str:
        """The tile of weights that gemv multiplies with, in fp32."""
        return f"w{n}_{q}.to(tl.float32)"

    def scaled(self, loop: Loop) -> list[str]:
        """What is done to the sums before anything else."""
        return []

    def combine(self, loop: Loop) -> str:
        add = [f"{name} += tl.load({pointer}, mask={mask}, other=0.0)" for name, pointer, mask in self._partials(loop, "share")]
        zeros = self.zeros(loop, "[BLOCK_M, WIDTH]")
        if self.squares:
            zeros.append("sq = tl.zeros([BLOCK_M], tl.float32)")
            add += ["if FUSED:", "    sq += tl.load(squares_ptr + tl.cast(share, tl.int64) * M + rows, mask=rows < M, other=0.0)"]
        return fill(COMBINE, head=self.head(loop, False), zeros=zeros, add=add, finish=self.finish(loop, "FUSED" if self.squares else ""))

    def gemv(self, loop: Loop) -> str:
        loads, products = [], []
        for n, q, name in loop.each():
            tile, inside = f"v{n}_ptr + columns{q}[:, None] * stride_v{n}n + k * stride_wk", f"(columns{q} < N)[:, None]"
            loads.append(f"if EVEN_K:\n    w{n}_{q} = tl.load({tile}, mask={inside}, other=0.0, eviction_policy=\"evict_first\")\n"
                         f"else:\n    w{n}_{q} = tl.load({tile}, mask={inside} & (k < K), other=0.0, eviction_policy=\"evict_first\")")
            products.append(f"{name} += y * ({self.weight(n, q)})[None, :, :]")
        keep = [] if self.zero_stays else ["if not EVEN_K:", "    y = tl.where(k < K, y, 0.0)"]
        x = "x_ptr + i * stride_xm + k.to(INDEX) * stride_xk"
        return fill(GEMV, select=self.select(loop, "{}", base=False), spread=f"BLOCK_N // {loop.spread}", columns=self.columns(loop), statistics=self.statistics(1, x, "(i < M) & (k < K)", "BLOCK_K"),
                    zeros=self.zeros(loop, "[ROWS, WIDTH, BLOCK_K]") + (["sq = tl.zeros([ROWS], tl.float32)"] if self.deferred else []), loads=loads, x=x,
                    squares=["sq += tl.sum(xf * xf, 1)"] if self.deferred else [], transform=self.transformed(self.deferred), keep=keep, products=products,
                    sums=[*(f"{name} = tl.sum({name}, 2)" for *_, name in loop.each()), *self.scaled(loop)], finish=self.finish(loop, "always" if self.deferred else ""))

    def prepare(self) -> str:
        """Rows through the prologue, once for all columns; "" without a prologue."""
        if not self.has_prologue:
            return ""
        x = "x_row + tl.cast(k, tl.int64) * stride_xk"
        body = fill(PREPARE, statistics=self.statistics(0, x, "k < K", "BLOCK"), x=x, transform=self.transformed(False, rows=False))
        return self._kernel("prepare_kernel", "One row of x through the prologue, in x's dtype.", [], body)

    def _kernel(self, name: str, what: str, functions: list[str], body: str) -> str:
        self.signatures[name] = used(body, self.parameters)
        self.constants[name] = used(body, CONSTANTS)
        loose = [f'"{p}"' for p in self.signatures[name] if p in ("M", "splits", "eps", "threshold") or (p[0] == "n" and p[1:].isdigit())]
        arguments = ", ".join([*self.signatures[name], *(f"{c}: tl.constexpr" for c in self.constants[name])])
        return "\n\n".join([*functions, fill(KERNEL, name=name, arguments=arguments, what=what, body=body, loose=", ".join(loose))])

    def _looped(self, name: str, what: str, text, count: str) -> str:
        """A kernel whose programs are the tiles of one loop behind those of another; where there are several, each is a function."""
        splits = ["split = tl.program_id(1)"] if name == "tiled" and "split" in used("\n".join(map(text, self.loops)), ["split"]) else []
        if len(self.loops) == 1:
            return self._kernel(f"{name}_kernel", what, [], "\n".join(["tile = tl.program_id(0)", *splits, text(self.loops[0])]))
        functions, lines = [], ["tile = tl.program_id(0)", *splits]
        for n, loop in enumerate(self.loops):
            body = text(loop)
            arguments = used(body, ["tile", "split", *self.parameters, *CONSTANTS])
            functions.append(fill(FUNCTION, name=f"{name}_{n}", arguments=", ".join(f"{a}: tl.constexpr" if a in CONSTANTS else a for a in arguments), body=body))
            call, indent = f"{name}_{n}({', '.join(arguments)})", "    " * n
            if n == len(self.loops) - 1:
                lines.append(indent + call)
                break
            tiles = " + ".join(count.format(self._tiles(loop, group)) for group in loop.groups)
            lines += [indent + line for line in (f"tiles = {tiles}", "if tile < tiles:", f"    {call}", "else:", "    tile -= tiles")]
        return self._kernel(f"{name}_kernel", what, functions, "\n".join(lines))

    def kernels(self) -> str:
        """All jit functions; sets `signatures` and `constants`."""
        made = [self.prepare(),
                self._looped("tiled", "Grid (tiles, splits). FUSED: the prologue is applied to x in the loop. SPLIT: fp32 shares of K go to partial.", self.tiled,
                              "tl.cdiv(M, BLOCK_M) * {}"),
                self._looped("combine", "Adds the shares of K in their order and applies the epilogue.", self.combine, "tl.cdiv(M, BLOCK_M) * {}"),
                self._looped("gemv", "All M <= ROWS rows with BLOCK_N columns; every weight is read once.", self.gemv, "{}")]
        return "\n\n".join([*self.helper_texts(), *filter(None, made)])

    def helper_texts(self) -> list[str]:
        """The functions that the printed expressions call."""
        return [HELPERS[name] for name in sorted(self.helpers)]
