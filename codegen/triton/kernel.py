"""The tiled forward kernel of ``tileweld::attention``: one template for every score and mask.

A program takes BLOCK_M query rows of one head and walks over tiles of BLOCK_N keys with the online softmax
(FlashAttention-2, 2307.08691, algorithm 1), in base 2:

    m' = max(m, max_j x)     p = 2^(x - m')     l' = l 2^(m - m') + sum_j p     acc' = acc 2^(m - m') + p v

Tiles outside the mask's range of keys are never visited; those inside on every row are visited without a mask. Masked
elements are -inf, and a row with m = -inf subtracts 0 instead, so that -inf - -inf never arises. With a finite ``fill``,
what is masked adds exp(fill - m): nothing in fp32 if m > fill + 104; a block with another row is computed again over all keys.
"""
from __future__ import annotations

import dataclasses
import functools
import math

import sympy
import torch
from sympy.core.relational import Relational

from ...compiler.ir import scalar as sc
from ...compiler.ir.attention import Variant
from .bounds import Ranges, ends, ranges
from .printer import FP32_MAX, HELPERS, LOG2E, TritonText, float_text, fold_log2e
from .source import fill, used
from .tiles import Chunk, chunks

ALWAYS = ("H", "GROUP_K", "GROUP_R", "GROUP_V", "Tq", "Tk")  # sizes that every kernel reads, GROUP_R where keys have a second part
KEYS = "kr"  # the tensors of a key's parts: k, and r beside it along the head dim
NEGLIGIBLE = 104.0  # exp(-104) is below half of the smallest positive float32

ATTEND = '''
@triton.jit
def attend($arguments):
    """Online softmax over the key tiles from ``start`` to ``stop``. MASKED: a tile may hold masked keys or end beyond Tk.
    EXACT: masked keys have the score fill instead of none."""
    $dims
    for j0 in tl.range(start, stop, BLOCK_N):
        $tile
    return $state
'''

TILE = '''
keys = tl.arange(0, BLOCK_N)
j = j0 + keys[None, :]
$tiles
v_tile = v_ptr + tl.cast(j0, tl.int64) * stride_vj
$scores
$softmax
$values
m = m_new
'''

KERNEL = '''
@triton.jit(do_not_specialize=[$unspecialized])
def attention_kernel($arguments):
    $wide
    blocks = tl.cdiv(Tq, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    i0 = $first_row * BLOCK_M$order
    b = head // H
    h = head % H
    i_lo = i0
    i_hi = tl.minimum(i0 + BLOCK_M, Tq) - 1
    rows = i0 + tl.arange(0, BLOCK_M)
    i = rows[:, None]
    # offsets of batches, heads and blocks in 64 bits; inside a tile 32 bits, where the host has found them to be enough
    local = tl.arange(0, BLOCK_M)[:, None]
    q_rows = q_ptr + tl.cast(b, tl.int64) * stride_qb + tl.cast(h, tl.int64) * stride_qh + tl.cast(i0, tl.int64) * stride_qi + local * stride_qi
    $keys
    v_ptr += tl.cast(b, tl.int64) * stride_vb + tl.cast(h // GROUP_V, tl.int64) * stride_vh
    out_rows = out_ptr + tl.cast(b, tl.int64) * stride_ob + tl.cast(h, tl.int64) * stride_oh + tl.cast(i0, tl.int64) * stride_oi + local * stride_oi
    $queries
    $hoisted
    $start
    $bounds
    $loops
    $exact
    $finish
'''


def _loads_under_conditions(e):
    """where(c, x, load) as where(not c, load, x), whose load is of the elements that take it alone (the newest keys are a tile or two of thousands)."""
    if not isinstance(e, sc.where):
        return e
    c, x, y = e.args[0], *map(_loads_under_conditions, e.args[1:])
    return sc.where(sympy.Not(c), y, x) if isinstance(y, sc.load) and not isinstance(x, sc.load) and isinstance(c, Relational) else sc.where(c, x, y)


def _group(element) -> int:
    """n where all keys of [m n, (m + 1) n) read the same element for a channel, 0 for none."""
    parts = {a for a in element.atoms(sc.floordiv) if a.args[0] == sc.J and a.args[1].is_Integer and a.args[1] > 0}
    return math.gcd(*(int(a.args[1]) for a in parts)) if parts and not element.xreplace({a: sympy.Integer(0) for a in parts}).has(sc.J) else 0


def widened_strides(parameters: list[str]) -> list[str]:
    """Where a tile's offsets leave 32 bits they are products with strides of 64."""
    return ["if INDEX == tl.int64:", *(f"    {name} = tl.cast({name}, tl.int64)" for name in parameters if name.startswith("stride_") and name[-1] in "ijd")]


class AttentionText:
    """The parts of one variant's kernel as text."""

    def __init__(self, variant: Variant, key_dims: tuple[int, ...], value_dim: int, q_dtype: torch.dtype, widened_keys: bool = False, widened_values: bool = False, lse: bool = False):
        self.lse, self.variant, self.single, self.widened_keys, self.widened_values = lse, variant, q_dtype == torch.float32, widened_keys, widened_values
        self.wide_range = q_dtype == torch.float16 and widened_values and variant.value_expr is not None  # weights times a scale of 1e-4 leave fp16's normal numbers; bf16 holds int8 exactly
        self.keys = KEYS[:len(key_dims)]
        starts = [sum(key_dims[:n]) for n in range(len(key_dims))]
        self.key_chunks = [(letter, start, dataclasses.replace(c, start=start + c.start)) for letter, start, dim in zip(self.keys, starts, key_dims) for c in chunks(dim)]
        self.qk_chunks, self.v_chunks = tuple(c for *_, c in self.key_chunks), chunks(value_dim)
        self.masked = variant.mask_expr is not sympy.true
        self.ranges: Ranges = ranges(variant.mask_expr)
        self.value_dim = value_dim
        self.dense = any(load.has(sc.I) and load.has(sc.J) for e in (variant.score_expr, variant.mask_expr, variant.value_expr, variant.offset_expr) if e is not None for load in sc.loads(e))
        self.test_reads_head = self.ranges.tile_test.has(sc.H)
        self.tested = self.ranges.tile_test is not sympy.true
        self.finite_fill = self.masked and math.isfinite(variant.fill)
        self.helpers, self.wrapped = set(), set()
        score = variant.score_expr
        folded = fold_log2e(score)
        scale = variant.linear_scale
        # x is the score times 1/unit, so that the weight is 2^(unit (x - m)); with one positive factor, x stays the raw dot
        # product in the loop and the factor joins the subtraction in one FMA
        self.raw_scale = scale * LOG2E if scale and 0 < scale < 1e30 else None
        self.unit, self.score = (1.0, folded) if folded is not None else (LOG2E, score)
        value = list(dict.fromkeys(load for e in (variant.value_expr, variant.offset_expr) if e is not None for load in sc.loads(e)))
        self.key = None if variant.key_expr is None else _loads_under_conditions(variant.key_expr)
        self.dense |= self.key is not None  # a captured element for every one of a tile of keys
        self.hoisted_keys = {load: f"c{load.args[0].name[1:]}_keys{n}" for n, load in enumerate(x for x in (sc.loads(self.key) if self.key is not None else ()) if not x.has(sc.J) and not x.has(sc.D))}  # h is the keys' there
        in_groups = {load: n for load in (sc.loads(self.key) if self.key is not None else ()) if load not in self.hoisted_keys and (n := _group(load))}
        self.grouped = {load: f"c{load.args[0].name[1:]}_group{n}" for n, load in enumerate(in_groups)}
        self.group = math.gcd(*in_groups.values())  # positions that share what they are multiplied with; 0 where there are none
        self.hoisted = {load: f"c{load.args[0].name[1:]}_{'row' if load.has(sc.I) else 'head'}{n}"
                        for n, load in enumerate(x for x in sc.loads(score) + [y for y in sc.loads(variant.mask_expr) if y not in sc.loads(score)] + [y for y in value if y not in sc.loads(score) + sc.loads(variant.mask_expr)] if not x.has(sc.J))}

    # ------------------------------------------------------------------------------------------ printing
    def print(self, e, *, names=None, guards=None, hoisted=None) -> str:
        printer = TritonText(names, guards, hoisted)
        text = printer(e)
        self.helpers |= printer.helpers
        self.wrapped |= printer.wrapped
        return text

    def in_tile(self, e, masked: bool) -> str:
        return self.print(e, guards={"i": "i < Tq"} | ({"j": "j < Tk"} if masked else {}), hoisted=self.hoisted)

    def by_row(self, e, packed: bool = False) -> str:
        return self.print(e, names={"i": "rows", "h": "heads" if packed else "h"}, guards={"i": "rows < Tq"})

    def in_units(self, value: float) -> float:
        """A natural score in the units of x, kept finite."""
        return max(-FP32_MAX, min(FP32_MAX, value * LOG2E if self.unit == 1.0 else value))

    # ------------------------------------------------------------------------------------------ one tile
    def _load(self, name: str, pointer: str, chunk: Chunk, dim: str, key_axis: str) -> list[str]:
        inside = f"({dim} < {chunk.start + chunk.used})" if chunk.padded else ""
        masked = " & ".join(filter(None, (f"({key_axis} < Tk)", inside)))
        plain = f"tl.load({pointer}, mask={inside}, other=0.0)" if inside else f"tl.load({pointer})"
        return [f"if MASKED:\n    {name} = tl.load({pointer}, mask={masked}, other=0.0)\nelse:\n    {name} = {plain}"]

    def scores(self) -> list[str]:
        precision = ', input_precision="ieee"' if self.single else ""
        lines = []
        for n, (letter, start, chunk) in enumerate(self.key_chunks):
            dims = f"(dims{n}[:, None] - {start})" if start else f"dims{n}[:, None]"
            pointer = f"{letter}_tile + {dims} * stride_{letter}d + keys[None, :] * stride_{letter}j"
            lines += self._load(f"k{n}", pointer, chunk, f"dims{n}[:, None]", "j") if self.key is None else self._taken(n, pointer, chunk)
            lines.append(f"s = tl.dot(q{n}, k{n}{self.cast(self.widened_keys and self.key is None)}{', s' if n else ''}{precision})")
        return lines

    def _taken(self, n: int, pointer: str, chunk: Chunk) -> list[str]:
        """A tile of keys, [channels, keys], by their text; behind the stored ones k is 0."""
        dims = f"dims{n}[:, None]"
        inside = f"({dims} < {chunk.start + chunk.used})" if chunk.padded else ""
        names, padding = {"k": f"k{n}", "d": dims, "h": "key_head"}, {"d": inside} if inside else {}

        def taken(masked):
            guards = ({"j": "j < Tk"} if masked else {}) | padding
            text = self.print(self.key, names=names, guards=guards, hoisted=self.hoisted_keys | {load: name + f"_{n}" for load, name in self.grouped.items()})
            return f"tl.where({inside}, {text}, 0.0)" if inside else text  # queries are 0 in the padding, and 0 times inf would be NaN

        one = [f"{name}_{n} = {self.print(load, names=names | {'j': 'j0'}, guards=padding, hoisted=self.hoisted_keys)}" for load, name in self.grouped.items()]
        many = [f"{name}_{n} = {self.print(load, names=names, guards={'j': 'j < Tk'} | padding, hoisted=self.hoisted_keys)}" for load, name in self.grouped.items()]
        shares = ["\n".join([f"if {self.group} % BLOCK_N == 0:  # a tile lies in one group", *("    " + x for x in one), "else:", *("    " + x for x in many)])] if self.grouped else []
        return [*shares, f"k{n} = tl.load({pointer}, mask={' & '.join(filter(None, ('(j < stored_keys)', inside)))}, other=0.0).to(tl.float32)",
                f"if MASKED:\n    k{n} = {taken(True)}\nelse:\n    k{n} = {taken(False)}",
                f"k{n} = (k{n}{'' if self.key.has(sc.K) else f' + tl.zeros([{chunk.width}, BLOCK_N], tl.float32)'}).to(q0.dtype)"]

    @staticmethod
    def cast(widened: bool) -> str:
        """Stored elements become q's dtype in registers, which holds them exactly."""
        return ".to(q0.dtype)" if widened else ""

    def softmax(self) -> list[str]:
        masked, plain = (self.in_tile(self.score, masked) + ("" if self.score.has(sc.S) else " + tl.zeros_like(s)") for masked in (True, False))
        raw = self.raw_scale is not None
        visible = f"({self.in_tile(self.variant.mask_expr, True)}) & (j < Tk)" if self.masked else "j < Tk"
        lines = []
        if raw:
            lines.append("x = s")
        elif masked == plain:
            lines.append(f"x = {plain}")
        else:
            lines.append(f"if MASKED:\n    x = {masked}\nelse:\n    x = {plain}")
        hide = f"x = tl.where({visible}, x, float(\"-inf\"))"
        if self.finite_fill:
            score_fill = float_text(self.in_units(self.variant.fill))
            exact = f"x = tl.where({self.in_tile(self.variant.mask_expr, True)}, {masked if raw else 'x'}, {score_fill})\n    x = tl.where(j < Tk, x, float(\"-inf\"))"
            lines.append(f"if EXACT:\n    {exact}\nelif MASKED:\n    {hide}")
        else:
            lines.append(f"if MASKED:\n    {hide}")
        unit = self.times_unit
        scale = float_text(self.raw_scale) if raw else None
        general = ["m_new = tl.maximum(m, tl.max(x, 1))", "m_safe = tl.where(m_new == float(\"-inf\"), 0.0, m_new)", f"p = tl.exp2((x - m_safe[:, None]){unit})"]
        if raw:
            fused = [f"m_new = tl.maximum(m, tl.max(x, 1) * {scale})", general[1], f"p = tl.exp2(x * {scale} - m_safe[:, None])"]
            lines += ["if EXACT:", *("    " + x for x in general), "else:", *("    " + x for x in fused)] if self.finite_fill else fused
        else:
            lines += general
        return [*lines, f"alpha = tl.exp2((m - m_safe){unit})", "l = l * alpha + tl.sum(p, 1)"]

    def values(self) -> list[str]:
        precision = ', input_precision="ieee"' if self.single else ""
        lines, weights = [], "p"
        if (e := self.variant.value_expr) is not None:
            weights = "w"
            masked, plain = (self.in_tile(e, masked) for masked in (True, False))
            lines.append(f"w = p * ({plain})" if masked == plain else f"if MASKED:\n    w = p * ({masked})\nelse:\n    w = p * ({plain})")
        if (e := self.variant.offset_expr) is not None:
            masked, plain = (self.in_tile(e, masked) for masked in (True, False))
            lines.append(f"added = tl.sum(p * ({plain}), 1)" if masked == plain else f"if MASKED:\n    added = tl.sum(p * ({masked}), 1)\nelse:\n    added = tl.sum(p * ({plain}), 1)")
        for n, chunk in enumerate(self.v_chunks):
            lines += self._load(f"v{n}", f"v_tile + keys[:, None] * stride_vj + vdims{n}[None, :] * stride_vd", chunk, f"vdims{n}[None, :]", "(j0 + keys[:, None])")
            if self.widened_values:
                lines.append(f"v{n} = v{n}.to({'tl.bfloat16 if q0.dtype == tl.float16 else ' if self.wide_range else ''}q0.dtype)")
            offset = " + added[:, None]" if self.variant.offset_expr is not None else ""
            lines.append(f"acc{n} = tl.dot({weights}.to(v{n}.dtype), v{n}, acc{n} * alpha[:, None]{offset}{precision})")
        return lines

    @functools.cached_property
    def state(self) -> list[str]:
        return [*(f"acc{n}" for n in range(len(self.v_chunks))), "m", "l"]

    @staticmethod
    def _dims(name: str, parts: tuple[Chunk, ...]) -> list[str]:
        return [f"{name}{n} = {f'{c.start} + ' if c.start else ''}tl.arange(0, {c.width})" for n, c in enumerate(parts)]

    def attend(self, scalars: list[str]) -> tuple[str, list[str]]:
        """The function of the loop, and the names it takes from the kernel around it."""
        tile = fill(TILE, tiles=[f"{x}_tile = {x}_ptr + tl.cast(j0, tl.int64) * stride_{x}j" for x in self.keys], scores=self.scores(), softmax=self.softmax(), values=self.values())
        if self.tested:
            may = self.print(self.ranges.tile_test, names={"j_lo": "j0", "j_hi": "(tl.minimum(j0 + BLOCK_N, Tk) - 1)"})
            head = f"if TEST:\n    visit = {may}\nelse:\n    visit = j0 >= 0\nif visit:  # else the tile holds no visible key\n"
            tile = head + "".join(f"    {line}\n" for line in tile.splitlines())
        names = used(tile, ["b", "h", "key_head", "i_lo", "i_hi", *scalars, *self.hoisted.values(), *self.hoisted_keys.values()])
        arguments = [*self.state, *(f"q{n}" for n in range(len(self.qk_chunks))), *(f"{x}_ptr" for x in self.keys), "v_ptr", *(f"stride_{x}{axis}" for x in (*self.keys, "v") for axis in "jd"), "i", *names, "start", "stop"]
        constants = ["BLOCK_N: tl.constexpr", "MASKED: tl.constexpr", "EXACT: tl.constexpr", *(["TEST: tl.constexpr"] if self.tested else [])]
        dims = self._dims("dims", self.qk_chunks) + self._dims("vdims", self.v_chunks)
        return fill(ATTEND, arguments=", ".join(arguments + constants), dims=dims, tile=tile, state=", ".join(self.state)), arguments[:-2]

    # ------------------------------------------------------------------------------------------ around the loop
    def call(self, arguments: list[str], start: str, stop: str, masked: bool, *, exact: bool = False, test: bool = True) -> str:
        flags = f"MASKED={masked}, EXACT={exact}" + (f", TEST={test and not exact}" if self.tested else "")
        return f"{', '.join(self.state)} = attend({', '.join(arguments)}, {start}, {stop}, BLOCK_N, {flags})"

    def bound(self, e, packed: bool = False) -> tuple[str, str]:
        """(lowest, highest) over the rows of the block, as scalars."""
        both = ends(e) if not (packed and e.has(sc.H)) else None
        if both is not None:
            return self.print(both[0]), self.print(both[1])
        text = self.by_row(e, packed)  # a bound that each row reads for itself, such as j <= c0[i]
        rows = f"{text} + tl.zeros_like(rows)"
        return f"tl.min(tl.where(rows < Tq, {rows}, {2**31 - 1}), 0)", f"tl.max(tl.where(rows < Tq, {rows}, {-2**31}), 0)"

    def bounds(self, packed: bool = False) -> list[str]:
        """first <= full_first <= full_last <= last, in keys, all but the ends at multiples of BLOCK_N."""
        lows, highs = [self.bound(e, packed) for e in self.ranges.lowers], [self.bound(e, packed) for e in self.ranges.uppers]
        full = self.ranges.has_full_tiles and not packed
        lines = ["# keys [first, last) are visible to some row of the block" + (", [full_first, full_last) to every one" if full else "")]
        lines += ["last = Tk", "full_last = Tk"] if full else ["last = Tk"]
        for low, high in highs:
            lines.append(f"last = tl.minimum(last, {high} + 1)")
            if full:
                lines.append(f"full_last = tl.minimum(full_last, {low} + 1)")
        lines.append("last = tl.cast(tl.maximum(last, 0), tl.int32)")
        if lows or packed:
            lines += [f"first = tl.maximum({first}, {low})" for first, (low, _) in zip(["0", *["first"] * len(lows)], lows)] or ["first = last * 0"]
            lines.append("first = tl.cast(tl.minimum(first, Tk), tl.int32) // BLOCK_N * BLOCK_N")
        if full and lows:
            lines += [f"full_first = tl.maximum({first}, {high})" for first, (_, high) in zip(["0", *["full_first"] * len(lows)], lows)]
            lines.append("full_first = tl.cdiv(tl.cast(tl.minimum(full_first, Tk), tl.int32), BLOCK_N) * BLOCK_N")
            lines.append("full_first = tl.minimum(full_first, tl.maximum(tl.cdiv(last, BLOCK_N) * BLOCK_N, first))")
        if full:
            lines.append("full_last = tl.cast(tl.maximum(full_last, 0), tl.int32) // BLOCK_N * BLOCK_N")
            lines.append(f"full_last = tl.maximum(tl.minimum(full_last, last), {'full_first' if lows else '0'})")
        return lines

    def loops(self, arguments: list[str]) -> list[str]:
        lows = bool(self.ranges.lowers)
        if not self.ranges.has_full_tiles:
            return [self.call(arguments, "first" if lows else "0", "last", True)]
        calls = [self.call(arguments, "first", "tl.minimum(full_first, last)", True)] if lows else []
        calls.append(self.call(arguments, "full_first" if lows else "0", "full_last", False))
        return [*calls, self.call(arguments, "full_last", "last", True)]

    def start(self, packed: bool = False) -> list[str]:
        lines = [f"acc{n} = tl.zeros([BLOCK_M, {c.width}], tl.float32)" for n, c in enumerate(self.v_chunks)]
        if self.variant.sink_expr is None:
            return [*lines, 'm = tl.full([BLOCK_M], float("-inf"), tl.float32)', "l = tl.zeros([BLOCK_M], tl.float32)"]
        # the sink is a key without a value: it opens the softmax with the weight 1, none where it is -inf, NaN where it is NaN
        factor = f" * {float_text(LOG2E)}" if self.unit == 1.0 else ""
        return [*lines, f"m = tl.zeros([BLOCK_M], tl.float32) + ({self.by_row(self.variant.sink_expr, packed)}){factor}",
                f'l = tl.exp2((m - tl.where(m == float("-inf"), 0.0, m)){self.times_unit})']

    @property
    def times_unit(self) -> str:
        return f" * {float_text(self.unit)}" if self.unit != 1.0 else ""

    @property
    def limit(self) -> str:
        """A row whose maximum is above takes nothing from masked keys."""
        return float_text(self.in_units(self.variant.fill + NEGLIGIBLE))

    def exact(self, arguments: list[str], packed: bool = False) -> list[str]:
        if not self.finite_fill:
            return []
        again = [*self.start(packed), self.call(arguments, "0", "Tk", True, exact=True)]
        return [f"# rows that see no key, or only scores near the fill {self.variant.fill:g}: there the masked keys count",
                f"near = tl.max(tl.where((rows < Tq) & (m <= {self.limit}), 1, 0), 0)", "if near == 1:", *("    " + line for line in again)]

    def natural(self, top: str, total: str) -> str:
        """The log-sum-exp of a row from its maximum, in the units of x, and its sum: in base e."""
        return f"({top}{self.times_unit} + tl.log2({total})) * {float_text(1 / LOG2E)}"

    def finish(self, inside: str = "(i < Tq)", record: str = "tl.cast(head, tl.int64) * Tq + rows") -> list[str]:
        """Divide and store the rows; ``out_rows`` are pointers to them, record the places of their log-sum-exps."""
        lines = [f"tl.store(lse_ptr + {record}, {self.natural('m', 'l')}, mask={'tl.sum(keep.to(tl.int32), 1) > 0' if inside == 'keep' else 'rows < Tq'})"] if self.lse else []
        lines += ["l = tl.where(l == 0.0, 1.0, l)  # a row without a key gives 0, not 0/0"] if self.variant.empty == "zero" else []
        for n, chunk in enumerate(self.v_chunks):
            padding = f" & (vdims{n}[None, :] < {chunk.start + chunk.used})" if chunk.padded else ""
            lines.append(f"tl.store(out_rows + vdims{n}[None, :] * stride_od, (acc{n} / l[:, None]).to(out_ptr.dtype.element_ty), mask={inside}{padding})")
        return lines

    def queries(self) -> list[str]:
        """Load the rows at ``q_rows``."""
        lines = [*self._dims("dims", self.qk_chunks), *self._dims("vdims", self.v_chunks)]
        for n, chunk in enumerate(self.qk_chunks):
            padding = f" & (dims{n}[None, :] < {chunk.start + chunk.used})" if chunk.padded else ""
            lines.append(f"q{n} = tl.load(q_rows + dims{n}[None, :] * stride_qd, mask=(i < Tq){padding}, other=0.0)")
        return lines

    def hoists(self) -> list[str]:
        return [f"{name} = {self.print(load, guards={'i': 'i < Tq'})}" for load, name in self.hoisted.items()] + [f"{name} = {self.print(load, names={'h': 'key_head'})}" for load, name in self.hoisted_keys.items()]

    def key_head(self, text: str) -> list[str]:
        """The head of the keys, where their text reads it."""
        return [f"key_head = {text}"] if self.key is not None and self.key.has(sc.H) else []

    def kernel(self, parameters: list[str], captures: list[str], sizes: list[str]) -> str:
        """The jit functions of the prefill. captures, sizes: the names that an expression may read; those in use become parameters."""
        self.attend_text, self.arguments = self.attend([*sizes, *captures])
        falls = any(e.has(sc.I) for e in self.ranges.uppers)  # causal: the last block of rows is the longest, so it starts first
        body = dict(first_row="(blocks - 1 - block)" if falls else "block", order="  # the longest blocks first" if falls else "",
                    keys=[f"{x}_ptr += tl.cast(b, tl.int64) * stride_{x}b + tl.cast(h // GROUP_{x.upper()}, tl.int64) * stride_{x}h" for x in self.keys] + self.key_head("h // GROUP_K"),
                    queries=self.queries(), hoisted=self.hoists(), start=self.start(), bounds=self.bounds(), loops=self.loops(self.arguments),
                    exact=self.exact(self.arguments), finish=self.finish())
        names, unspecialized = self.parameters(body, captures, sizes)
        self.prefill = [*parameters, *names]
        return fill(KERNEL, arguments=", ".join([*self.prefill, "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr", "INDEX: tl.constexpr"]), wide=widened_strides(parameters), unspecialized=unspecialized, **body)

    def parameters(self, body: dict, captures: list[str], sizes: list[str]) -> tuple[list[str], str]:
        """(parameters of captures and sizes that the kernel reads, the text that keeps Triton from compiling anew for each size)."""
        text = "\n".join("\n".join(part) if isinstance(part, list) else part for part in body.values())
        read = [*used(text, captures), *(name for name in sizes if (name in ALWAYS and name != "GROUP_R") or name in used(text, sizes))]
        return read, ", ".join(f'"{name}"' for name in read if name in sizes)

    def functions(self) -> str:
        """The helpers and the loop, after the kernels were printed."""
        return "\n\n".join([*(HELPERS[name] for name in sorted(self.helpers)), self.attend_text])
