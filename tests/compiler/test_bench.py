"""tileweld bench: rows, failures as rows, the same work for all, progress, bad input in one line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tileweld.compiler import bench
from tileweld.compiler.cli import app
from tileweld.compiler.devices import Device
from tileweld.compiler.targets import Target

DEVICE = Device("toy", {"float32": 1e9}, 1e9, 1e9, "given")


def attention(q):
    return torch.softmax(q @ q.transpose(-1, -2) * 0.25, -1) @ q


@pytest.fixture(scope="module")
def result():
    target = Target("t", attention, (torch.randn(1, 2, 8, 16),), {})
    return bench.run(target, ["eager", "aot_eager", "no_such_backend", "tileweld"], rounds=3, device=DEVICE, options={"target": "reference"})


def test_every_contender_is_a_row_and_a_missing_one_says_why(result):
    assert [r.name for r in result.rows] == ["eager", "aot_eager", "no_such_backend", "tileweld"]
    missing = result.row("no_such_backend")
    assert missing.seconds is None and missing.median is None and "no_such_backend" in missing.error
    for name in ("eager", "aot_eager", "tileweld"):
        row = result.row(name)
        assert len(row.seconds) == 3 and row.first > 0 and row.error is None and row.difference < 1e-5


def test_all_are_held_to_the_same_work(result):
    flops, moved, best = result.work()
    assert flops == 2 * 64 * (4 * 16 + 6) and moved == 4 * 2 * 256 and best == pytest.approx(max(flops, moved) / 1e9)
    made = result.to_json()
    for row in made["rows"]:
        if row["error"] is None:
            assert row["flops_per_second"] == pytest.approx(flops / row["median"]) and row["of_roofline"] == pytest.approx(best / row["median"])
            assert row["lowest"] <= row["median"] <= row["highest"] and row["rounds"] == 3
    assert [name for name, *_ in result.measured()] == ["eager", "aot_eager", "tileweld"]
    json.dumps(made)


def test_the_table_has_a_row_each_and_the_reason(result):
    text = str(result)
    assert text.count("no_such_backend") >= 2 and "has no times:" in text and "of roofline" in text and "roofline" in text and "toy" in text


def test_a_failing_compiler_does_not_stop_the_others(monkeypatch):
    def broken(gm, inputs):
        raise RuntimeError("g++ is not on PATH\nand more")

    monkeypatch.setattr(torch, "compile", lambda call, **kw: torch._dynamo.optimize(broken)(call) if kw["backend"] == "broken" else call)
    made = bench.run(Target("t", attention, (torch.randn(1, 1, 4, 16),), {}), ["eager", "broken"], rounds=1, device=DEVICE)
    assert made.row("broken").error == "RuntimeError: g++ is not on PATH" and made.row("eager").seconds
    assert made.work() == (None, None, None) and made.measured() == []


def test_what_eager_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        bench.run(Target("t", lambda: 1 / 0, (), {}), ["eager"], device=DEVICE)


@pytest.mark.parametrize(("a", "b", "expected"), [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5), (torch.ones(2), torch.ones(3), float("inf")), (torch.tensor([1]), torch.tensor([2]), None),
    ({"x": torch.ones(2), "n": 3}, {"x": torch.ones(2), "n": 3}, 0.0), (torch.tensor([float("nan")]), torch.tensor([float("nan")]), 0.0),
    (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), 0.0), (torch.tensor([float("nan")]), torch.tensor([1.0]), torch.finfo(torch.float64).max), (torch.zeros(2), torch.zeros(2), 0.0),
])
def test_differences(a, b, expected):
    found = bench.difference(a, b)
    assert found == expected or (expected is not None and expected > 1e300 and found > 1e300)


def test_the_command(monkeypatch, tmp_path):
    result = CliRunner().invoke(app, ["bench", "models:llama_gqa", "--no-inductor", "--rounds", "2", "--length", "5", "--device", "flops=1e11,bandwidth=1e10", "--option", "target=reference", "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert [r["contender"] for r in made["rows"]] == ["eager", "tileweld"] and made["roofline_seconds"] > 0 and made["device"]["name"] == "given"


@pytest.mark.parametrize(("words", "said"), [(("models:lama_gqa",), "did you mean 'llama_gqa'?"), (("models:llama_gqa", "--device", "b300"), "unknown device 'b300'"), (("models:llama_gqa", "--option", "x"), "has no '='")])
def test_bad_input_is_one_line(words, said):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
