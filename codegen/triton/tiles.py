"""Tile shapes: how a head dim is cut into power-of-two chunks, and which configurations are worth trying."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Dims [start, start + width) of a head; ``width`` is a power of two, ``used`` of it exist."""

    start: int
    width: int
    used: int

    @property
    def padded(self) -> bool:
        return self.used < self.width


def chunks(dim: int) -> tuple[Chunk, ...]:
    """At most two chunks: 80 -> 64 + 16, 192 -> 128 + 64, 112 -> 64 + 64 (48 used). tl.dot needs widths of 16 and more.

    Padding to one power of two would cost 1.6x the work at 80 and 1.33x at 96 and 192.
    """
    first = 1 << (dim.bit_length() - 1)
    if dim < 16:
        return (Chunk(0, 16, dim),)
    if first == dim:
        return (Chunk(0, dim, dim),)
    rest = dim - first
    return (Chunk(0, first, first), Chunk(first, max(16, 1 << (rest - 1).bit_length()), rest))


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of block_m query rows by block_n keys, and how it is spread over warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __str__(self):
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"


MAX_WIDTH = 576
#: (widest padded head dim, 16-bit on cuda, 16-bit on hip, fp32); the first of a list is the default, held to 0 spills by a test
_TABLE = (
    (32, "128x128w8s3 128x128w4s3 128x64w4s3 64x64w4s3", "128x64w4s2 128x128w8s2", "64x32w8s2 32x32w4s2"),
    (64, "128x128w8s3 128x64w4s3 128x64w8s3 64x64w4s3", "128x64w4s2 128x64w8s2 64x64w4s2", "64x32w8s2 64x64w8s2 32x32w4s2"),
    (128, "128x64w8s3 128x128w8s2 128x64w8s2 64x64w4s3", "128x64w8s1 128x32w8s1 64x64w4s1", "32x32w8s2 32x32w8s1 32x16w4s2"),
    (192, "128x64w8s2 64x64w4s2 64x32w4s2", "64x32w4s1 128x32w8s1", "32x16w8s1 32x32w8s1 16x16w4s1"),
    (256, "128x32w8s2 64x64w8s2 64x16w4s2", "64x32w4s1 32x32w4s1 64x32w8s1", "32x16w8s1 16x16w4s1"),
    (576, "32x32w8s2 32x32w8s1", "32x16w4s1 32x16w8s1", "16x16w8s2 16x16w8s1"),  # 64 rows spill 300 bytes and more
)
#: the same for decoding, blocks of keys alone: the rows are those of a group of heads, padded to 16, 32 or 64
_DECODE = (
    (64, "16x64w4s3 16x128w4s3 16x64w2s4", "16x64w4s2 16x128w4s2", "16x32w4s2 16x64w4s2"),
    (128, "16x64w4s3 16x32w4s3 16x128w8s2", "16x64w4s1 16x32w4s2", "16x32w4s2 16x16w4s2"),
    (192, "16x32w4s3 16x64w4s2", "16x32w4s1", "16x16w4s2"),
    (256, "16x32w4s3 16x64w4s2", "16x32w4s1", "16x16w4s1"),
    (576, "16x32w8s2 16x64w8s1 16x32w8s1", "16x32w4s1 16x32w8s1", "16x16w8s2 16x16w8s1"),
)
#: prefill with a captured element for every (query, key): its tile takes as many registers as the scores, and shared memory
_DENSE = (
    (64, "128x64w8s2 64x64w4s2 64x32w4s2", "64x64w4s1 64x32w4s1", "32x32w8s1 32x16w4s1"),
    (128, "128x32w8s2 64x32w4s2", "64x32w4s1 32x32w4s1", "32x32w8s1 32x16w4s1"),
    (256, "64x32w4s1 128x32w8s1", "64x32w4s1 32x32w4s1", "32x16w8s1 16x16w4s1"),
    (576, "32x32w8s1 32x16w8s1", "32x16w8s1", "16x16w8s1"),
)
#: where Hopper's tiles spill without wgmma, whose operands need no registers, with one of Triton 3.6 to 3.9: 128x128w8s3 by 8 to 16 bytes at
#: head dim 64, 128x64w4s3 by 40 with a softcap, 128x64w8s3 by 8 to 16 at head dim 128
_AMPERE = {
    "128x128w8s3 128x64w4s3 128x64w8s3 64x64w4s3": "128x64w8s3 128x64w4s3 64x64w4s3 128x128w8s3",
    "128x64w8s3 128x128w8s2 128x64w8s2 64x64w4s3": "64x64w4s3 128x64w8s3 128x64w8s2",
}
#: where two stages of float32 exceed the 64 KiB of an AMD compute unit; eight warps have 256 registers each, 27 too few with Triton 3.6, four have 512
_HIP_SINGLE = {"16x16w8s2 16x16w8s1": "16x16w4s1 16x16w8s1"}
#: the interpreter: small tiles that differ, so that a short test crosses many tile borders
INTERPRETER, INTERPRETER_DECODE = Config(64, 32, 4, 1), Config(16, 16, 4, 1)


def configs(dtype: torch.dtype, key_dims: Sequence[int], value_dim: int, backend: str, decode: bool = False, dense: bool = False) -> tuple[Config, ...]:
    """The configurations for backend "cuda" (Hopper and later), "ampere", "hip" or "cpu", the default first (research: FlashAttention-3's tile_size.h, Triton's tutorial 06)."""
    if backend == "cpu":
        return (INTERPRETER_DECODE if decode else INTERPRETER,)
    width = max(sum(chunk.width for dim in dims for chunk in chunks(dim)) for dims in (key_dims, (value_dim,)))
    _, cuda, hip, single = next(row for row in (_DECODE if decode else _DENSE if dense else _TABLE) if width <= row[0])
    text = single if dtype == torch.float32 else hip if backend == "hip" else cuda
    if backend == "ampere" and text in _AMPERE:
        text = _AMPERE[text]
    if backend == "hip":
        text = _HIP_SINGLE.get(text, text)
    return tuple(_parse(item) for item in text.split())


def _parse(item: str) -> Config:
    blocks, rest = item.split("w")
    warps, stages = rest.split("s")
    block_m, block_n = blocks.split("x")
    return Config(int(block_m), int(block_n), int(warps), int(stages))
