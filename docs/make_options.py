"""Writes docs/options.md, and the same table into README.md, from compiler/options.TABLE: python docs/make_options.py"""
from __future__ import annotations

from pathlib import Path

from tileweld.compiler.options import TABLE

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- options: made by docs/make_options.py -->", "<!-- end of options -->"

PAGE = """# Options

    torch.compile(model, backend="tileweld", options={{"target": "cpp", "verify": True}})

{table}

An unknown option or value is an `OptionError` that lists what exists. On the command line an option is `--option verify=true`,
a pass is turned off with `--option passes=attention:off`.

Made from the table in `compiler/options.py` by `python docs/make_options.py`; a test holds the two equal.
"""


def table() -> str:
    """The options as a Markdown table."""
    rows = [f"| `{name}` | {_code(o.values)} | `{o.default!r}` | {o.meaning} |" for name, o in TABLE.items()]
    return "\n".join(["| option | values | default | what it does |", "|---|---|---|---|", *rows])


def _code(values: str) -> str:
    return " ".join(f"`{value.strip()}`" for value in values.split(" | ")) if not values.startswith("{") else f"`{values}`".replace(" | ", " or ")


def page() -> str:
    """The text of docs/options.md."""
    return PAGE.format(table=table())


def readme(text: str) -> str:
    """README's text with the table between its marks brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(page())
    target = ROOT / "README.md"
    target.write_text(readme(target.read_text()))
