"""Lifting: masks and biases computed in a graph become formulas that have the tensor's value at every index."""

import math

import pytest
import torch
import torch.nn.functional as F
from tileweld.compiler.ir import scalar as sc

T, S, H = 7, 9, 4


def positions():
    return torch.arange(T)[:, None], torch.arange(S)[None]


def with_positions(f):
    return lambda: f(*positions())


def bucket(distance, buckets=8, limit=16):
    """T5's relative position bucket."""
    n = buckets // 2
    side, distance = (distance > 0).long() * n, distance.abs()
    large = n // 2 + (torch.log(distance.float() / (n // 2)) / math.log(limit / (n // 2)) * (n - n // 2)).long()
    return side + torch.where(distance < n // 2, distance, torch.min(large, torch.full_like(large, n - 1)))


FORMULAS = {  # what is lifted to the end: nothing is captured
    "causal": with_positions(lambda i, j: j <= i),
    "bottom_right": with_positions(lambda i, j: j <= i + (S - T)),
    "window": with_positions(lambda i, j: (j <= i) & (i - j < 3)),
    "either": with_positions(lambda i, j: (j < 2) | (i == j)),
    "not": with_positions(lambda i, j: ~(j < 2)),
    "xor": with_positions(lambda i, j: torch.logical_xor(j < 4, i < 2)),
    "logical": with_positions(lambda i, j: torch.logical_not(torch.logical_or(j > i + 4, j == 2))),
    "dilated": with_positions(lambda i, j: ((i - j) % 2 == 0) & (j <= i)),
    "negative_modulus": with_positions(lambda i, j: (i - j) % -3 == 0),
    "blocks": with_positions(lambda i, j: i // 2 >= j // 4),
    "negative_floordiv": with_positions(lambda i, j: (i - j) // 2 >= -1),
    "true_division": with_positions(lambda i, j: (i - j) / 2 >= -1),
    "floats": with_positions(lambda i, j: (i - j).float() * 0.5 <= 1.25),
    "absolute": with_positions(lambda i, j: (i - j).abs() < 3),
    "clamp": with_positions(lambda i, j: (i - j).clamp(-2, 2)),
    "square": with_positions(lambda i, j: (i - j) ** 2),
    "minimum": with_positions(lambda i, j: torch.minimum(i, j) + torch.maximum(i, j) * 2),
    "where": with_positions(lambda i, j: torch.where(i > j, i - j, 0)),
    "sum_of_conditions": with_positions(lambda i, j: (j <= i).int() + (j == 0).int()),
    "condition_times_number": with_positions(lambda i, j: (j <= i) * 1.5),
    "tril": lambda: torch.ones(T, S).tril(),
    "tril_below": lambda: torch.ones(T, S).tril(-2),
    "triu_of_infinities": lambda: torch.triu(torch.full((T, S), -math.inf), diagonal=1),
    "band": lambda: torch.ones(T, S, dtype=torch.bool).triu(-1).tril(3),
    "tril_of_condition": with_positions(lambda i, j: ((i + j) % 2 == 0).tril(1)),
    "masked_fill": lambda: torch.zeros(T, S).masked_fill(torch.ones(T, S).triu(1).bool(), -1e9),
    "inverted": lambda: (1.0 - torch.ones(T, S).tril()) * -1e4,
    "lowest": lambda: torch.ones(T, S).tril().logical_not() * torch.finfo(torch.float32).min,
    "cat": lambda: torch.cat([torch.ones(T, S - T), torch.ones(T, T).tril()], -1),
    "stack": lambda: torch.stack([torch.ones(T, S // 2).tril(), torch.zeros(T, S // 2), torch.ones(T, S // 2).triu()], -1).flatten(1)[:, :S],
    "cat_of_three": lambda: torch.cat([torch.zeros(T, 1), torch.ones(T, T).tril(), torch.zeros(T, 1)], 1),
    "sliced": lambda: torch.ones(2 * T, 2 * S).tril()[::2, 1::2],
    "last_rows": lambda: torch.ones(20, 20).tril()[-T:, -S:],
    "more_than_all_rows": lambda: torch.ones(T, S).tril()[-100:],
    "selected": lambda: torch.ones(3, T, S).tril()[-1],
    "flipped": lambda: torch.ones(T, S).tril().flip(0).flip([1]),
    "repeated": lambda: torch.ones(T, 3).tril().repeat(1, 3),
    "interleaved": lambda: torch.ones(T, 3).tril().repeat_interleave(3, 1),
    "viewed": lambda: (torch.arange(T * S) % 4 < 3).view(S, T).t(),
    "gathered": with_positions(lambda i, j: (torch.arange(20) % 3 < 2)[i + j]),
    "gathered_from_the_end": with_positions(lambda i, j: (torch.arange(20) % 3 < 2)[i - j]),
    "gathered_twice": with_positions(lambda i, j: torch.ones(20, 20).tril()[i + 3, j]),
    "index_select": lambda: torch.ones(20, 20).tril().index_select(0, torch.arange(T) + 2),
    "arange_step": lambda: torch.arange(0, 3 * S, 3)[None] <= 3 * torch.arange(T)[:, None],
    "arange_half": lambda: torch.arange(0, S / 2, 0.5)[None] <= torch.arange(T)[:, None],
    "arange_down": lambda: torch.arange(S, 0, -1)[None] - torch.arange(T)[:, None],
    "running_sum": lambda: torch.ones(S, dtype=torch.long).cumsum(0)[None] - 1 <= torch.arange(T)[:, None],
    "alibi": lambda: torch.pow(2.0, -(torch.arange(H) + 1) * 2.0)[:, None, None] * (torch.arange(S)[None] - torch.arange(T)[:, None]),
    "bucket": lambda: bucket(torch.arange(S)[None] - torch.arange(T)[:, None]),
    "bytes": lambda: torch.ones(T, S, dtype=torch.uint8).tril() == 1,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name, lifted):
    _, values, eager, captured = lifted(FORMULAS[name])
    torch.testing.assert_close(values.to(eager.dtype), eager, rtol=1e-6, atol=1e-6)
    assert not captured or name == "bytes"


CAPTURES = {
    "padding": (lambda m: m[:, None, None, :].expand(2, 1, T, S), lambda: (torch.rand(2, S) < 0.5,), "load(tensor_m_1, y0, y3)"),
    "padding_as_float": (lambda m: (1.0 - m[:, None, None, :].float()) * -1e4, lambda: ((torch.rand(2, S) < 0.5).long(),), None),
    "packed": (lambda s: s[:, None, :, None] == s[:, None, None, :], lambda: (torch.randint(0, 3, (2, S)),), None),
    "cache_positions": (lambda c: torch.arange(S)[None] <= c[:, None], lambda: (torch.arange(T) + 2,), None),
    "bias": (lambda b: b * 2 + 1, lambda: (torch.randn(H, T, S),), None),
    "t5_bias": (lambda w: F.embedding(bucket(torch.arange(S)[None] - torch.arange(T)[:, None]), w).permute(2, 0, 1), lambda: (torch.randn(8, H),), None),
    "slopes": (lambda s: s[:, None, None] * (torch.arange(S)[None] - torch.arange(T)[:, None]), lambda: (torch.rand(H),), None),
    "random_blocks": (lambda t: (t[torch.arange(T) // 2][:, None] == torch.arange(S)[None] // 3), lambda: (torch.randint(0, 3, (T // 2 + 1,)),), None),
    "unknown_op": (lambda x: torch.sort(x, -1).values * 2, lambda: (torch.randn(T, S),), None),
    "gather_at_data": (lambda t, p: t[p], lambda: (torch.randn(5), torch.randint(0, 5, (T, S))), None),
    "half": (lambda x: (x * 3).float(), lambda: (torch.randn(T, S).half(),), None),
    "global_tokens": (lambda g: (g[:, None, :] | g[:, :, None]) | (torch.arange(S)[None] == torch.arange(S)[:, None]), lambda: (torch.rand(2, S) < 0.3,), None),
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", CAPTURES)
def test_captures(name, symbolic, lifted):
    function, inputs, expected = CAPTURES[name]
    e, values, eager, captured = lifted(function, *inputs(), symbolic=symbolic)
    torch.testing.assert_close(values.to(eager.dtype), eager, rtol=2e-3 if name == "half" else 1e-6, atol=1e-6)
    assert captured
    if expected and not symbolic:
        assert expected in str(e)


def test_conditions_added_are_an_or(lifted):
    """bool + bool is bool: the sum of two true conditions counts 1, not 2."""
    _, values, eager, _ = lifted(lambda: ((torch.arange(S) < 5) + (torch.arange(S) > 2)).float())
    assert torch.equal(values.float(), eager)
    _, values, eager, _ = lifted(lambda: ((torch.arange(S) < 5) * (torch.arange(S) > 2)).float() * 3)
    assert torch.equal(values.float(), eager)


def test_positions_in_half_precision_stay_tensors(lifted):
    """257 is no bfloat16: comparing rounded positions is eager's meaning, so the tensor is captured."""
    _, values, eager, captured = lifted(lambda: torch.arange(600, dtype=torch.bfloat16) <= 301)
    assert torch.equal(values, eager)


def test_sharing_is_by_node_and_index(lifted):
    e, _, _, _ = lifted(lambda x: x + x, torch.randn(T, S))
    assert len(sc.loads(e)) == 1
