"""einsum: rows times a weight in letters  ->  matmul, for canonicalise. Sums are those of a library's product, as einsum's own are."""
from __future__ import annotations

import math

import torch

from ..compiler.ir.einsum import explicit
from ..compiler.ir.graph import value
from ..compiler.ir.products import is_weight

aten = torch.ops.aten


def as_matmul(at, node, equation, operands, path=None):
    """einsum("btd,dhk->bthk", x, w)  ->  reshape(matmul(x, reshape(w, [D, H K])), [B, T, H, K]);  "bthk,hkd->btd" likewise;  "ijb->bij" is a permute.

    A row of canonicalise: ``at`` emits a call. None where it is another product: of two activations or weights, with a dim that both have and the
    result keeps (one matrix a head, or an expert), a sum over one operand alone, a diagonal, a broadcast dim, or a weight whose summed dims are not together.
    """
    if path is not None:
        return None
    known = [value(t) for t in operands]
    terms, output = (side.split(",") for side in explicit(equation.replace(" ", ""), [t.dim() for t in known]).split("->"))
    output = output[0]
    if any(len(set(term)) != len(term) for term in (*terms, output)):
        return None
    if len(operands) == 1:
        return at(aten.permute.default, operands[0], [terms[0].index(c) for c in output]) if set(terms[0]) == set(output) else None
    if len(operands) != 2 or sum(map(is_weight, operands)) != 1:
        return None
    (x, in_x), (w, in_w) = sorted(zip(operands, terms), key=lambda pair: is_weight(pair[0]))
    rows, summed, columns = [c for c in in_x if c in output], [c for c in in_w if c not in output], [c for c in in_w if c in output]
    sizes = dict(zip(in_w, value(w).shape))
    if not rows or not summed or not columns or set(rows) & set(columns) or set(in_x) != {*rows, *summed} or not all(isinstance(n, int) and n for n in sizes.values()):
        return None
    if any(not isinstance(n, int) or n != sizes[c] for c, n in zip(in_x, value(x).shape) if c in sizes) or list(in_w) not in (summed + columns, columns + summed):
        return None
    if len(in_w) > 2 and not value(w).is_contiguous():  # its dims could not be joined without a copy
        return None
    depth, width = (math.prod(sizes[c] for c in letters) for letters in (summed, columns))
    lengths = [n if isinstance(n, int) else at(aten.sym_size.int, x, d) for d, n in enumerate(value(x).shape) if in_x[d] in rows]
    x = at(aten.permute.default, x, [in_x.index(c) for c in rows + summed])
    x = at(aten.reshape.default, x, [*lengths, depth]) if len(summed) > 1 else x
    if list(in_w) == summed + columns:
        w = at(aten.reshape.default, w, [depth, width]) if len(in_w) > 2 else w
    else:
        w = at(aten.permute.default, at(aten.reshape.default, w, [width, depth]) if len(in_w) > 2 else w, [1, 0])
    made = at(aten.matmul.default, x, w)
    made = at(aten.reshape.default, made, [*lengths, *(sizes[c] for c in columns)]) if len(columns) > 1 else made
    return at(aten.permute.default, made, [(rows + columns).index(c) for c in output])
