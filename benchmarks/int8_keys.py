"""int8 keys by the shape of their scales: python benchmarks/int8_keys.py [CASE ...] [--keep]

C++ attention over int8 keys and values, one thread: scales of keys a token (in the score), a channel (in the queries, the kernel knows nothing of them), a channel and group of 64 tokens (a text of the
keys), the same with shifts, the same with the newest 64 tokens in floats; beside torch that dequantises the keys before attention over floats. And whole steps of decoding with `tileweld.Int8KV`, compiled, by the cache's
options, and with a cache of float32; the same steps by tileweld, TorchInductor and eager torch ("three ways"). Contenders take turns; medians, and the lowest of all rounds.
"""
from __future__ import annotations

import argparse
import itertools
import types

import torch
import torch.nn.functional as F
from harness import interleaved, run_cases, show

import tileweld
from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.ir.attention import Variant, empty_output
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

GROUP = 64
#: query heads, KV heads, queries, keys, head dim
SHAPES = {"decode 12/12, 4096 x 64": (12, 12, 1, 4096, 64), "decode 32/8, 4096 x 128": (32, 8, 1, 4096, 128), "decode 9/3, 1024 x 64": (9, 3, 1, 1024, 64), "prefill 9/3, 512 of 1024 x 64": (9, 3, 512, 1024, 64)}
CACHES = {"token": {}, "channel": {"keys": "channel"}, "group": {"keys": "channel", "group": GROUP}, "group, shifts": {"keys": "channel", "group": GROUP, "asymmetric": True}}


def kernels(shape) -> dict:
    """contender -> call"""
    H, Hk, Tq, Tk, D = shape
    q, out = torch.randn(1, H, Tq, D), empty_output(torch.empty(1, H, Tq, D), D)
    k8, v8 = (torch.randint(-127, 128, (1, Hk, Tk, D), dtype=torch.int8) for _ in range(2))
    of_tokens, of_values = (torch.rand(1, Hk, Tk) / 60 for _ in range(2))
    scales, shifts = torch.rand(1, Hk, Tk // GROUP, D) / 60, torch.randn(1, Hk, Tk // GROUP, D)
    recent, filled = torch.randn(1, Hk, GROUP, D), torch.tensor(Tk - GROUP)
    at, place = f"[b, floordiv(h, {H // Hk}), j]", f"[b, h, floordiv(j, {GROUP}), d]"

    def built(captures, score="0.125*s", key="", dtype=torch.int8):
        variant = Variant(score, value=f"c0{at}", key=key, integer_captures=frozenset([4]))
        made = emit(variant, q_dtype=torch.float32, k_dtype=dtype, v_dtype=torch.int8, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=D, value_dim=D)
        launch = CppLauncher(compile_cpp([CppUnit(made.name, made.source, made.link_torch)])[0], made.entry)
        return lambda keys: launch([out, q, keys, v8, *captures], [])

    calls = {"token": built([of_values, of_tokens], f"0.125*(s*c1{at})"), "channel": built([of_values]), "group": built([of_values, scales], key=f"k*c1{place}"),
             "group, shifts": built([of_values, scales, shifts], key=f"k*c1{place} + c2{place}"),
             "group, shifts, newest": built([of_values, scales, shifts, recent, filled], key=f"where(j < c4, k*c1{place} + c2{place}, c3[b, h, mod(j, {GROUP}), d])")}
    floats = built([of_values], dtype=torch.float32)
    contenders = {name: (lambda call=call: call(k8)) for name, call in calls.items()}
    contenders["torch dequantises"] = lambda: floats(torch.addcmul(shifts.unsqueeze(3), k8.view(1, Hk, -1, GROUP, D).float(), scales.unsqueeze(3)).view(1, Hk, Tk, D))
    return contenders


class FloatKV:
    """A cache of float32 with the interface of Int8KV."""

    def __init__(self, batch, heads, length, head_dim):
        self.keys, self.values = (torch.zeros(batch, heads, length, head_dim) for _ in range(2))

    def update(self, k, v, positions):
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        return self.keys, self.values


def steps(shape, backends=("tileweld",)) -> dict:
    """One token behind a prompt, again and again in the same place of the cache, whose contents do not matter."""
    H, Hk, _, Tk, D = shape

    def attend(cache, q, k, v, positions):
        k, v = cache.update(k, v, positions)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(Tk)[None, :] <= positions[:, None], enable_gqa=True)

    q, k, v, position, contenders = torch.randn(1, H, 1, D), torch.randn(1, Hk, 1, D), torch.randn(1, Hk, 1, D), torch.tensor([Tk - 1]), {}
    for name, backend in itertools.product([*CACHES, "float32"], backends):
        own = types.FunctionType(attend.__code__.replace(co_name=f"attend_{len(contenders)}"), globals(), closure=attend.__closure__)  # else all look through the guards of all
        cache = FloatKV(1, Hk, Tk, D) if name == "float32" else tileweld.Int8KV(1, Hk, Tk, D, **CACHES[name])
        step = attend if backend == "eager" else torch.compile(own, backend=backend, dynamic=False)
        cache.update(torch.randn(1, Hk, Tk - 1, D), torch.randn(1, Hk, Tk - 1, D), torch.arange(Tk - 1))
        title = name if len(backends) == 1 else f"{name}, {backend}"
        contenders[title] = lambda cache=cache, step=step: step(cache, q, k, v, position)
        contenders[title]()
    return contenders


def case(title, contenders) -> dict:
    with torch.no_grad():
        times = interleaved(contenders(), rounds=50, warmup=3)
    first = "channel" if "channel" in times else "channel, tileweld"
    of = f"of {first}"
    rows = [{"scales of keys": name, "ms": round(t["median_ms"], 4), "lowest": round(t["min_ms"], 4), of: round(t["min_ms"] / times[first]["min_ms"], 2)} for name, t in times.items()]
    show(title, rows, ["scales of keys", "ms", "lowest", of])
    return {"rows": rows}


CASES = {**{name: lambda name=name, shape=shape: case(name, lambda: kernels(shape)) for name, shape in SHAPES.items()},
         **{f"step, {name}": lambda name=name, shape=shape: case(f"step, {name}", lambda: steps(shape)) for name, shape in SHAPES.items() if shape[2] == 1},
         **{f"three ways, {name}": lambda name=name, shape=shape: case(f"three ways, {name}", lambda: steps(shape, ("tileweld", "inductor", "eager"))) for name, shape in SHAPES.items() if shape[2] == 1}}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--keep", action="store_true", help="store the figures in benchmarks/results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    run_cases(CASES, chosen.cases or None, "int8_keys.json", chosen.keep)
