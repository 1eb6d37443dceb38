"""The whole way: a language model's loss on its kernels, forward and backward, static and dynamic, and what a bad target does."""
import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report


def loss(logits, targets):
    logits = torch.tanh(logits / 30.0) * 30.0
    logits, targets = logits.float(), F.pad(targets, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def compiled(report, **options):
    dynamic = options.pop("dynamic", None)
    return torch.compile(loss, backend=lambda gm, x: tileweld(gm, x, options=options, report=report), dynamic=dynamic)


def test_training_runs_on_two_kernels_and_dynamic_shapes_compile_once():
    report = Report()
    f = compiled(report, strict=True, dynamic=True)
    for rows in (5, 9, 17):
        x, t = (torch.randn(2, rows, 301) * 4).requires_grad_(), torch.randint(0, 301, (2, rows))
        expected = loss(x, t)
        got = f(x, t)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))
    assert len(report.graphs) == 1
    assert len({k.entry for k in report.sources if k.rewrite == "cross_entropy"}) == 2


def test_the_half_gradient_is_within_twice_eagers_error():
    x, t = (torch.randn(4, 33, 301) * 4).bfloat16(), torch.randint(0, 301, (4, 33))
    exact = torch.autograd.grad(loss(y := x.double().requires_grad_(), t).double(), y)[0]
    ours, eager = (torch.autograd.grad(f(y := x.clone().requires_grad_(), t), y)[0].double() for f in (compiled(Report()), loss))
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize("target", [301, -1])
def test_a_target_out_of_bounds_raises_as_eager(target):
    f = compiled(Report())
    x, t = torch.randn(2, 5, 301), torch.randint(0, 301, (2, 5))
    f(x, t)
    t[1, 3] = target
    for function in (loss, f):
        with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
            function(x, t)
