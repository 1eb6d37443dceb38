"""Equations of torch.einsum."""
from __future__ import annotations

import string


def explicit(equation: str, ranks) -> str:
    """An equation with its output written out and with letters for "...", which stands for the leading dims, aligned at the right."""
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        output = ("..." if "." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    free = [c for c in string.ascii_letters if c not in equation]
    width = max([rank - len(term) + 3 for term, rank in zip(terms, ranks) if "..." in term], default=0)
    hidden = "".join(free[:width])
    terms = [term.replace("...", hidden[len(hidden) - (rank - len(term) + 3):]) if "..." in term else term for term, rank in zip(terms, ranks)]
    return ",".join(terms) + "->" + output.replace("...", hidden)
