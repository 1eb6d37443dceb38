"""Calls that stay a library's: what the report says of them, in words, in JSON and in HTML."""

import json

import pytest
import torch

import tileweld
from tileweld.compiler.library_calls import explained
from tileweld.compiler.options import Options
from tileweld.compiler.report_html import page


@pytest.fixture
def half():
    with torch.library._scoped_library("elsewhere", "FRAGMENT") as library:
        library.define("half(Tensor x) -> Tensor")
        library.impl("half", lambda x: x * 0.5, "CPU")
        library.impl("half", torch.empty_like, "Meta")
        yield torch.ops.elsewhere.half


def test_another_librarys_op_is_named_with_its_line(half):
    report = tileweld.explain(lambda x: half(x) + half(x + 1), torch.randn(4, 8))
    assert report.fallbacks["elsewhere::half"] == 2
    first, second = report.library_calls
    assert first.op == "elsewhere::half" and "a custom op of elsewhere" in first.reason and "half(x)" in first.source and second == first
    text = " ".join(str(report).split())
    assert "library elsewhere::half, 2 times because a custom op of elsewhere" in text
    assert json.loads(report.to_json())["library_calls"][0]["op"] == "elsewhere::half"
    assert "<b>elsewhere::half</b>, 2 times" in page(report, Options(), "f")


def test_of_torchs_own_calls_nothing_is_said():
    report = tileweld.explain(lambda x: torch.sort(x)[0] + 1, torch.randn(4, 8))
    assert report.fallbacks["sort"] == 1 and report.library_calls == [] and "library sort" not in " ".join(str(report).split())


def test_products_of_experts_are_explained_and_counted():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped products")

    def experts(x, w, offsets):
        return torch._grouped_mm(x, w, offs=offsets)

    report = tileweld.explain(experts, torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(3, 16, 8, dtype=torch.bfloat16), torch.tensor([1, 4, 6], dtype=torch.int32))
    (call,) = report.library_calls
    assert call.op == "aten::_grouped_mm" and "how many rows an expert gets is data" in call.reason and "torch._grouped_mm" in call.source
    assert report.cost.total.after.flops == 2 * 6 * 16 * 8 and not report.cost.unknown


def test_a_name_alone_is_enough():
    node = torch.fx.Graph().placeholder("x")
    assert [c.op for c in explained([("aten::add", node), ("quantized::linear", node), ("neg", node)])] == ["quantized::linear"]
