"""Attention's backward as blocks of torch operations, its definition, where the generated kernel is slower: both are timed at the op's sizes, once a kernel, sizes and thread count, and kept in the kernel cache."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch.fx import Node

from . import pays
from .ir.graph import value
from .select import BLOCKS, Choice

ROUNDS = 5
CLEAR = 1.5  # this far apart, one round is enough: the kernel takes a half to a tenth of the time
UNTIMED = (0.0, 1.0)  # the kernel stays


def blocks_instead(node: Node, apart: Collection[str]) -> Choice | None:
    """The definition, of an attention_backward among ``apart``; name of a node -> why."""
    if node.target is not torch.ops.tileweld.attention_backward.default or node.name not in apart:
        return None
    return Choice("attention_backward", apart[node.name] if isinstance(apart, Mapping) else "its kernel is slower", BLOCKS)


def slower(choices: Sequence[Choice], launchers: dict[str, Callable]) -> dict[str, str]:
    """Name of the node -> why blocks of torch operations are better, of the attention_backward on CPUs."""
    found = {}
    for choice in choices:
        if choice.op == "attention_backward" and choice.kernel is not None and choice.kernel.language == "cpp" and choice.kernel.source in launchers:
            kernel, blocks = pays.known("backward pays 2", [choice], functools.partial(_measured, choice, launchers[choice.kernel.source]))
            if kernel > blocks:
                found[choice.node.name] = f"blocks of torch operations are faster here: {blocks * 1e3:.2f} ms against {kernel * 1e3:.2f}"
    return found


def _ones(fake: torch.Tensor) -> torch.Tensor:
    """Of a fake tensor's layout; ones are numbers, positions in most tables, and masks that hold."""
    return torch.empty_strided([pays.hint(n) for n in fake.shape], [pays.hint(n) for n in fake.stride()], dtype=fake.dtype).fill_(1)


def _measured(choice: Choice, launch: Callable) -> tuple[float, float]:
    """Best seconds of the kernel and of the definition. UNTIMED where ones are no positions of a table."""
    captures, sizes, *texts = choice.node.args[4:]
    with pays.real_tensors():
        ins, ints, outs = [_ones(value(n)) for n in choice.inputs], [*map(pays.hint, choice.ints)], [_ones(value(o)) for o in choice.outputs]
        calls = (lambda: launch([*outs, *ins], ints, ()), lambda: choice.node.target(*ins[:4], ins[4:], ints, *texts))
        times: tuple[list, list] = ([], [])
        calls[0]()  # takes its workspace
        for done in range(1, ROUNDS + 1):
            for own, call in zip(times, calls):
                start = time.perf_counter()
                try:
                    call()
                except IndexError:
                    return UNTIMED
                own.append(time.perf_counter() - start)
            kernel, blocks = map(min, times)
            if blocks > CLEAR * kernel or (done >= 2 and kernel > CLEAR * blocks):
                break
    return kernel, blocks
