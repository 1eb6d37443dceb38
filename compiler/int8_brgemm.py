"""Who multiplies the bytes of many rows where brgemm may (runtime/brgemm.py): it, or the kernel's own micro-kernels.

Both are in one kernel, and the last integer of a call says which: nothing is built to compare them. Elsewhere kernels have one way, and nothing is timed.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from ..runtime import brgemm
from . import pays
from .ir.graph import value
from .select import Choice


def choose_products(choices: Sequence[Choice], launchers: dict[str, Callable]) -> None:
    """Set the last integer of every kernel that may use brgemm. Timed once a kernel, shapes and thread count, as in pays.py; on a busy machine, and for small products, brgemm it is."""
    for choice in choices:
        k = choice.kernel
        if choice.op != "int8_linear" or k is None or not k.link_torch or k.source not in launchers:
            continue
        theirs, own = (0.0, 0.0) if brgemm.is_forced() or pays.flops(choice) < pays.WORTH_TIMING else pays.known("brgemm 1", [choice], lambda choice=choice: _measured(choice, launchers[choice.kernel.source]))
        choice.ints = (*choice.ints[:-1], int(theirs <= own))
        choice.reason = "generated for this op, products of brgemm" if choice.ints[-1] else f"generated for this op; its own products take {own * 1e3:.2f} ms, brgemm's {theirs * 1e3:.2f}"


def _measured(choice: Choice, launch: Callable) -> tuple[float, float]:
    """(seconds with brgemm, without)."""
    with pays.real_tensors():
        ins, outs = [pays.like(value(n)) for n in choice.inputs], [pays.like(value(o)) for o in choice.outputs]
        ints = [*map(pays.hint, choice.ints[:-1])]
    return pays.timed(lambda: launch([*outs, *ins], (*ints, 1), choice.floats), lambda: launch([*outs, *ins], (*ints, 0), choice.floats), 1.0)
