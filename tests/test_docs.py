"""README and docs are run: every python block, every cheap console block (`$ tileweld ...`), every link between the files."""

import contextlib
import fnmatch
import io
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the fenced blocks of a language."""
    text = path.read_text()
    return [(text[: m.start()].count("\n") + 1, m.group(2)) for m in FENCE.finditer(text) if m.group(1) == language]


def sessions(path: Path) -> list[tuple[int, str, str]]:
    """(line, command, expected output) of every `$ command` in console blocks."""
    found = []
    for line, text in blocks(path, "console"):
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((line, command.split("  #")[0].split(" # ")[0].strip(), output))
    return found


COMMANDS = [(path, *session) for path in FILES for session in sessions(path) if session[1].startswith("tileweld ") and "--arch" not in session[1]]
# --arch takes seconds a kernel; test_cli.py runs it.
OTHERS = {"tileweld kernels hf:llama --arch sm_90 --dtype float16", "make demo", "make test", "pip install .", "pip install '.[hf]'", "pip install '.[gpu]'", "pip install '.[plot]'"}


@pytest.mark.parametrize("path", [p for p in FILES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(path, monkeypatch):
    from tileweld import passes
    from tileweld.compiler.ir.lift import POINTWISE

    monkeypatch.setattr(passes, "PIPELINE", passes.PIPELINE)  # adding-a-fusion.md adds to it, and to the lifting table
    before = dict(POINTWISE)
    names = {"__name__": "docs"}
    try:
        for line, text in blocks(path, "python"):
            code = "\n" * line + text  # so that a traceback shows the line of the document
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, str(path), "exec"), names)
    finally:
        for op in POINTWISE.keys() - before.keys():
            del POINTWISE[op]


@pytest.mark.parametrize(("path", "line", "command", "expected"), COMMANDS, ids=[f"{p.name}:{line} {c}" for p, line, c, _ in COMMANDS])
def test_console_blocks_say_what_the_command_says(path, line, command, expected):
    from typer.testing import CliRunner

    from tileweld.compiler.cli import app

    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output
    assert matches(result.stdout, expected), f"{path.name}:{line}: the document says\n{expected}\nthe command says\n{result.stdout}"


def matches(output: str, expected: str) -> bool:
    """Equal but for runs of white space, where `...` in the document stands for anything."""
    wanted = [" ".join(part.split()) for part in expected.split("...")]
    pattern = "*".join(re.sub(r"([\[\]*?])", r"[\1]", part) for part in wanted)
    return not expected.strip() or fnmatch.fnmatchcase(" ".join(output.split()), f"{pattern}*" if expected.rstrip().endswith("...") else pattern)


def test_a_wrong_output_would_be_noticed():
    assert matches("a  b\nc [d]", "a b ... [d]") and matches("a b c", "a ...")
    assert not matches("a b c", "a x ...") and not matches("a b c", "a b")


def test_every_console_command_is_one_that_is_checked_or_known():
    for path in FILES:
        for line, command, _ in sessions(path):
            known = (path, line, command) in [c[:3] for c in COMMANDS] or command in OTHERS
            assert known, f"{path.name}:{line}: {command}"


def test_links_lead_somewhere():
    links = [(path, target) for path in FILES for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()) if not target.startswith("http")]
    assert links
    for path, target in links:
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_files_that_the_documents_name_exist():
    named = {(path, name) for path in FILES for name in re.findall(r"`?\b((?:compiler|codegen|passes|runtime|tests|docs)/[\w/]+\.(?:py|md))\b", FENCE.sub("", path.read_text()))}
    assert len(named) > 5
    made_up = {"compiler/ir/gated.py", "passes/gated.py"}  # what adding-a-fusion.md has the reader write
    assert not {f"{path.name}: {name}" for path, name in named if name not in made_up and not (ROOT / name).exists()}


def test_the_options_of_the_documents_are_those_of_the_table():
    made = runpy.run_path(str(ROOT / "docs" / "make_options.py"))
    cure = "run python docs/make_options.py"
    assert (ROOT / "docs" / "options.md").read_text() == made["page"](), cure
    readme = (ROOT / "README.md").read_text()
    assert readme == made["readme"](readme), cure
    assert made["table"]() in readme


def test_every_fusion_of_the_pipeline_is_in_the_table():
    from tileweld import passes

    made = runpy.run_path(str(ROOT / "docs" / "make_fusions.py"))
    page = (ROOT / "docs" / "fusions.md").read_text()
    assert page == made["page"](), "run python docs/make_fusions.py"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| [")]
    assert [row[0] for row in rows] == [f"| [{p.__name__.rsplit('.', 1)[-1]}](../passes/{p.__name__.rsplit('.', 1)[-1]}.py)" for p in passes.PIPELINE]
    assert all(len(row) == 3 and min(map(len, row)) > 10 for row in rows)


def test_every_reason_of_a_refusal_is_explained():
    """A reason that a pass can give stands in refusals.md, at least by its first words."""
    page = " ".join((ROOT / "docs" / "refusals.md").read_text().split())
    for words in ("used outside the core", "dropout of", "stands between the softmax and v", "softmax runs over", "mixes batch, heads and positions",
                  "in a way that is no sum", "without its maximum subtracted", "a symbolic head dim", "drops its dim", "computes x*x in float16",
                  "gate and up are matmuls of different tensors", "to their product has no scalar expression", "the matmul stays as it is", "an input of the fused matmul is computed from one of its results",
                  "changes the gradient or autocast mode", "the norm's result is also needed elsewhere", "matmuls at different places read the norm's result", "eps is a tensor", "torch's matmul and the rest apart are faster here", "the expanded keys and values are also used by", "stands between the latent and the keys", "a bias of the keys adds to the scores of a row", "a bias of the values counts once"):
        assert words in page, words
        sources = [p for folder in ("passes", "compiler") for p in (ROOT / folder).rglob("*.py")]
        assert any(words in p.read_text() or words in " ".join(p.read_text().split()) for p in sources) or words == "mixes batch, heads and positions", f"no pass says {words!r} any more"
