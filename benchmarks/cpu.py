"""CPU benchmarks against eager and TorchInductor: `python benchmarks/cpu.py [CASE ...]`; without a case, all of them.

Every case checks the numbers against eager first, then times the contenders interleaved in one process. Compile times are
measured in processes of their own with empty (cold) or filled (warm) caches. Results go to benchmarks/results/cpu.json.
"""
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fusion
import torch
import training
import typer
from harness import interleaved, peak_extra, relative_error, run_cases, show

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def llama(attention: str = "eager"):
    """A Llama of 4 layers, 768 wide, 12 heads of 64 over 4 KV heads, intermediate 2048, vocabulary 4096; 1024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=768, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=2048, use_cache=False)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    return model, torch.randint(0, 4096, (1, 1024))


def window_softcap(tokens: int = 4096):
    """Gemma-2 style layers, every one with a window of 256 and softcap 50: 4 layers, 512 wide, 8 heads of 64, 4096 tokens."""
    from tileweld.models import gemma2

    torch.manual_seed(0)
    model = gemma2.build(vocab=1024, hidden=512, layers=4, heads=8, kv_heads=8, head_dim=64, intermediate=1024, window=256, query_scalar=64.0)
    for layer in model.blocks:  # the reference alternates; here every layer has the window
        layer.attn.window = 256
    return model, torch.randint(0, 1024, (1, tokens))


def logits(output) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output


def compare(title: str, build, rounds: int, extra: dict | None = None) -> dict:
    """eager, Inductor and tileweld on one model: error against eager, cold compile in this process, medians, ratios."""
    model, tokens = build()
    calls, compile_s, errors = {"eager": lambda: model(tokens)}, {}, {}
    with torch.no_grad():
        expected = logits(model(tokens))
        for backend in ("inductor", "tileweld"):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=backend)
            start = time.perf_counter()
            errors[backend] = relative_error(logits(compiled(tokens)), expected)
            compile_s[backend] = time.perf_counter() - start
            calls[backend] = lambda compiled=compiled: compiled(tokens)
        for name, call in (extra or {}).items():
            calls[name] = call(model, tokens)
        times = interleaved(calls, rounds)
    ours = times["tileweld"]["median_ms"]
    rows = [{"contender": name, **t, "eager/it": times["eager"]["median_ms"] / t["median_ms"], "it/tileweld": t["median_ms"] / ours, "error": errors.get(name, 0.0), "first call s": compile_s.get(name, 0.0)} for name, t in times.items()]
    show(title, rows, ["contender", "median_ms", "min_ms", "max_ms", "eager/it", "it/tileweld", "error", "first call s"])
    return {"rows": rows}


def case_llama_eager() -> dict:
    """Llama 768 wide, 4 layers, 1024 tokens, eager attention: >= 1.9x eager, >= 1.1x Inductor."""
    sdpa = llama("sdpa")[0]
    return compare("Llama 768 wide, 4 layers, 1024 tokens, eager attention", llama, 9, {"eager, sdpa": lambda model, tokens: (sdpa.load_state_dict(model.state_dict()), lambda: sdpa(tokens))[1]})


def case_window_softcap() -> dict:
    """Window 256 and softcap, 4096 tokens: >= 3x Inductor."""
    return compare("window 256 + softcap, 512 wide, 4 layers, 4096 tokens", window_softcap, 5)


def case_memory() -> dict:
    """8192 tokens, one layer: what attention needs beyond its inputs and output, against the T x T score matrix of one head: < 2%."""
    rows = [json.loads(run_python(f"import json, cpu; print('row', json.dumps(cpu.memory({name!r})))", os.environ).split("row", 1)[1]) for name in SCORES]
    show("memory of attention at 8192 tokens, 8 heads of 64, beyond inputs and output", rows, ["what", "extra MiB", "T x T MiB", "share"])
    return {"rows": rows}


SCORES = {"causal": lambda s: s, "causal + softcap": lambda s: 50 * torch.tanh(s / 50)}


def memory(name: str) -> dict:
    """One row of case_memory, for a process of its own: memory that earlier work left in the allocator would hide what is needed."""
    tokens, score = 8192, SCORES[name]

    def attention(q, k, v):
        s = score(q @ k.transpose(-1, -2) * 0.125)
        i = torch.arange(q.shape[2])
        return s.masked_fill(i[None, :] > i[:, None], float("-inf")).softmax(-1) @ v

    compiled = torch.compile(attention, backend="tileweld", dynamic=True)
    with torch.no_grad():
        for short in (64, 96):  # builds and loads everything; the workspace of 8192 tokens is still to come
            compiled(*(torch.randn(1, 8, short, 64) for _ in range(3)))
        q, k, v = (torch.randn(1, 8, tokens, 64) for _ in range(3))
        extra = peak_extra(lambda: compiled(q, k, v)) - q.numel() * 4
    return {"what": name, "extra MiB": extra / 2**20, "T x T MiB": tokens * tokens * 4 / 2**20, "share": extra / (tokens * tokens * 4)}


FIRST_CALL = """
import time, torch, cpu
model, tokens = cpu.llama()
with torch.no_grad():
    model(tokens)
    start = time.perf_counter()
    (torch.compile(model, backend={backend!r}) if {backend!r} != "eager" else model)(tokens)
    print("seconds", time.perf_counter() - start)
"""


def run_python(code: str, environment) -> str:
    """What Python code prints that is run in a process of its own, from this folder."""
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout


def case_compile() -> dict:
    """First call in a fresh process: cold caches and warm ones; eager's first call is there to subtract."""
    rows = []
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TILEWELD_CACHE_DIR": f"{caches}/tileweld", "TRITON_CACHE_DIR": f"{caches}/triton"}
        for state in ("cold", "warm"):
            for backend in ("eager", "tileweld", "inductor"):
                out = run_python(FIRST_CALL.format(backend=backend), environment)
                rows.append({"contender": backend, "cache": state, "first call s": float(out.split("seconds")[1])})
    show("first call of the Llama case in a fresh process", rows, ["contender", "cache", "first call s"])
    return {"rows": rows}


CASES = {"llama_eager": case_llama_eager, "window_softcap": case_window_softcap, "memory": case_memory, "compile": case_compile, **fusion.CASES, **training.CASES}


def main(cases: list[str] = typer.Argument(None, help=f"some of: {', '.join(CASES)}"), rounds_file: bool = typer.Option(True, "--store/--no-store", help="write benchmarks/results/cpu.json")) -> None:
    """Run the cases, print their tables, store their figures."""
    run_cases(CASES, cases, "cpu.json", rounds_file)


if __name__ == "__main__":
    typer.run(main)
