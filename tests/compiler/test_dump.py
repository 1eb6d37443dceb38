"""Graphs as text, JSON and graphviz; what the text says of one small attention, in full."""

import json
import re

import pytest
import torch

from tileweld.compiler import dump
from tileweld.compiler.explain import trace
from tileweld.compiler.options import Options


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16))

    def forward(self, q, k, v, mask):
        scores = q @ k.transpose(-1, -2) * 0.25
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return torch.softmax(scores, -1) @ v * self.scale


@pytest.fixture(scope="module")
def report():
    q, k, v = (torch.randn(2, 4, n, 16) for n in (5, 7, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        return trace(Net(), (q, k, v, mask))


def test_a_fused_op_reads_as_a_call(report):
    line = next(x for x in dump.text(report.graphs[0]).splitlines() if "= attention(" in x)
    assert re.fullmatch(r"\w+: f32\[2, 4, 5, 16\] = attention\(\w+, \w+, \w+, \[\w+\], \[\], score='0.25\*s', mask='c0\[b, j\] != 0'\)  # .*test_dump.py:\d+", line), line


def test_inputs_have_the_users_names(report):
    inputs = [x for x in dump.text(report.graphs[0]).splitlines() if " = input(" in x]
    assert {re.search(r"input\((.*)\)", x).group(1) for x in inputs} == {"q", "k", "v", "mask", "scale"}
    assert any(re.fullmatch(r"\w+: bool\[2, 7\] = input\(mask\)", x) for x in inputs)


def test_the_captured_graph_is_the_one_before_the_passes(report):
    before, after = (dump.text(gms[0]) for gms in (report.captured, report.graphs))
    assert "softmax(" in before and "attention(" not in before
    assert "softmax(" not in after and "attention(" in after
    assert before.splitlines()[-1].startswith("return (")


def test_the_diff_removes_the_softmax_and_adds_the_op(report):
    lines = dump.diff(report, "passes").splitlines()
    assert lines[0] == "--- graph 0, as captured" and lines[1] == "+++ graph 0, after the passes"
    assert any(x.startswith("-softmax: f32[2, 4, 5, 7] = softmax(") for x in lines)
    assert any(x.startswith("+attention") for x in lines)
    assert dump.diff(report, "aot").startswith("--- graph 0, after the passes")


def test_json_is_the_same_graph(report):
    made = json.loads(dump.to_json("passes", dump.views(report, "passes")))
    nodes = made["graphs"][0]["nodes"]
    assert [n["name"] for n in nodes] == [n.name for n in report.graphs[0].graph.nodes]
    attention = next(n for n in nodes if n["op"] == "attention")
    assert attention["shape"] == [2, 4, 5, 16] and attention["dtype"] == "f32" and attention["rewrite"] == "attention" and "test_dump.py" in attention["source"]
    names = {n["name"] for n in nodes}
    assert all(set(n["inputs"]) <= names for n in nodes)


def test_dot_is_balanced_and_names_every_edge_end(report):
    text = dump.to_dot(dump.views(report, "passes") + dump.views(report, "capture"))
    assert text.startswith("digraph tileweld {") and text.rstrip().endswith("}") and text.count("{") == text.count("}")
    declared = set(re.findall(r"^    (\w+) \[label=", text, re.M))
    ends = {end for edge in re.findall(r"^  (\w+) -> (\w+);", text, re.M) for end in edge}
    assert ends and ends <= declared
    assert "lightblue" in text and "score='0.25*s'" in text


def test_dot_quotes_what_graphviz_would_read():
    assert dump._quoted('a "b"\n\\c') == '"a \\"b\\"\\n\\\\c"'


def test_what_kernels_are_linked_with_is_shown_once():
    wide, narrow = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)
    with torch.no_grad():
        report = trace(lambda x: narrow(torch.relu(wide(x))), (torch.randn(40, 64),))
    assert [k.name.rsplit("_", 1)[0] for k in report.sources] == ["linear", "linear"]
    text = dump.kernels(report, Options())
    assert text.count("# ==== cpp, linked with") == text.count("void pack<Source<float>>") == 1
    assert all(k.name in text.split("linked with ")[1].splitlines()[0] for k in report.sources)


def test_kernels_show_the_source_and_what_calls_it(report):
    text = dump.kernels(report, Options())
    assert "# ==== cpp kernel " in text and 'extern "C"' in text
    assert "what runs" in text and re.search(r"cpp_attention\w*\(", text.split("what runs")[1])
    assert "torch.ops.tileweld" not in text.split("what runs")[1]


def test_symbolic_sizes_and_odd_values_have_text():
    def f(x):
        return torch.cat([x, x.new_zeros(1, 3)])[1:], x.shape[0]

    report = trace(f, (torch.randn(5, 3),), dynamic=True)
    text = dump.text(report.captured[0])
    assert re.search(r"f32\[s\d+", text), text
    assert "end)" in text, "a slice to the end does not print 9223372036854775807"
