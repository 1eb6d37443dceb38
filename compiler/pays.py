"""A fusion that does not pay is not made, nor int8 that does not: a matmul's kernel is timed against torch's own matmul and its epilogue apart.

The alternative is counted at its best: the library's product, and one pass over memory for the norm and for each epilogue. A kernel
that is more than a tenth slower (the clock's noise on a busy machine) loses, and its op is taken apart. Timed once a kernel, number of
rows and thread count, and kept in the cache. Small products are not timed: there the launches saved are worth more than the product.
On a machine that is busy with other work, where a contender's own times differ by a third, nothing is concluded and nothing kept.

On a GPU a time is that of several calls in a row, from Python, as an executable makes them; CUDA graphs, which launch faster, are not considered.
"""
from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..runtime import cache
from . import log
from .capture import real_tensors
from .ir.graph import value
from .ir.kernel import Kernel
from .select import Choice

WORTH_TIMING = 2e7  # FLOPs: 0.1 to 0.2 ms of one core
ROUNDS = 5
SECONDS = 0.1  # for one kernel; a large product gets fewer rounds, but not below three
STEADY = 1.3  # median over best
MARGIN = 1.1
CLEAR = 1.1  # this far from where the decision turns, two steady rounds are enough

IN_A_ROW = 10  # calls on a GPU between two waits for it

_known: dict[str, tuple[float, float]] = {}
_UNSTEADY = (0.0, 0.0)


def losers(choices: Sequence[Choice], launchers: dict[str, Callable], kept: dict[str, str]) -> dict[str, str]:
    """Name of the node -> why it is better taken apart, of the fused matmuls. kept: gains why int8 stays, of those that are int8."""
    found = {}
    for choice in choices:
        k = choice.kernel
        if choice.op not in ("linear", "int8_linear"):
            continue
        if k is None or k.source not in launchers or choice.interpreted:
            kept[choice.node.name] = "not timed: it runs in Triton's interpreter" if choice.interpreted else "not timed: it runs on its definition"
            continue
        x, *rest = (value(n) for n in choice.inputs)
        weights = rest[:len(choice.node.args[1])]
        if flops(choice) < WORTH_TIMING:
            kept[choice.node.name] = "too small to be timed"
            continue
        try:
            fused, apart = _seconds(choice, k, launchers[k.source], x, weights, rest[len(weights):])
        except Exception as error:  # of a GPU: its memory may be full, its kernels are compiled when they are called first
            if x.device.type == "cpu":
                raise
            log.get("codegen").warning("%s could not be timed: %s", k.name, error)
            kept[choice.node.name] = f"it could not be timed ({type(error).__name__})"
            continue
        if choice.op == "int8_linear":  # it costs accuracy: no margin
            if fused >= apart and (fused, apart) != _UNSTEADY:
                found[choice.node.name] = f"the float product is faster here: {apart * 1e3:.2f} ms against {fused * 1e3:.2f}"
            else:
                kept[choice.node.name] = "the machine is too busy to time it" if (fused, apart) == _UNSTEADY else f"int8 is faster here: {fused * 1e3:.2f} ms against {apart * 1e3:.2f}"
        elif fused > MARGIN * apart:
            found[choice.node.name] = f"torch's matmul and the rest apart are faster here: {apart * 1e3:.2f} ms against {fused * 1e3:.2f}"
    return found


def is_settled() -> bool:
    """Was the machine quiet enough for every time that was asked for in this process? If not, the next process may conclude something else."""
    return _UNSTEADY not in _known.values()


def flops(choice: Choice) -> float:
    """Of the products of a linear or int8_linear."""
    rows = hint(value(choice.inputs[0]).shape[0])
    return sum(2.0 * rows * w.shape[0] * w.shape[1] for w in map(value, choice.node.args[1]))


def hint(n) -> int:
    """A size or a node that gives one, or what a symbolic one is this time."""
    n = value(n) if isinstance(n, torch.fx.Node) else n
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)


def _seconds(choice: Choice, kernel: Kernel, launch: Callable, x, weights, captures) -> tuple[float, float]:
    """(the kernel's time, the library's with its passes over memory), from the cache or measured now."""
    shapes = [[hint(n) for n in t.shape] for t in (x, *weights, *captures)]
    strides = [[hint(n) for n in t.stride()] for t in (x, *weights)]
    where = {"device": torch.cuda.get_device_name(x.device)} if x.device.type == "cuda" else {"threads": torch.get_num_threads()}
    key = cache.entry_key("pays 2", kernel.source, shapes=shapes, strides=strides, **where)
    return _kept(key, kernel.name, lambda: _measured(choice, launch, x, weights, captures))


def known(what: str, choices: Sequence[Choice], measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Two times of the kernels of several choices, from the cache or from ``measure()``."""
    tensors = [[value(n) for n in c.inputs] for c in choices]
    key = cache.entry_key(what, "\n".join(c.kernel.source for c in choices), shapes=[[[hint(n) for n in t.shape] for t in own] for own in tensors],
                          strides=[[[hint(n) for n in t.stride()] for t in own] for own in tensors], threads=torch.get_num_threads())
    return _kept(key, " and ".join(c.kernel.name for c in choices), measure)


def _kept(key: str, name: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    if key not in _known:
        path = cache.root() / f"{key}.pays.json"
        try:
            fused, apart = json.loads(path.read_text())
            _known[key] = float(fused), float(apart)
        except (OSError, ValueError, TypeError):
            _known[key] = measure()
            if _known[key] != _UNSTEADY:
                cache.put_text(path, json.dumps(_known[key]))
            log.get("codegen").debug("%s: %.3f ms, apart %.3f ms", name, *(1e3 * s for s in _known[key]))
    return _known[key]


def like(fake: torch.Tensor) -> torch.Tensor:
    """A real tensor of a fake one's layout; ones, since zeros and denormals may be faster or slower than numbers."""
    sizes, strides = [hint(n) for n in fake.shape], [hint(n) for n in fake.stride()]
    return torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device).fill_(1 if fake.dtype.is_floating_point else 0)


def _measured(choice, launch, x, weights, captures) -> tuple[float, float]:
    with real_tensors(), torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        ins = [like(t) for t in (x, *weights, *captures)]
        outs = [like(value(o)) for o in choice.outputs]
        ints = [*map(hint, choice.ints)]
        source, matrices = ins[0], ins[1:1 + len(weights)]
        spare = torch.empty_like(source)
        products = [source.new_empty(source.shape[0], w.shape[0]) for w in matrices]
        if choice.op == "int8_linear":  # against floats of x's dtype
            matrices = [source.new_ones(w.shape) for w in matrices]
        has_norm, epilogues = (bool(choice.node.args[at]) if at < 7 else choice.node.args[at] for at in ((5, 8) if choice.op == "int8_linear" else (4, 7)))

        def fused():
            launch([*outs, *ins], ints, choice.floats)

        def apart():
            if has_norm:
                torch.mul(source, source, out=spare)
            for w in matrices:
                F.linear(source, w)
            for text, out in zip(epilogues, outs):
                if not text.startswith("a") or len(text) > 2:
                    torch.mul(products[0] if products[0].shape == out.shape else out, out, out=out)

        return _timed(fused, apart, 1.0 if choice.op == "int8_linear" else MARGIN, x.device)


def timed(one: Callable, other: Callable, margin: float) -> tuple[float, float]:
    """Seconds of both, which take turns; the decision turns where one takes `margin` times the other. `_UNSTEADY` on a busy machine."""
    with real_tensors():
        return _timed(one, other, margin)


def _once(call: Callable, device: torch.device) -> float:
    """Seconds of a call; on a GPU of one of several in a row, whose launches overlap with what runs."""
    calls = 1 if device.type == "cpu" else IN_A_ROW
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / calls


def _timed(one: Callable, other: Callable, margin: float, device: torch.device = torch.device("cpu")) -> tuple[float, float]:
    for call in (one, other):
        _once(call, device)
    times, started = ([], []), time.perf_counter()
    for done in range(1, ROUNDS + 1):
        for own, call in zip(times, (one, other)):
            own.append(_once(call, device))
        if (done >= 3 and time.perf_counter() - started > SECONDS) or (done >= 2 and _is_steady(times) and _is_clear(min(times[0]), margin * min(times[1]))):
            break
    return (min(times[0]), min(times[1])) if _is_steady(times) else _UNSTEADY


def _is_steady(times) -> bool:
    return all(statistics.median(own) <= STEADY * min(own) for own in times)


def _is_clear(x: float, y: float) -> bool:
    return max(x, y) > CLEAR * min(x, y)
