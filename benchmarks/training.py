"""Cases of training for cpu.py: a step of a model, and attention forward and backward alone; eager, Inductor and tileweld in one process."""
from __future__ import annotations

import time

import torch
from harness import interleaved, peak_extra, relative_error, show

WINDOW = 256


def _by_hand(score, visible):
    """Attention as models write it: score(s, i, j, h) of the scaled product, visible(i, j)."""
    def attention(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        j = torch.arange(k.shape[2])
        i, h = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[1])[:, None, None]
        s = score(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, i, j, h)
        return s.masked_fill(~visible(i, j), float("-inf")).softmax(-1) @ v

    return attention


def causal(q, k, v):
    """torch's own attention, which eager and Inductor have a kernel for."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


ATTENTIONS = {
    "causal, sdpa": causal,
    "causal + softcap": _by_hand(lambda s, i, j, h: 50 * torch.tanh(s / 50), lambda i, j: j <= i),
    f"window {WINDOW}": _by_hand(lambda s, i, j, h: s, lambda i, j: (j <= i) & (i - j < WINDOW)),
    "causal + ALiBi": _by_hand(lambda s, i, j, h: s + torch.exp2(-(h + 1.0)) * (j - i), lambda i, j: j <= i),
}


def _step(forward, leaves, loss):
    """One forward and backward; the gradients as a list."""
    def run():
        for x in leaves:
            x.grad = None
        loss(forward).backward()
        return [x.grad for x in leaves]

    return run


def _contest(title: str, forward, leaves, loss, rounds: int) -> dict:
    """eager, Inductor and tileweld: largest error of a gradient against eager, first step, medians, and the memory that a step takes at its peak beyond what the process holds by then (scores of eager and Inductor; not what an earlier step has kept)."""
    steps, first, errors = {"eager": _step(forward, leaves, loss)}, {}, {}
    expected = [g.clone() for g in steps["eager"]()]
    for backend in ("inductor", "tileweld"):
        torch._dynamo.reset()
        steps[backend] = _step(torch.compile(forward, backend=backend), leaves, loss)
        start = time.perf_counter()
        errors[backend] = max(relative_error(g, e) for g, e in zip(steps[backend](), expected))
        first[backend] = time.perf_counter() - start
    times = interleaved(steps, rounds)
    ours = times["tileweld"]["median_ms"]
    rows = [{"contender": name, **t, "it/tileweld": t["median_ms"] / ours, "error": errors.get(name, 0.0), "first step s": first.get(name, 0.0), "more MiB": peak_extra(steps[name]) / 2**20} for name, t in times.items()]
    show(title, rows, ["contender", "median_ms", "min_ms", "max_ms", "it/tileweld", "error", "first step s", "more MiB"])
    return {"rows": rows}


def case_training() -> dict:
    """A training step of a Llama, 512 wide, 4 layers, 8/4 heads of 64, 512 tokens, float32, with cross entropy; then attention alone, forward and backward, 8 heads of 1024 x 64."""
    from tileweld.models import llama_gqa

    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    model = llama_gqa.build(vocab=4096, hidden=512, layers=4, heads=8, kv_heads=4, intermediate=1376).train()
    tokens = torch.randint(0, 4096, (1, 513))
    loss = lambda forward: torch.nn.functional.cross_entropy(forward(tokens[:, :-1])[0], tokens[0, 1:])  # noqa: E731
    found = {"step": _contest("training step: Llama 512 wide, 4 layers, 8/4 heads, 512 tokens", model, list(model.parameters()), loss, 9)}
    q, k, v, grad = (torch.randn(1, 8, 1024, 64, requires_grad=n < 3) for n in range(4))
    for name, attention in ATTENTIONS.items():
        found[name] = _contest(f"attention forward and backward, 8 heads, 1024 x 64: {name}", attention, [q, k, v], lambda forward: (forward(q, k, v) * grad).sum(), 9)
    return found


CASES = {"training": case_training}
