"""A vmap that makes a mask is resolved, and the attention around it fused; grad and jvp stay, with a warning."""
import pytest
import torch
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from torch import nn

B, T, D = 2, 6, 8
WEIGHT = nn.Parameter(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))


def mask(x, keep):
    """[B, 1, T, T], as masks are made of a function of four indices."""
    def rule(b, h, i, j):
        return (j <= i) & keep[b, j]

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        rule = torch.vmap(rule, in_dims=dims)
    return rule(torch.arange(x.shape[0]), torch.arange(1), torch.arange(x.shape[1]), torch.arange(x.shape[1]))


def attention(x, keep):
    y = x @ WEIGHT
    scores = (y @ x.mT)[:, None].masked_fill(~mask(x, keep), -1e9)
    second = (x @ y.mT)[:, None].masked_fill(~mask(x, keep), -1e9)
    return torch.softmax(scores, -1) @ x[:, None] + torch.softmax(second, -1) @ x[:, None]


def compiled(f, **given):
    report = Report()
    return torch.compile(f, backend=lambda gm, inputs: tileweld(gm, inputs, options={"target": "reference"}, report=report), fullgraph=True, **given), report


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_by_vmap_leave_the_rest_to_be_fused(dynamic):
    run, report = compiled(attention, dynamic=dynamic)
    for length in (T, T + 3):
        x, keep = torch.randn(B, length, D), torch.arange(length) < torch.tensor([[length], [4]])
        eager, ours = ((y := f(x, keep), *torch.autograd.grad(y.square().sum(), WEIGHT)) for f in (attention, run))
        for a, b in zip(eager, ours):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * a.abs().max().item())
    assert not report.warnings
    assert report.counts["attention"] == 2 * len(report.graphs)


def test_what_wants_a_gradient_or_is_no_vmap_stays_as_it_is():
    x = torch.randn(B, T, D)
    for f in (lambda x: torch.vmap(lambda row: row @ WEIGHT)(x), lambda x: torch.func.grad(lambda y: (y @ WEIGHT).square().sum())(x)):
        run, report = compiled(f)
        torch.testing.assert_close(run(x), f(x), rtol=1e-5, atol=1e-5)
        assert any("torch.func transform" in w for w in report.warnings)
