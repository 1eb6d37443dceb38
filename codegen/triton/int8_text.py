"""The kernels of ``tileweld::int8_linear`` as text: those of linear_text.py with weights of int8, and others for activations of int8.

activation "float": a tile of weights becomes the dot's dtype in registers, which holds int8 exactly. One scale a row of the weight multiplies the
sums behind the loop; scales of groups multiply the product of each block of K, which lies in one group.

activations of int8: a program a row takes the prologue, the row's largest magnitude, and writes t = round(y / s) and s (`quantise_kernel`). The
product of t and the weights is in int32, exact. What is not int8 is *outer*: outlier columns, and rows with an inf or NaN, where t is 0. A second
loop multiplies y and the weights in floats there, and reads no weights where a block of K has neither, so nobody waits for the host to count them.

    a = (s_i sum_k t_ik q_jk + sum over outer k of y_ik q_jk) scale_j

Where K is split, shares of the first sum are int32 and stay exact when they are added. Shares of the second are floats, as bits in the same memory: for
"mixed" behind those of the first, for "int8" in their place, since the first sum of such a row is 0.
"""
from __future__ import annotations

import re

from .linear_text import LinearText, Loop
from .linear_templates import K_SHARE
from .source import fill

INT8_TILED = '\n$head\n' + K_SHARE + '''\
t_tile = t_ptr + i * tl.cast(K, INDEX) + (k_first + ks).to(INDEX)[None, :]
$tiles
$zeros
for k0 in tl.range(k_first, k_last, BLOCK_K):
    if EVEN_K:
        t = tl.load(t_tile, mask=i < M, other=0)
    else:
        t = tl.load(t_tile, mask=(i < M) & (k0 + ks < K)[None, :], other=0)
    $products
    t_tile += BLOCK_K
bad = tl.load(bad_ptr + rows, mask=rows < M, other=0)
if SPLIT:
    $store
else:
    step = tl.load(step_ptr + rows, mask=rows < M, other=0.0)[:, None]
    $joined
$outer
if SPLIT:
    $store_outer
else:
    $scaled
    $finish
'''

INT8_COMBINE = '''
$head
bad = tl.load(bad_ptr + rows, mask=rows < M, other=0)[:, None]
step = tl.load(step_ptr + rows, mask=rows < M, other=0.0)[:, None]
$zeros
for share in tl.range(0, splits):
    $add
$joined
$scaled
$finish
'''

OUTER = '''
for k0 in tl.range(k_first, k_last, BLOCK_K):
    marked = tl.load(mark_ptr + k0 + ks, mask=k0 + ks < K, other=0).to(tl.int32)
    if tl.maximum(tl.max(marked, 0), tl.max(bad, 0)) > 0:
        $body
'''

OUTER_ROWS = '''
if tl.max(bad, 0) > 0:  # a row with an inf or a NaN
    for k0 in tl.range(k_first, k_last, BLOCK_K):
        $body
'''

OUTER_BODY = '''
inside = (k0 + ks < K)
y = tl.load(y_ptr + i * tl.cast(stride_ym, INDEX) + (k0 + ks).to(INDEX)[None, :] * stride_yk, mask=(i < M) & inside[None, :], other=0.0)
y = tl.where($is_outer, y, 0.0)
$products
'''

QUANTISE = '''
i = tl.cast(tl.program_id(0), tl.int64)
x_row = x_ptr + i * stride_xm
ks = tl.arange(0, BLOCK)
$statistics
$magnitude
step = tl.where(bad == 0, tl.div_rn(most, 127.0), 0.0)
tl.store(step_ptr + i, step)
tl.store(bad_ptr + i, bad)
divisor = tl.where(step > 0.0, step, 1.0)
for k0 in tl.range(0, K, BLOCK):
    k = k0 + ks
    xf = tl.load($x, mask=k < K, other=0.0).to(tl.float32)
    y = $transform
    $keep
    $leave
    y = tl.where(bad == 0, y, 0.0)
    # adding 1.5 2^23 rounds to the nearest integer, to even from halfway
    t = tl.minimum(tl.maximum((tl.div_rn(y, divisor) + 12582912.0) - 12582912.0, -127.0), 127.0)
    tl.store(t_ptr + i * K + k, t.to(tl.int8), mask=k < K)
'''

#: the row's largest magnitude, and whether it has an inf or NaN: by a loop over it, or as whoever made x took it
MAGNITUDE = '''
top = tl.zeros([BLOCK], tl.float32)
odd = tl.zeros([BLOCK], tl.int32)
for k0 in tl.range(0, K, BLOCK):
    k = k0 + ks
    xf = tl.load($x, mask=k < K, other=0.0).to(tl.float32)
    y = tl.where(k < K, $transform, 0.0)
    odd = tl.maximum(odd, tl.where(tl.abs(y) < float("inf"), 0, 1))
    $leave
    top = tl.maximum(top, tl.abs(y))
bad = tl.max(odd, 0)
most = tl.max(top, 0)
'''
KNOWN_MAGNITUDE = ["most = tl.load(row_max_ptr + i)", "bad = tl.where(most < float(\"inf\"), 0, 1)"]

MARK = '''
i = tl.cast(tl.program_id(0), tl.int64)
x_row = x_ptr + i * stride_xm
ks = tl.arange(0, BLOCK)
$statistics
for k0 in tl.range(0, K, BLOCK):
    k = k0 + ks
    xf = tl.load($x, mask=k < K, other=0.0).to(tl.float32)
    y = $transform
    size = tl.abs(y)
    # all rows write the same: who comes first does not matter
    tl.store(mark_ptr + k, (size >= 0.0).to(tl.int8), mask=(k < K) & (size >= threshold) & (size < float("inf")))
'''


class Int8Text(LinearText):
    """The jit functions of one Spec with int8 weights. activation: as in the op; group: columns of K that share a scale, 0 for all."""

    def __init__(self, spec, *, weights: int, activation: str, group: int, groups: int, columns: bool, row_max: bool = False, **known):
        super().__init__(spec, **known)
        self.activation, self.group, self.group_count, self.columns_given, self.row_max_given = activation, group, groups, columns, row_max
        if activation != "float":  # a row's largest magnitude is known when all of the row is
            self.fusable = self.deferred = False
            self.rest = None
        self.parameters += [*(f"s{w}_ptr" for w in range(weights)), "t_ptr", "step_ptr", "bad_ptr", "mark_ptr", "row_max_ptr", "stride_ym", "stride_yk", "threshold"]

    # ------------------------------------------------------------------------------------------ weights of int8
    def select(self, loop: Loop, count: str, weights: bool = True, base: bool = True) -> list[str]:
        """With the scales of the weights beside them; shares of int8 activations meet them where they are added, without the weights."""
        lines, scales_alone = [], not weights and self.activation != "float"
        for line in super().select(loop, count, weights or scales_alone, base):
            if not (scales_alone and re.fullmatch(r" *(v\d+_ptr|stride_v\d+n) = .*", line)):
                lines.append(line)
            if found := re.fullmatch(r"( *)v(\d+)_ptr = w(\d+)_ptr", line):
                lines.append(f"{found[1]}scale{found[2]}_ptr = s{found[3]}_ptr")
        return lines

    def _scale(self, n: int, q: int, at: str = "") -> str:
        return f"tl.load(scale{n}_ptr + columns{q}{at}, mask=columns{q} < N, other=0.0)[None, :]"

    def multiply(self, n: int, q: int, name: str) -> str:
        cast, precision = ("tl.float32", ', input_precision="ieee"') if self.wide else ("y.dtype", "")
        dot = f"tl.dot(y.to({cast}), w.to({cast})"
        if not self.group:
            return f"{name} = {dot}, {name}{precision})"
        return f"{name} += {dot}{precision}) * {self._scale(n, q, f' * {self.group_count} + k0 // {self.group}')}"

    def weight(self, n: int, q: int) -> str:
        if not self.group:
            return super().weight(n, q)
        inside = f"(columns{q} < N)[:, None] & (k < K)"
        return f"{super().weight(n, q)} * tl.load(scale{n}_ptr + columns{q}[:, None] * {self.group_count} + k // {self.group}, mask={inside}, other=0.0)"

    def scaled(self, loop: Loop) -> list[str]:
        return [] if self.group else [f"{name} *= {self._scale(n, q)}" for n, q, name in loop.each()]

    # ------------------------------------------------------------------------------------------ activations of int8
    def int8_tiled(self, loop: Loop) -> str:
        tiles, products, joined, outer = [], [], [], []
        for n, q, name in loop.each():
            tile = f"tile{n}_{q}"
            tiles.append(f"{tile} = v{n}_ptr + (k_first + ks).to(INDEX)[:, None] * stride_wk + j{q} * stride_v{n}n")
            products += [f"if EVEN_K:\n    w = tl.load({tile}, mask=j{q} < N, other=0)\nelse:\n    w = tl.load({tile}, mask=(j{q} < N) & (k0 + ks < K)[:, None], other=0)",
                         f"{name}_sum = tl.dot(t, w, {name}_sum, out_dtype=tl.int32)", f"{tile} += BLOCK_K * tl.cast(stride_wk, INDEX)"]
            joined.append(f"{name} = {name}_sum.to(tl.float32) * step")
            outer += [f"w = tl.load(v{n}_ptr + (k0 + ks).to(INDEX)[:, None] * stride_wk + j{q} * stride_v{n}n, mask=(j{q} < N) & inside[:, None], other=0)", self.multiply(n, q, name)]
        mixed = self.activation == "mixed"
        store = [f"tl.store({pointer}, {name}_sum, mask={mask})" for name, pointer, mask in self._partials(loop, "split")]
        store += [f"{name} = tl.zeros([BLOCK_M, WIDTH], tl.float32)" for *_, name in loop.each()]
        store_outer = [f"tl.store({pointer}, {name}.to(tl.int32, bitcast=True), mask={mask}{'' if mixed else ' & (bad[:, None] > 0)'})"
                       for name, pointer, mask in self._partials(loop, "splits + split" if mixed else "split")]
        body = fill(OUTER_BODY, is_outer="(bad[:, None] > 0) | (marked[None, :] > 0)" if mixed else "bad[:, None] > 0", products=outer)
        return fill(INT8_TILED, head=self.head(loop, True), tiles=tiles, products=products, store=store, store_outer=store_outer, joined=joined, outer=fill(OUTER if mixed else OUTER_ROWS, body=body),
                    zeros=[f"{name}_sum = tl.zeros([BLOCK_M, WIDTH], tl.int32)" for *_, name in loop.each()], scaled=self.scaled(loop), finish=self.finish(loop))

    def int8_combine(self, loop: Loop) -> str:
        mixed = self.activation == "mixed"
        floats = {name: pointer for name, pointer, _ in self._partials(loop, "splits + share")}
        zeros = [line for *_, name in loop.each() for line in (f"{name}_sum = tl.zeros([BLOCK_M, WIDTH], tl.int32)", f"{name} = tl.zeros([BLOCK_M, WIDTH], tl.float32)")]
        add = []
        for name, pointer, mask in self._partials(loop, "share"):
            add.append(f"part = tl.load({pointer}, mask={mask}, other=0)")
            if mixed:
                add += [f"{name}_sum += part", f"{name} += tl.load({floats[name]}, mask={mask}, other=0).to(tl.float32, bitcast=True)"]
            else:
                add += [f"{name}_sum += tl.where(bad > 0, 0, part)", f"{name} += tl.where(bad > 0, part.to(tl.float32, bitcast=True), 0.0)"]
        joined = [f"{name} += {name}_sum.to(tl.float32) * step" for *_, name in loop.each()]
        return fill(INT8_COMBINE, head=self.head(loop, False), zeros=zeros, add=add, joined=joined, scaled=self.scaled(loop), finish=self.finish(loop))

    def quantise(self) -> str:
        x = "x_row + tl.cast(k, tl.int64) * stride_xk"
        marked = "y = tl.where(tl.load(mark_ptr + k, mask=k < K, other=0) != 0, 0.0, y)"
        leave = [marked] if self.activation == "mixed" else []
        magnitude = KNOWN_MAGNITUDE if self.row_max_given else fill(MAGNITUDE, x=x, transform=self.transformed(False, rows=False), leave=leave)
        body = fill(QUANTISE, statistics=self.statistics(0, x, "k < K", "BLOCK"), x=x, transform=self.transformed(False, rows=False), magnitude=magnitude, leave=leave,
                    keep=["tl.store(y_ptr + i * K + k, y.to(y_ptr.dtype.element_ty), mask=k < K)"] if self.has_prologue else [])
        return self._kernel("quantise_kernel", "One row of x through the prologue, to int8.", [], body)

    def mark(self) -> str:
        x = "x_row + tl.cast(k, tl.int64) * stride_xk"
        body = fill(MARK, statistics=self.statistics(0, x, "k < K", "BLOCK"), x=x, transform=self.transformed(False, rows=False))
        return self._kernel("mark_kernel", "Marks the columns in which one row has an outlier.", [], body)

    def kernels(self) -> str:
        if self.activation == "float":
            return super().kernels()
        made = [*([self.mark()] if self.activation == "mixed" and not self.columns_given else []), self.quantise(),
                self._looped("tiled", "Grid (tiles, splits). Sums of int8 products in int32; what is outer in floats. SPLIT: shares of K go to partial.", self.int8_tiled, "tl.cdiv(M, BLOCK_M) * {}"),
                self._looped("combine", "Adds the shares of K in their order, scales, and applies the epilogue.", self.int8_combine, "tl.cdiv(M, BLOCK_M) * {}")]
        return "\n\n".join([*self.helper_texts(), *made])
