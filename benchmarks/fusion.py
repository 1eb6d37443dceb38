"""Cases of whole models for cpu.py: prefill, decode, SmolLM2, ten architectures, memory; eager, Inductor and tileweld in one process."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import interleaved, peak_extra, relative_error, show

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

FREEZING = "inductor, freezing"
ARCHITECTURES = {  # hidden 512, 4 layers, 8 heads; what else their configurations need
    "llama": dict(num_key_value_heads=4), "qwen3": dict(num_key_value_heads=4, head_dim=64), "gemma2": dict(num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=128), "phi3": dict(num_key_value_heads=4),
    "gpt2": dict(n_embd=512, n_layer=4, n_head=8), "gpt_neox": {}, "opt": dict(ffn_dim=1376, word_embed_proj_dim=512), "bert": {}, "bloom": dict(n_layer=4, n_head=8), "t5": dict(d_model=512, d_kv=64, d_ff=1376, num_layers=4, num_heads=8, decoder_start_token_id=0),
}


def logits(output) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output


def contest(title: str, model, call, names=("eager", "inductor", "tileweld"), rounds: int = 9) -> dict:
    """Time ``call(forward)`` for every contender's forward; error against eager, first call, medians, and the best of the others over tileweld."""
    forwards = {"eager": model, "inductor": torch.compile(model, backend="inductor"), FREEZING: torch.compile(model, backend="inductor", options={"freezing": True}), "tileweld": torch.compile(model, backend="tileweld")}
    first, errors = {}, {}
    with torch.no_grad():
        expected = logits(call(model)).clone()
        for name in names:
            start = time.perf_counter()
            result = logits(call(forwards[name]))
            first[name] = time.perf_counter() - start
            errors[name] = relative_error(result, expected)
        times = interleaved({name: (lambda forward=forwards[name]: call(forward)) for name in names}, rounds, warmup=2)
    ours = times["tileweld"]["median_ms"]
    rows = [{"contender": name, **t, "it/tileweld": t["median_ms"] / ours, "error": errors[name], "first call s": first[name]} for name, t in times.items()]
    best = min(t["median_ms"] for name, t in times.items() if name != "tileweld")
    show(title, rows, ["contender", "median_ms", "min_ms", "max_ms", "it/tileweld", "error", "first call s"])
    return {"rows": rows, "best other/tileweld": best / ours}


def case_prefill() -> dict:
    """Llama 768 wide, 4 layers, 1024 tokens, sdpa: >= 1.05x the best of eager, Inductor, Inductor with freezing."""
    from cpu import llama

    model, tokens = llama("sdpa")
    return contest("prefill: Llama 768 wide, 4 layers, 1024 tokens, sdpa", model, lambda forward: forward(tokens), ("eager", "inductor", FREEZING, "tileweld"))


def case_decode() -> dict:
    """One token, static KV cache of 1024, 1024 wide, 6 layers, 16/4 heads, 76 M parameters: >= 1.4x the better of eager and Inductor."""
    from tileweld.models import llama_gqa

    model = llama_gqa.build(vocab=8192, hidden=1024, layers=6, heads=16, kv_heads=4, intermediate=2816)
    cache = model.new_cache(1, 1024)
    with torch.no_grad():
        model(torch.randint(0, 8192, (1, 700)), cache, torch.arange(700))
    token, position = torch.tensor([[5]]), torch.tensor([700])
    result = contest("decode: 1024 wide, 6 layers, 16/4 heads, cache 1024", model, lambda forward: forward(token, cache, position), rounds=31)
    weights = [p for p in model.parameters() if p.dim() == 2 and p is not model.embed_tokens.weight]
    floor = interleaved({"read every weight once": lambda: [w.sum() for w in weights]}, 15)["read every weight once"]["median_ms"]
    print(f"floor, every weight read once: {floor:.1f} ms; tileweld takes {result['rows'][-1]['median_ms'] / floor:.2f}x of it")
    return {**result, "floor_ms": floor}


def smollm2():
    from demo import load

    return load("sdpa")[0]


def case_smollm2_prefill() -> dict:
    """SmolLM2-135M, real weights, 512 tokens, all logits: >= 1.15x the better of eager and Inductor."""
    tokens = torch.randint(0, 49152, (1, 512), generator=torch.Generator().manual_seed(0))
    return contest("SmolLM2-135M, prefill 512", smollm2(), lambda forward: forward(input_ids=tokens, use_cache=False), rounds=5)


def prefilled(model) -> tuple[object, Callable[[], None]]:
    """(a static cache of 1024 that holds 512 random tokens, what makes it forget all that came after them)."""
    from transformers import StaticCache

    c = model.config
    cache = StaticCache(config=c, max_cache_len=1024)
    cache.early_initialization(batch_size=1, num_heads=c.num_key_value_heads, head_dim=c.head_dim, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model(input_ids=torch.randint(0, 49152, (1, 512), generator=torch.Generator().manual_seed(0)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    lengths = [(layer, layer.cumulative_length.clone()) for layer in cache.layers if hasattr(layer, "cumulative_length")]

    def rewind() -> None:
        for layer, length in lengths:
            layer.cumulative_length.copy_(length)

    return cache, rewind


def case_smollm2_decode() -> dict:
    """SmolLM2-135M, one token, static cache of 1024 filled to 512: >= 1.35x the better of eager and Inductor."""
    model = smollm2()
    token, (cache, rewind) = torch.tensor([[1000]]), prefilled(model)

    def call(forward):
        rewind()  # every call writes the same slot
        return forward(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return contest("SmolLM2-135M, decode, cache 1024", model, call, rounds=15)


def build(name: str):
    """One of ARCHITECTURES with random weights, and its inputs: 2 x 128 tokens."""
    import transformers

    config = dict(vocab_size=8192, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1376, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2) | ARCHITECTURES[name]
    config = transformers.CONFIG_MAPPING[name](**config)
    config.use_cache = False
    torch.manual_seed(0)
    family = transformers.T5ForConditionalGeneration if name == "t5" else transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model = family._from_config(config) if name == "t5" else family.from_config(config)
    inputs = {"input_ids": torch.randint(3, 8192, (2, 128))}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model.eval(), inputs


def architecture(name: str, rounds: int = 9) -> dict:
    """One row of case_architectures, for a process of its own."""
    model, inputs = build(name)
    result = contest(name, model, lambda forward: forward(**inputs), rounds=rounds)
    by = {row["contender"]: row for row in result["rows"]}
    return {"what": name, **{f"{n} ms": by[n]["median_ms"] for n in by}, "best/tileweld": result["best other/tileweld"], "error": by["tileweld"]["error"],
            "compile tileweld s": by["tileweld"]["first call s"], "compile inductor s": by["inductor"]["first call s"], "compile ratio": by["tileweld"]["first call s"] / by["inductor"]["first call s"]}


def in_process(code: str, **environment) -> dict:
    """The dict that Python code prints behind the word row, from a process of its own in this folder."""
    out = subprocess.run([sys.executable, "-c", f"import json, fusion; print('row', json.dumps({code}))"], env={**os.environ, **environment}, cwd=Path(__file__).parent, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{code}: {out.stderr[-2000:]}")
    return json.loads(out.stdout.rsplit("row ", 1)[1])


def case_architectures() -> dict:
    """Ten Hugging Face architectures, hidden 512, 4 layers, 2 x 128 tokens, cold caches: none below 0.95x the better of eager and Inductor; cold compile <= 1/3 of Inductor's."""
    rows = []
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as caches:
            rows.append(in_process(f"fusion.architecture({name!r})", TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor", TILEWELD_CACHE_DIR=f"{caches}/tileweld"))
        print(f"{len(rows)} of {len(ARCHITECTURES)}: {name}, best of the others {rows[-1]['best/tileweld']:.2f}x tileweld's time", file=sys.stderr, flush=True)
    show("ten architectures, hidden 512, 4 layers, 2 x 128 tokens", rows, list(rows[0]))
    return {"rows": rows}


def prefill_memory(backend: str) -> dict:
    """One row of case_prefill_memory: the second call's peak beyond the model, its inputs and what earlier calls keep."""
    from cpu import llama

    model, tokens = llama("sdpa")
    forward = model if backend == "eager" else torch.compile(model, backend=backend)
    with torch.no_grad():
        forward(tokens)
        extra = peak_extra(lambda: forward(tokens)) + kept()
    return {"contender": backend, "extra MiB": extra / 2**20}


def kept() -> int:
    """Bytes of tileweld's arenas, which live between calls: resident before the call, and yet memory of the call."""
    import gc

    from tileweld.runtime.workspace import Workspaces

    return sum(x.bytes for x in gc.get_objects() if type(x) is Workspaces)  # isinstance would ask weak proxies of the dead


def case_prefill_memory() -> dict:
    """Peak memory of a prefill beyond what lives between calls: <= Inductor's."""
    rows = [in_process(f"fusion.prefill_memory({b!r})") for b in ("eager", "inductor", "tileweld")]
    show("peak memory of prefill, Llama 768 wide, 1024 tokens", rows, ["contender", "extra MiB"])
    return {"rows": rows}


CASES = {"prefill": case_prefill, "decode": case_decode, "smollm2_prefill": case_smollm2_prefill, "smollm2_decode": case_smollm2_decode, "architectures": case_architectures, "prefill_memory": case_prefill_memory}
