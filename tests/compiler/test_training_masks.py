"""Gradients through masks, above all in rows that see no key: an added mask lets them pass, a `where` does not. And random graphs."""
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tileweld.compiler.backend import rewrite
from tileweld.compiler.options import Options
from tileweld.compiler.report import Report

spec = importlib.util.spec_from_file_location("attention_graphs", Path(__file__).parents[1] / "passes" / "test_attention_fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

LOWEST = torch.finfo(torch.float32).min


def gradients(function, *inputs):
    """([eager's gradients, the rewritten graph's], Report); the loss weighs every element of the output differently."""
    report = Report()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=lambda gm, x: rewrite(gm, x, Options.parse({"target": "reference"}), report).forward)
    found = []
    for run in (function, compiled):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = torch.Generator().manual_seed(1)
        # scores that are returned as well hold the mask's constant: it is no part of the loss
        loss = sum((torch.where(y.abs() < 1e4, y, 0.0) * torch.randn(y.shape, generator=weights)).sum() for y in outputs)
        found.append(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad], allow_unused=True))
    return found, report


def same(eager, ours, tolerance):
    largest = max(a.nan_to_num().abs().max().item() for a in eager if a is not None)
    for a, b in zip(eager, ours, strict=True):
        if a is None or a.isnan().any():  # unused, or a row without a key under -inf
            continue
        b = torch.zeros_like(a) if b is None else b
        assert (a - b).abs().max().item() <= tolerance * max(a.abs().max().item(), 1e-3 * largest, 1e-9)


def with_padding(spell):
    """Attention over 8 positions of which the first three are padding in the first sequence: rows 0, 1 and 2 see no key there."""
    def function(q, k, v, keep):
        mask = keep[:, None, None, :] & (torch.arange(8)[:, None] >= torch.arange(8))
        return torch.softmax(spell(q @ k.mT * 0.5, mask), -1) @ v

    return function


SPELLINGS = {
    "added": (lambda s, m: s + torch.where(m, 0.0, LOWEST), "added"),
    "added product": (lambda s, m: s + (1.0 - m.float()) * LOWEST, None),  # stays in the score
    "added, then scaled": (lambda s, m: (s + torch.where(m, 0.0, -1e35)) * 2.0, "added"),
    "added, then a bias": (lambda s, m: s + torch.where(m, 0.0, LOWEST) + torch.arange(8.0), "added"),
    "added, then clamped": (lambda s, m: torch.maximum(s + torch.where(m, 0.0, LOWEST), torch.tensor(-1e4)), "nan"),
    "filled": (lambda s, m: s.masked_fill(~m, LOWEST), "nan"),
    "filled, then a bias": (lambda s, m: torch.where(m, s, LOWEST) + torch.arange(8.0), "nan"),
    "filled over added": (lambda s, m: (s + torch.where(m, 0.0, LOWEST)).masked_fill(torch.ones(8, 8).tril(-1) == 1, LOWEST), None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rows_that_see_no_key(spelling):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 4) for _ in range(3))
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[0, :3] = False
    spell, empty = SPELLINGS[spelling]
    (eager, ours), report = gradients(with_padding(spell), q, k, v, keep)
    same(eager, ours, 1e-5)
    if empty is not None:
        (op,) = (n for n in report.graphs[0].graph.nodes if n.target is torch.ops.tileweld.attention.default)
        assert op.args[-1] == empty


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(fuzz.graphs(), st.integers(0, 2**31))
def test_random_graphs(graph, seed):
    """tolerance 1e-3: a score of 1e4 next to a mask of -1e4 has three digits less than float32."""
    function, (b, h, t, s, d, dv, group) = graph
    if function.about["spoil"] == "mutate":  # eager refuses: a product's operand was written to before its backward
        return
    torch.manual_seed(seed)
    inputs = torch.randn(b, h, t, d) * 2, torch.randn(b, h // group, s, d), torch.randn(b, h // group, s, dv), torch.rand(b, s) < 0.7, torch.randn(h, t, s)
    (eager, ours), _ = gradients(function, *inputs)
    try:
        same(eager, ours, 1e-3)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{function.about}") from None
