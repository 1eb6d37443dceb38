"""Putting generated Python together: a template whose ``$name`` lines take whole blocks of lines."""
from __future__ import annotations

import re
from collections.abc import Iterable


def fill(template: str, **parts: str | Iterable[str]) -> str:
    """The template with every ``$name`` replaced.

    A ``$name`` alone on its line takes many lines, each indented as it stands; where the part is empty, the line goes.
    """
    lines = []
    for line in template.strip("\n").splitlines():
        alone = re.fullmatch(r"( *)\$(\w+)", line)
        if alone:
            part = parts[alone[2]]
            block = part.splitlines() if isinstance(part, str) else [x for text in part for x in text.splitlines()]
            lines += [alone[1] + text if text else "" for text in block]
        else:
            lines.append(re.sub(r"\$(\w+)", lambda name: str(parts[name[1]]), line))
    return "\n".join(lines) + "\n"


def used(text: str, names: Iterable[str]) -> list[str]:
    """Those of the names that occur in the text, in the order given."""
    present = set(re.findall(r"[A-Za-z_]\w*", text))
    return [name for name in names if name in present]
