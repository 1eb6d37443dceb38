"""`compare`: run a function eagerly and through the passes, hold both outputs against each other, and give the report."""

import pytest
import torch
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
