"""What surrounds a kernel's launch where it is more than the launch: ``run(launch)`` is a function (outs, *ins), see select.Choice.

Each remembers what it was made of in ``run.recipe`` = (name, arguments), so that an executable kept on disk is put together again.
"""
from __future__ import annotations

import functools

from ..runtime.launches import OUT_OF_RANGE

RUNS: dict = {}


def _remembered(make):
    @functools.wraps(make)
    def made(*arguments):
        run = make(*arguments)
        run.recipe = (make.__name__, arguments)
        return run

    RUNS[make.__name__] = made
    return made


@_remembered
def checked(tensors: int):
    """A kernel that reads positions from data says in its last output whether one was out of range."""
    def run(launch):
        def region_kernel(outs, *ins):
            outs[-1].zero_()
            launch([*outs, *ins[:tensors]], ins[tensors:], ())
            if outs[-1].item():
                raise IndexError(OUT_OF_RANGE)

        return region_kernel

    return run


@_remembered
def with_targets(ignored: int, floats: tuple):
    """A target out of bounds raises as eager does. A GPU is not waited for: there the loss is NaN."""
    def run(launch):
        from .ir.cross_entropy import check_targets

        def cross_entropy_kernel(outs, logits, targets):
            outs[-1].zero_()
            launch([*outs, logits, targets], (ignored,), floats)
            if not logits.is_cuda and outs[-1].item():
                check_targets(targets, logits.shape[-1], ignored)

        return cross_entropy_kernel

    return run
