"""Benchmarks of passes that change which matrices exist: `python benchmarks/algebra.py [CASE ...]`; without a case, all of them.

A case is a row of CASES: a builder of contenders (name -> call), and what to reach. Every case holds the contenders' results against each other first, then times them interleaved in
one process; ratios of medians are what counts. Results go to benchmarks/results/algebra.json.
"""
from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gqa
import mla
import torch
import typer
from harness import interleaved, machine, relative_error, show, store

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Case:
    """build() -> {contender: call that returns a tensor}; the first is the one that the others are compared with. targets: contender -> how many times as fast "tileweld" is to be."""

    what: str
    build: Callable[[], dict[str, Callable[[], torch.Tensor]]]
    targets: dict[str, float]
    rounds: int = 15
    tolerance: float = 1e-3


class _Step(torch.nn.Module):
    """One decode step over a cache of static size: what a serving loop compiles. The position is a tensor, so that no step compiles anew."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, token, position):
        return self.model(input_ids=token, past_key_values=self.cache, cache_position=position, position_ids=position[None], use_cache=True).logits


def _lora() -> dict[str, Callable[[], torch.Tensor]]:
    """A Llama of 4 layers, 768 wide, 12 heads over 4 KV heads, intermediate 2048, vocabulary 4096, with peft's adapters of rank 16 on all linears of the layers: one token over 512 cached."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=768, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=2048)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=32, target_modules=names, init_lora_weights=False), model).eval()
    token, position = torch.zeros((1, 1), dtype=torch.long), torch.tensor([512])

    def contender(backend, **options):
        step = _Step(model, StaticCache(config=config, max_cache_len=1024))
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 512), dtype=torch.long), past_key_values=step.cache, cache_position=torch.arange(512))
        run = step if backend is None else torch.compile(step, backend=backend, dynamic=False, **({"options": options} if options else {}))

        def call():
            with torch.no_grad():
                return run(token, position)
        return call

    return {"eager": contender(None), "tileweld": contender("tileweld"), "tileweld, adapters apart": contender("tileweld", passes={"lora": False}), "inductor": contender("inductor")}


def _watching() -> dict[str, Callable[[], torch.Tensor]]:
    """What watching costs: a hundred kept weights of 512 x 512, of which nothing is computed at a call, looked at together as a graph does and one by one, against the same without watching."""
    from tileweld.compiler.folded import Folded
    from tileweld.compiler.kept_together import KeptTogether
    from torch.fx import Graph

    graph = Graph()
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("w"), 2.0)))
    weights = [torch.nn.Parameter(torch.randn(512, 512), requires_grad=False) for _ in range(100)]
    folds = [Folded(graph, f"w{k}", ["w"], [((512, 512), (512, 1))], 1 << 20) for k in range(100)]

    def call():
        for _ in range(10):
            for fold, w in zip(folds, weights):
                made = fold(w)
        return made

    def nothing():
        for _ in range(10):
            for made, w in zip(known, weights):
                pass
        return made

    def at_once():
        for _ in range(10):
            made = together(*weights)
        return made[-1]

    known, together = [fold(w) for fold, w in zip(folds, weights)], KeptTogether([(fold, (k,)) for k, fold in enumerate(folds)])
    return {"nothing": nothing, "tileweld": at_once, "each alone": call}


CASES = {
    "lora": Case("LoRA-merged decode, one token over 512 cached", _lora, {"eager": 1.15}),
    "gqa_decode": Case("the attention op of a decode step, 16 -> 4 KV heads of 64, 4096 cached (33.6 -> 8.4 MB of keys and values)", gqa.attention, {"tileweld" + gqa.OLD: 1.5}),
    "gqa_decode_block": Case("the whole block of that step, 1024 wide", gqa.block, {}),
    "mla_decode": Case("MLA's attention block, one query over 2048 cached latents of 512 + 64, 16 heads", mla.block, {"eager": 20, "inductor": 15}, rounds=9),
    "mla_decode_layer": Case("a whole MLA layer, 2048 wide, one token over 2047 cached", mla.decode, {}, rounds=9),
    "mla_prefill": Case("the same layer, 512 tokens without a prefix", mla.prefill, {"eager": 1.0}, rounds=7),
    "watching": Case("1000 watched weights", _watching, {}),
}


def main(names: list[str] = typer.Argument(None), rounds: int = 0) -> None:
    """Run the named cases (all of them without a name) and store what was measured."""
    for name in names or CASES:
        case = CASES[name]
        torch._dynamo.reset()
        contenders = case.build()
        results = {who: call() for who, call in contenders.items()}
        first = next(iter(results.values()))
        errors = {who: relative_error(x, first) for who, x in results.items()}
        if wrong := {who: e for who, e in errors.items() if e > case.tolerance}:
            raise SystemExit(f"{name}: results differ: {wrong}")
        times = interleaved(contenders, rounds or case.rounds, warmup=2)
        ratios = {who: t["median_ms"] / times["tileweld"]["median_ms"] for who, t in times.items()}
        rows = [{"contender": who, "median ms": t["median_ms"], "times tileweld": ratios[who], "target": case.targets.get(who, ""), "error": errors[who]} for who, t in times.items()]
        show(f"{name}: {case.what}", rows, ["contender", "median ms", "times tileweld", "target", "error"])
        store("algebra.json", {name: {"what": case.what, "machine": machine(), "times": times, "ratios": ratios, "targets": case.targets, "errors": errors}})


if __name__ == "__main__":
    typer.run(main)
