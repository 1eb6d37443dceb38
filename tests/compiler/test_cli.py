"""The command line: good targets, bad input in one line with exit code 2, --strict for CI. In one process, since importing torch takes seconds."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tileweld.compiler.cli import app

USER_FILE = '''
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, escape=False):
        super().__init__()
        self.proj, self.escape = nn.Linear(32, 96), escape

    def forward(self, x):
        q, k, v = (y.view(2, -1, 2, 16).transpose(1, 2) for y in self.proj(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1)
        return (weights @ v, weights) if self.escape else weights @ v

    def example_inputs(self):
        return (torch.randn(2, 6, 32),)


def pair():
    return Attention(), (torch.randn(2, 6, 32),)


def module():
    return Attention()


def keywords():
    return Attention(), {"x": torch.randn(2, 6, 32)}


def escaping():
    return Attention(escape=True)


def wrong():
    return 7


def failing():
    raise ValueError("no weights here")


def bad_shape():
    return Attention(), (torch.randn(2, 6, 31),)
'''


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "mine.py"
    path.write_text(USER_FILE)
    return path


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("factory", ["pair", "module", "keywords"])
def test_a_factory_of_the_users_is_explained(user_file, factory):
    result = run("explain", f"{user_file}:{factory}", "--strict")
    assert result.exit_code == 0, result.output
    assert "score=0.25*s" in result.stdout and "mine.py:" in result.stdout
    assert "1 seen, 1 fused into attention, 0 refused" in result.stdout


def test_a_refusal_says_what_why_where_and_what_to_do_and_strict_fails(user_file):
    result = run("explain", f"{user_file}:escaping", "--strict")
    assert result.exit_code == 1
    words = " ".join(result.stdout.split())
    for part in ("not fused attention", "because the attention weights are also used outside the core", "mine.py:", "to do do not return or reuse the weights"):
        assert part in words
    assert run("explain", f"{user_file}:escaping").exit_code == 0


def test_the_option_strict_raises_and_is_a_refusal_too(user_file):
    result = run("explain", f"{user_file}:escaping", "--option", "strict=true")
    assert result.exit_code == 1 and result.stderr.startswith("RefusalError: attention refused:")


def test_options_reach_the_backend(user_file):
    result = run("explain", f"{user_file}:pair", "--option", "passes=attention:off", "--json")
    assert "attention" not in json.loads(result.stdout)["counts"]
    assert "options ask for it" in run("explain", f"{user_file}:pair", "--option", "target=reference").stdout


def test_json_has_every_part(user_file):
    report = json.loads(run("explain", f"{user_file}:escaping", "--json").stdout)
    assert report["refusals"][0]["rewrite"] == "attention" and "mine.py" in report["refusals"][0]["source"]
    assert report["softmaxes"] == [{"seen": 1, "fused": 0, "refused": 1}]


@pytest.mark.parametrize(("target", "expected"), [("hf:llama:pad", "mask=(j <= i) & (c0[b, j] != 0) heads=4/2"), ("models:llama_gqa:mqa", "heads=4/1")])
def test_targets_of_both_collections(target, expected):
    result = run("explain", target, "--length", "9", "--strict")
    assert result.exit_code == 0, result.output
    assert expected in " ".join(result.stdout.split())


def test_training_and_dynamic_shapes(user_file):
    result = run("dump", f"{user_file}:pair", "--train", "--dynamic", "--stage", "aot")
    assert result.exit_code == 0, result.output
    assert "# graph 0, forward, behind AOTAutograd" in result.stdout and "# graph 0, backward, behind AOTAutograd" in result.stdout
    assert "= attention_backward(" in result.stdout and "s" in result.stdout.split("attention: f32[")[1].split("]")[0]


def test_html_is_one_file_with_everything_in_it(user_file, tmp_path):
    page = tmp_path / "report.html"
    assert run("explain", f"{user_file}:escaping", "--html", page).exit_code == 0
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "the attention weights are also used outside the core" in text
    assert "http" not in text and "src=" not in text, "nothing is fetched"
    assert 'class="refused"' in text and "softmax" in text


def test_kernels_are_built_and_measured(user_file):
    result = run("kernels", f"{user_file}:pair", "--option", "target=cpp", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert all(row["error"] is None and row["bytes"] > 1000 and row["lines"] > 10 for row in rows)


def test_kernels_ahead_of_time_for_a_gpu_that_is_not_here():
    pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
    result = run("kernels", "models:llama_gqa", "--arch", "sm_90", "--dtype", "float16", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    attention = next(row for row in rows if row["kernel"] == "attention_kernel")
    assert attention["arch"] == "sm_90" and attention["matmul"] == "wgmma" and attention["spills"] == 0 and attention["registers"] > 0


# ---------------------------------------------------------------- bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("explain", "nothing"), "TargetError: unknown target 'nothing'; the forms are hf:llama"),
        (("explain", "nothing"), "llama_gqa"),
        (("explain", "models:lama_gqa"), "did you mean 'llama_gqa'?"),
        (("explain", "models:llama_gqa:foo"), "unknown variant 'foo' (models:llama_gqa:foo); choose from: mha, mqa"),
        (("explain", "hf:lama"), "unknown Hugging Face architecture 'lama' (hf:lama); near: llama"),
        (("explain", "hf:llama:flash"), "unknown attention implementation 'flash'"),
        (("explain", "hf:llama:eager", "--attn", "sdpa"), "both eager and sdpa are asked for"),
        (("explain", "models:llama_gqa", "--attn", "sdpa"), "--attn is for hf: targets"),
        (("explain", "models:llama_gqa", "--option", "foo=1"), "unknown option 'foo'"),
        (("explain", "models:llama_gqa", "--option", "verify"), "has no '='"),
        (("explain", "models:llama_gqa", "--option", "verify=7"), "option 'verify' has the value '7'"),
        (("explain", "models:llama_gqa", "--option", "passes=atention:off"), "unknown pass 'atention' (options['passes']); did you mean 'attention'?"),
        (("explain", "models:llama_gqa", "--option", "passes=attention"), "write passes=name:on or passes=name:off"),
        (("explain", "models:llama_gqa", "--option", "target=tritn"), "option 'target' has the value 'tritn'"),
        (("explain", "models:llama_gqa", "--dtype", "float15"), "unknown dtype 'float15'"),
        (("dump", "models:llama_gqa", "--stage", "capture", "--diff"), "--diff has no meaning for --stage capture"),
        (("dump", "models:llama_gqa", "--stage", "kernels", "--format", "dot"), "kernels are no graph"),
        (("kernels", "models:llama_gqa", "--arch", "sm_99"), "unknown architecture 'sm_99'"),
        (("explain", "absent.py:factory"), "there is no file absent.py"),
        (("explain", "{file}"), "names no factory"),
        (("explain", "{file}:pairs"), "unknown factory 'pairs'"),
        (("explain", "{file}:wrong"), "the factory gave int"),
        (("explain", "{file}:failing"), "the factory failed: ValueError: no weights here"),
        (("explain", "{file}:bad_shape"), "the target itself fails in eager PyTorch: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (("explain", "{file}:bad_shape"), "mine.py:12"),
        (("dump", "{file}:pair", "-o", "/no/such/folder/graph.txt"), "cannot write /no/such/folder/graph.txt"),
    ],
    ids=lambda x: " ".join(x[1:]) if isinstance(x, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(user_file, words, said):
    result = run(*(w.replace("{file}", str(user_file)) for w in words))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_file_that_does_not_import_names_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\n\nundefined_name\n")
    result = run("explain", f"{path}:factory")
    assert result.exit_code == 2 and "NameError" in result.stderr and "broken.py:3" in result.stderr


def test_debugging_shows_the_traceback(user_file, monkeypatch):
    from tileweld.compiler import log

    try:
        log.configure("debug")
        result = run("explain", f"{user_file}:failing")
        assert result.exit_code == 1 and isinstance(result.exception, Exception) and "the factory failed" in str(result.exception)
    finally:
        log.configure("")


def test_help_and_a_typing_error_need_no_torch():
    """They answer at once: importing torch takes seconds."""
    code = ("import sys; from typer.testing import CliRunner; from tileweld.compiler.cli import app; r = CliRunner().invoke(app, {words}); "
            "assert r.exit_code == {code}, r.output; sys.exit('torch' in sys.modules)")
    for words, status in ((["--help"], 0), (["explain", "--help"], 0), (["explain", "nothing"], 2), (["explain", "models:foo"], 2)):
        assert subprocess.run([sys.executable, "-c", code.format(words=words, code=status)]).returncode == 0, words
