"""The key ranges of a mask: together they say what the mask says, and their ends hold for every row."""

import pytest
import sympy
import torch

from tileweld.codegen.triton.bounds import ends, ranges
from tileweld.codegen.triton.tiles import Config, chunks, configs
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.parser import parse_mask

MASKS = {  # mask -> (bounds from above, from below, has full tiles)
    "True": (0, 0, True),
    "j <= i": (1, 0, True),
    "j < i": (1, 0, True),
    "j <= i + n0": (1, 0, True),
    "(j <= i) & (i - j < 5)": (1, 1, True),
    "(i - j < 5) & (j - i < 3) & (j >= 2)": (1, 2, True),
    "~(j > i)": (1, 0, True),
    "j < c0[b]": (1, 0, True),
    "j <= c0[i]": (1, 0, True),
    "(j <= i) & ((i - j < 5) | (j < 2))": (1, 0, False),
    "(j <= i) & (c1[j] != 0)": (1, 0, False),
    "(j <= i) & (mod(j, 3) == 0)": (1, 0, False),
    "2*j <= i": (0, 0, False),
    "j <= i + mod(j, 2)": (0, 0, False),
    "j == i": (0, 0, False),
    "n0 < 3": (0, 0, False),
    "False": (0, 0, False),
}
ENV = {"i": torch.arange(30).view(-1, 1), "j": torch.arange(25).view(1, -1), "b": torch.tensor(1), "h": torch.tensor(0), "Tq": 30, "Tk": 25, "n0": 4}
CAPTURES = [torch.randint(0, 25, (30,)), torch.randint(0, 2, (25,))]


@pytest.mark.parametrize("mask", MASKS)
def test_bounds_and_rest_are_the_mask(mask):
    e = parse_mask(mask, frozenset({0, 1}))
    found = ranges(e)
    assert (len(found.uppers), len(found.lowers), found.has_full_tiles) == MASKS[mask]
    evaluate = Evaluator(ENV, CAPTURES, torch.float64)
    rebuilt = evaluate(found.rest)
    for upper in found.uppers:
        rebuilt = rebuilt & (ENV["j"] <= evaluate(upper))
    for lower in found.lowers:
        rebuilt = rebuilt & (ENV["j"] >= evaluate(lower))
    assert torch.equal(rebuilt.expand(30, 25), evaluate(e).expand(30, 25))
    assert (found.tile_test is sympy.true) or not found.has_full_tiles


@pytest.mark.parametrize("mask", [mask for mask, (above, below, _) in MASKS.items() if above + below])
@pytest.mark.parametrize("rows", [(0, 7), (8, 15), (29, 29)])
def test_ends_enclose_the_bound_of_every_row(mask, rows):
    found = ranges(parse_mask(mask, frozenset({0, 1})))
    for bound in found.uppers + found.lowers:
        both = ends(bound)
        if both is None:
            assert "c0[i]" in mask
            continue
        corners = Evaluator(ENV | {"i_lo": rows[0], "i_hi": rows[1]}, CAPTURES, torch.float64)
        inside = Evaluator(ENV | {"i": torch.arange(rows[0], rows[1] + 1)}, CAPTURES, torch.float64)(bound)
        assert corners(both[0]) == inside.min() and corners(both[1]) == inside.max()


@pytest.mark.parametrize(("mask", "tested"), [("c0[j] != 0", False), ("c0[floordiv(j, 64)] != 0", True), ("c0[floordiv(j, 64), j] != 0", False), ("mod(j - i, 3) == 0", False),
                                              ("mod(j, 256) < 64", True), ("(i - j < 8) | (j < 4)", True), ("(i - j < 8) | (c0[j] != 0)", False),
                                              ("(c0[j] != 0) & (c1[floordiv(j, 32)] != 0)", True), ("~((c0[j] != 0) & (i - j < 8))", False), ("True", False)])
def test_tiles_are_tested_only_where_a_test_can_skip_one(mask, tested):
    assert (ranges(parse_mask(mask, frozenset({0, 1}))).tile_test is not sympy.true) == tested


@pytest.mark.parametrize("dim", range(1, 257))
def test_chunks_cover_a_head_dim(dim):
    parts = chunks(dim)
    assert 1 <= len(parts) <= 2 and sum(c.used for c in parts) == dim
    assert all(c.width >= 16 and c.width & (c.width - 1) == 0 and 0 < c.used <= c.width for c in parts)
    assert [c.start for c in parts] == [0, parts[0].width][: len(parts)] and (len(parts) == 1 or not parts[0].padded)


@pytest.mark.parametrize(("dim", "widths"), [(80, [64, 16]), (96, [64, 32]), (112, [64, 64]), (192, [128, 64]), (8, [16]), (72, [64, 16])])
def test_chunks_pad_little(dim, widths):
    assert [c.width for c in chunks(dim)] == widths


def test_configurations_exist_for_every_head_dim():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for dim in range(1, 577):
            for backend in ("cuda", "ampere", "hip", "cpu"):
                for kind in ({}, {"decode": True}, {"dense": True}):
                    found = configs(dtype, (dim,), dim, backend, **kind)
                    assert found and all(isinstance(c, Config) and c.block_m >= 16 and c.block_n >= 16 for c in found)
