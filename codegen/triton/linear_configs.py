"""Which tiles of ``tileweld::linear`` are worth trying, by number of rows, dtype and GPU family."""
from __future__ import annotations

import dataclasses

FAMILIES = ("cuda", "ampere", "hip", "cpu")


@dataclasses.dataclass(frozen=True)
class Config:
    """kind "gemv": BLOCK_N columns by BLOCK_K of K for all rows, without matrix units. kind "tiled": BLOCK_M rows (0: as many as there are,
    16 to 64) by BLOCK_N columns, shared by a program's accumulators; ``fused``: the prologue in the loop, else in a pass before."""

    kind: str
    block_m: int
    block_n: int
    block_k: int
    fused: bool
    num_warps: int
    num_stages: int

    def tuple(self) -> tuple:
        return dataclasses.astuple(self)


#: rows -> dtype size -> family; "g" gemv, "f" tiled with the prologue in the loop, "t" tiled; the first of a list is the default
_ONE = {  # up to 8 rows: a stream of weights. 16 bytes a thread, 4 to 8 of them in flight
    2: {"cuda": "g0x8x512w4s3 g0x16x256w4s2 g0x4x1024w4s2 f0x64x128w4s4 f0x32x256w4s3 t0x64x128w4s4", "hip": "g0x8x512w4s2 g0x16x256w4s2 f0x64x128w4s2"},
    4: {"cuda": "g0x8x256w4s3 g0x4x512w4s2 g0x16x128w4s2", "hip": "g0x8x256w4s2 g0x4x512w4s2"},
}
_FEW = {  # up to 64 rows: one block of rows, K split until every processor has work
    2: {"cuda": "f0x64x64w8s3 f0x64x64w4s4 f0x64x128w4s3 t0x64x128w4s4 f0x128x64w4s3 t0x128x64w4s4 t0x128x128w8s3", "ampere": "f0x64x64w8s3 f0x64x64w4s4 t0x64x128w4s3 f0x64x128w4s3 t0x128x64w4s3", "hip": "f0x64x128w4s1 t0x64x128w4s2 t0x128x64w4s2"},
    4: {"cuda": "f0x32x32w4s2 t0x32x16w4s2 t0x64x16w4s2 f0x32x16w4s2", "hip": "f0x32x32w4s1 t0x64x16w4s2"},
}
_MANY = {
    2: {"cuda": "t128x128x64w8s3 t128x256x64w8s3 t128x128x64w4s3 t64x128x64w4s4 f128x128x64w8s3", "ampere": "t128x128x32w8s4 t128x128x64w8s3 t64x128x64w4s3 t128x64x32w4s4 f128x64x32w4s3",
        "hip": "t128x128x64w8s2 t256x128x32w8s2 t128x64x64w4s2 f128x64x32w4s1"},
    4: {"cuda": "t32x64x16w4s2 t64x64x16w4s2 t64x64x16w8s2 t32x64x16w8s2 f32x64x16w4s2", "hip": "t64x64x16w8s2 t32x64x32w4s2"},
}
#: more than 64 rows of a partial rotary: 128x128 spills 24 bytes on sm_90, where every column has a partner none
_PARTIAL = {"cuda": "t128x64x64w8s3", "ampere": "t128x64x32w8s4", "hip": "t128x64x64w8s2"}
#: the interpreter: tiles that a short test crosses
_CPU = {"one": "g0x32x64w4s1", "few": "f0x64x16w4s1", "many": "t32x64x32w4s1"}


def configs(rows: str, itemsize: int, spread: int, family: str, *, fusable: bool, partial: bool = False, table: str = "", gemv: str | None = None) -> tuple[Config, ...]:
    """The configurations for rows "one" (up to 8), "few" (up to 64) or "many"; the default first.

    itemsize: of the dot's dtype, 2 or 4. spread: most accumulators of a program. fusable: can the prologue be in the tiled loop;
    without a prologue the two ways are one. partial: some columns have partners and some have none, which takes registers.
    table: the configurations as text, in place of those here; gemv: the same in place of the gemv ones.
    """
    if table:
        text = table
    elif family == "cpu":
        text = _CPU[rows]
    else:
        known = {"one": _ONE, "few": _FEW, "many": _MANY}[rows][itemsize]
        text = known.get(family) or known["cuda"]
        if gemv and rows == "one":
            text = " ".join([gemv, *(item for item in text.split() if item[0] != "g")])
        if partial and rows == "many" and itemsize == 2:
            text = f"{_PARTIAL[family]} {text}"
    found = []
    for config in map(_parse, text.split()):
        if config.kind == "tiled":
            config = dataclasses.replace(config, fused=config.fused and fusable, block_n=max(config.block_n, 16 * spread))
        else:
            config = dataclasses.replace(config, block_n=max(config.block_n, 2 * spread))
        if config not in found:
            found.append(config)
    return tuple(found)


def _parse(item: str) -> Config:
    blocks, rest = item[1:].split("w")
    warps, stages = rest.split("s")
    return Config("gemv" if item[0] == "g" else "tiled", *map(int, blocks.split("x")), item[0] == "f", int(warps), int(stages))
