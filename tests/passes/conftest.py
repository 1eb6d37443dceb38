"""`compare`: run a function eagerly and through the passes, hold both outputs against each other, and give the report.
`rewriting`: the same for every fusion, with counts, gradients, roundings and refusals."""

import copy
import types

import pytest
import torch
from tileweld import passes
from tileweld.compiler.backend import rewrite
from tileweld.compiler.options import Options
from tileweld.compiler.report import Report


def copies(inputs):
    return [x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter) else x for x in inputs]


def assert_same(eager, ours, tolerance):
    """Same NaN, same dtype and shape, and values within ``tolerance`` of the largest one."""
    eager, ours = (x if isinstance(x, (tuple, list)) else (x,) for x in (eager, ours))
    for a, b in zip(eager, ours, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan()), f"{int(b.isnan().sum())} NaN, eager has {int(a.isnan().sum())}"
        if a.numel():
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            error, scale = (a - b).abs().max().item(), max(a.abs().max().item(), 1e-30)
            assert error <= tolerance * scale, f"differs by {error / scale:.2e} of the largest value"


@pytest.fixture
def compare():
    """compare(fn, *inputs, fused=1, refused=None, ...) -> Report.

    fused: how many attention cores must be rewritten (None: any number); refused: text that the one refusal must contain, and
    then fused defaults to 0. The rewritten graph runs on the op's definition, without AOT: what is tested is the rewrite.
    """
    def run(fn, *inputs, fused=None, refused=None, tolerance=1e-5, dynamic=None, **options):
        report = Report()
        checked = Options.parse({"target": "reference", **options}, ("attention", "canonicalise", "rms_norm"))
        compiled = torch.compile(fn, backend=lambda gm, x: rewrite(gm, x, checked, report).forward, dynamic=dynamic)
        with torch.no_grad():
            assert_same(fn(*copies(inputs)), compiled(*copies(inputs)), tolerance)
        reasons = [r.reason for r in report.refusals if r.rewrite == "attention"]
        if refused is not None:
            assert report.counts["attention"] == (fused or 0)
            assert len(reasons) == 1 and refused in reasons[0], reasons
        elif fused is not None:
            assert report.counts["attention"] == fused, reasons
            assert not reasons, reasons
        return report

    return run


# ---------------------------------------------------------------- rewriting


def rewritten(fn, *inputs, dynamic=None, grad=False, passes_off=(), **options):
    """(result of the rewritten function, Report). Without AOT or kernels: what is tested is the rewrite."""
    report = Report()
    names = tuple(p.NAME for p in passes.PIPELINE)
    checked = Options.parse({"target": "reference", "passes": {name: False for name in passes_off}, **options}, names)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=lambda gm, x: rewrite(gm, x, checked, report).forward, dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(grad):
        return compiled(*inputs), report


def flat(x):
    return list(x) if isinstance(x, (tuple, list)) else [x]


def doubled(x):
    if isinstance(x, torch.nn.Module):
        return copy.deepcopy(x).double()
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def error(got, exact) -> float:
    """The largest difference, in float64."""
    return max(((a.double() - b.double()).abs().max().item() if a.numel() else 0.0 for a, b in zip(flat(got), flat(exact), strict=True)), default=0.0)


def check(fn, *inputs, count: dict, tolerance=1e-5, **options):
    """The rewrites are counted, and the result is eager's: within `tolerance` of the largest value for wide dtypes, and for half
    types within twice eager's own distance to the float64 result. Verified by replay too. Returns the report."""
    got, report = rewritten(fn, *inputs, verify=True, **options)
    assert {name: report.counts[name] for name in count} == count, (dict(report.counts), [(r.rewrite, r.reason) for r in report.refusals])
    with torch.no_grad():
        eager = fn(*inputs)
        assert [(x.dtype, x.shape) for x in flat(got)] == [(x.dtype, x.shape) for x in flat(eager)]
        if any(x.dtype in (torch.bfloat16, torch.float16) for x in inputs if isinstance(x, torch.Tensor)):
            exact = doubled(fn)(*map(doubled, inputs))
            floor = max(x.double().abs().max().item() for x in flat(eager)) * 1e-3
            assert error(got, exact) <= 2 * error(eager, exact) + floor * (error(eager, exact) == 0), (error(got, exact), error(eager, exact))
        else:
            scale = max((x.double().abs().max().item() for x in flat(eager) if x.numel()), default=1.0)
            assert error(got, eager) <= tolerance * scale, error(got, eager) / scale
    return report


def check_gradients(fn, *inputs, count: dict, tolerance=1e-9, **options):
    """In float64: the gradients of all floating inputs (and of a module's parameters) are eager's."""
    fn, inputs = doubled(fn), [doubled(x) for x in inputs]
    parameters = list(fn.parameters()) if isinstance(fn, torch.nn.Module) else []
    floats = parameters + [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def gradients(results):
        return torch.autograd.grad(sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in flat(results)), floats, allow_unused=True)

    got, report = rewritten(fn, *inputs, grad=True, **options)
    assert {name: report.counts[name] for name in count} == count, (dict(report.counts), [(r.rewrite, r.reason) for r in report.refusals])
    for a, b in zip(gradients(got), gradients(fn(*inputs)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-30)


def refused(name, fn, *inputs, reason, **options):
    """Nothing of this name is made, the one refusal contains `reason`, the result is eager's."""
    got, report = rewritten(fn, *inputs, **options)
    reasons = [r.reason for r in report.refusals if r.rewrite == name]
    assert report.counts[name] == 0 and len(reasons) == 1 and reason in reasons[0], (dict(report.counts), reasons)
    with torch.no_grad():
        assert error(got, fn(*inputs)) <= 1e-5 * max(x.abs().max().item() for x in flat(got))


def silent(name, fn, *inputs, **options):
    """Something else altogether: neither made nor refused."""
    _, report = rewritten(fn, *inputs, **options)
    assert report.counts[name] == 0 and not [r for r in report.refusals if r.rewrite == name], [r.reason for r in report.refusals]


@pytest.fixture
def rewriting():
    """rewritten, check, check_gradients, refused, silent: see above."""
    return types.SimpleNamespace(rewritten=rewritten, check=check, check_gradients=check_gradients, refused=refused, silent=silent)
