"""How the nests of a region are spread over programs: tiles, warps and splits for given sizes. Generated modules call `plan` at run time."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

ROW_ELEMENTS = 2048  # at least so many a program: 16 bytes a thread of 4 warps, 2 to 4 times
REGISTERS = 32768  # fp32 elements of one value that 16 warps hold: 64 a thread of 512
LOOP_BLOCK = 4096  # columns of one step over a wider row, 8 warps: 16 elements a thread
LANES, DOWN_BLOCK = 64, 32  # neighbouring rows by columns of a tile whose columns run down the rows of memory: 128 bytes of a line at 16 bits
MOST_SPLITS = 256
INT32 = 2**31 - 2**17  # offsets below stay in 32 bits, the last block's masked lanes included


@dataclasses.dataclass(frozen=True)
class Flat:
    """A nest without reductions of ``total`` elements."""

    total: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """A nest of rows by columns with reductions.

    is_down: neighbours in memory are neighbouring rows. held: values of the whole tile that live from one level to the next.
    is_splittable: every result is one value a row of sums of one level, so that programs may share a row.
    """

    rows: int
    width: int
    is_down: bool = False
    held: int = 1
    is_splittable: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """programs: of each nest, in one launch. constants: of the kernel. combine: programs of the second launch, which adds the shares of split nests."""

    programs: tuple[int, ...]
    constants: dict
    num_warps: int
    splits: tuple[int, ...]
    combine: tuple[int, ...]


def power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def plan(nests: Sequence[Flat | Rows], extents: Sequence[int], processors: int) -> Plan:
    """Tiles for these nests. extents: numbers that indices must hold; one of 2^31 makes them 64 bits wide."""
    chosen = [_flat(n) if isinstance(n, Flat) else _rows(n, processors) for n in nests]
    constants: dict = {"WIDE": max((0, *extents)) >= INT32}
    for k, made in enumerate(chosen):
        constants |= {f"{name}{k}": x for name, x in made.items() if name.isupper()}
    splits = tuple(made.get("splits", 1) for made in chosen)
    combine = tuple(-(-n.rows // made["LANES"]) if s > 1 else 0 for n, made, s in zip(nests, chosen, splits))
    return Plan(tuple(made["programs"] for made in chosen), constants, max(made["warps"] for made in chosen), splits, combine)


def _flat(nest: Flat) -> dict:
    """8 elements a thread of 4 warps: 16 bytes at 16 bits; fewer where a GPU would stay empty."""
    block = 1024 if nest.total >= 1 << 18 else 256
    return {"programs": -(-nest.total // block), "BLOCK": block, "warps": 4}


def _rows(nest: Rows, processors: int) -> dict:
    rows, block = power(nest.rows), power(nest.width)
    limit = REGISTERS if nest.held <= 1 else REGISTERS // 2 if nest.held == 2 else REGISTERS // 4
    if nest.is_down:
        lanes = min(LANES, rows)
        loops = lanes * block > limit // 4 or nest.is_splittable and block > DOWN_BLOCK
        block = min(block, DOWN_BLOCK) if loops else block
        group = lanes
    else:
        few = nest.is_splittable and nest.rows < processors and nest.width > 2 * LOOP_BLOCK
        loops = block > limit or few
        block = LOOP_BLOCK if loops else block
        group = 1 if loops else max(1, min(ROW_ELEMENTS // block, rows))
    programs, steps = -(-nest.rows // group), -(-nest.width // block)
    splits = 1
    if loops and nest.is_splittable and programs < 2 * processors:  # four programs a processor hide each other's waits; a share is at least two steps
        splits = max(1, min(4 * processors // programs, steps // 2, MOST_SPLITS))
    warps = 8 if loops and not nest.is_down else min(16, max(4, group * block // 1024))
    made = {"programs": programs * splits, "ROWS": group, "BLOCK": block, "LOOP": loops, "warps": warps}
    return made | ({"splits": splits, "SPLIT": splits > 1, "SHARES": power(splits), "LANES": max(1, min(64, rows, 4096 // power(splits)))} if nest.is_splittable else {})


@functools.lru_cache(16)
def processors(device: torch.device) -> int:
    """Of the device; 2 in the interpreter, where every program costs."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
