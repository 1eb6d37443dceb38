"""Makes docs/fusions.md from the docstrings of the passes: `python docs/make_fusions.py`; tests/test_docs.py holds them equal.

Of a docstring it takes the first paragraph ("name: what it matches -> what it makes") and what stands behind "Legality". A pass whose docstring
refers to another for that says "as NAME".
"""
import re
from pathlib import Path

from tileweld import passes
from tileweld.passes import canonicalise

HEAD = """# Fusions

The rewrites of `passes/`, in the order in which they run (the reason for the order is in `passes/__init__.py`). One file each, its docstring has the maths,
the cost and the papers; its test is in `tests/passes`. `options={"passes": {"NAME": False}}` turns one off, `True` one on that is off by default. What a refusal says in a report, and what to do
about it: [refusals.md](refusals.md). What is left after them becomes regions, without a pattern: [design.md](design.md).

| fusion | what it matches, and what it makes | refused or left, unless |
|---|---|---|
"""
TAIL = """
Made from the passes' docstrings by `python docs/make_fusions.py`; a test holds them equal.
"""


def page() -> str:
    return HEAD + "".join(row(rewrite) for rewrite in passes.PIPELINE) + TAIL


def row(rewrite) -> str:
    name = rewrite.__name__.rsplit(".", 1)[-1]
    return f"| [{name}](../passes/{name}.py) | {matched(rewrite)} | {legality(rewrite)} |\n"


def matched(rewrite) -> str:
    """The first paragraph, without the pass's name."""
    return cell(re.split(r"\n\s*\n", rewrite.__doc__)[0].split(":", 1)[1])


def legality(rewrite) -> str:
    """The rules, joined; for a normalisation what it says of results."""
    if rewrite is canonicalise:
        return cell(re.search(r"^Never changes a result.*?(?=\n\s*\n|\Z)", rewrite.__doc__, re.M | re.S)[0])
    found = re.search(r"^Legality.*?:\s*\n?(.*?)(?=\n\s*\n|\Z)", rewrite.__doc__, re.M | re.S)
    if found is None or not found[1].lstrip().startswith("- "):
        same = re.search(r"\b[Aa]s (?:in )?(\w+)|^Legality[^:]*: (.*?)(?=\n\s*\n)", rewrite.__doc__, re.M | re.S)
        return cell(same[2]).rstrip(".") if same[2] else f"as {same[1]}"
    rules, *_ = re.split(r"\n(?=\S)(?!- )", found[1])  # what follows the last rule is about something else
    return "; ".join(cell(rule).rstrip(";. ") for rule in re.split(r"(?:^|\n|\s{2,})- (?=\S)", rules) if rule.strip())


def cell(text: str) -> str:
    return " ".join(text.split()).replace("->", "→").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


if __name__ == "__main__":
    (Path(__file__).parent / "fusions.md").write_text(page())
