"""GPU attention forward against SDPA (cuDNN and flash), FlexAttention and Inductor, fused matrix products against Inductor's max-autotune,
norms against the bandwidth of a copy, and int8 products against cuBLAS: `python benchmarks/gpu.py [--name h200] [--only attention|linear|norms|int8]`.

Every case checks numerics first: the error against float64 must not exceed twice that of the fused library kernel (or of eager
where no library has the variant). Times are medians of triton.testing.do_bench, which empties the L2 cache between runs; the matrix products
are timed in CUDA graphs, because a launch costs more than a row, on weights of 100 MB and more, which no L2 cache holds.
Results go to benchmarks/results/NAME.json with date, device and versions. Without a GPU the file says so and every figure is null.
"""
from __future__ import annotations

import itertools
import math

import torch
import typer
from harness import machine, show, store
from torch.nn.attention import SDPBackend, sdpa_kernel

CONTENDERS = ("tileweld", "cudnn", "flash", "flex", "inductor")
VARIANTS = ("full", "causal", "window", "softcap", "alibi")
WINDOW, CAP = 1024, 30.0


def slopes(heads: int, device) -> torch.Tensor:
    """ALiBi's slopes 2^(-8 (h + 1) / H), [H]."""
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)


def eager(variant: str, group: int):
    """The variant spelled out, [B, H, T, D] and K, V of H / group heads: what tileweld and Inductor compile."""
    def attention(q, k, v):
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(q.shape[-1]))
        i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)[None, :]
        if variant == "softcap":
            s = CAP * torch.tanh(s / CAP)
        if variant == "alibi":
            s = s + slopes(q.shape[1], q.device)[:, None, None] * (j - i)
        if variant != "full":
            s = s.masked_fill(j > i, float("-inf"))
        if variant == "window":
            s = s.masked_fill(i - j >= WINDOW, float("-inf"))
        return torch.softmax(s.float(), -1).to(q.dtype) @ v

    return attention


def flex(variant: str, heads: int, tokens: int):
    """FlexAttention with its block mask, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slope = slopes(heads, "cuda")
    score = {"softcap": lambda s, b, h, i, j: CAP * torch.tanh(s / CAP), "alibi": lambda s, b, h, i, j: s + slope[h] * (j - i)}.get(variant)
    mask = {"full": None, "window": lambda b, h, i, j: (j <= i) & (i - j < WINDOW)}.get(variant, lambda b, h, i, j: j <= i)
    block_mask = create_block_mask(mask, None, None, tokens, tokens, device="cuda") if mask is not None else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def library(backend: SDPBackend, variant: str):
    """SDPA on one backend; only full and causal exist there."""
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=variant == "causal", enable_gqa=q.shape[1] != k.shape[1])

    return attention if variant in ("full", "causal") else None


def flops(variant: str, batch: int, heads: int, tokens: int, width: int) -> float:
    """Useful floating-point operations: 4 D for every visible pair of positions."""
    pairs = {"full": tokens * tokens, "window": sum(min(i + 1, WINDOW) for i in range(tokens))}.get(variant, tokens * (tokens + 1) // 2)
    return 4.0 * batch * heads * width * pairs


def measure(variant: str, width: int, tokens: int, heads: int, kv_heads: int) -> dict:
    """One row: milliseconds and TFLOP/s of every contender, errors against float64."""
    from triton.testing import do_bench

    batch = max(1, 16384 // tokens)
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, n, tokens, width, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    spelled = eager(variant, heads // kv_heads)
    torch._dynamo.reset()
    calls = {
        "tileweld": torch.compile(spelled, backend="tileweld", dynamic=False),
        "cudnn": library(SDPBackend.CUDNN_ATTENTION, variant),
        "flash": library(SDPBackend.FLASH_ATTENTION, variant),
        "flex": flex(variant, heads, tokens),
        "inductor": torch.compile(spelled, dynamic=False) if batch * heads * tokens * tokens * 6 < 60e9 else None,  # its scores must fit
    }
    rows = min(tokens, 512)  # float64 reference on the last rows of one batch, which see the most keys
    reference = float64_rows(variant, q, k, v, rows)
    row = {"variant": variant, "head dim": width, "tokens": tokens, "heads": f"{heads}/{kv_heads}", "batch": batch}
    for name, call in calls.items():
        if call is None:
            continue
        try:
            out = call(q, k, v)[:1, :, -rows:].double()
            row[f"{name} error"] = ((out - reference).norm() / reference.norm()).item()
            row[f"{name} ms"] = do_bench(lambda: call(q, k, v), return_mode="median")
            row[f"{name} TF"] = flops(variant, batch, heads, tokens, width) / row[f"{name} ms"] / 1e9
        except Exception as error:  # a contender that cannot run the case is reported, not hidden
            row[f"{name} failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    peers = [row[f"{n} error"] for n in ("cudnn", "flash", "flex") if f"{n} error" in row]
    row["numerics"] = "ok" if "tileweld error" in row and row["tileweld error"] <= 2 * max(peers, default=5e-3) else "WRONG"
    return row


def float64_rows(variant, q, k, v, rows):
    """The last rows of the first batch in float64."""
    q, k, v = q[:1, :, -rows:].double(), k[:1].double(), v[:1].double()
    group, tokens = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    i, j = torch.arange(tokens - rows, tokens, device=q.device)[:, None], torch.arange(tokens, device=q.device)[None, :]
    if variant == "softcap":
        s = CAP * torch.tanh(s / CAP)
    if variant == "alibi":
        s = s + slopes(q.shape[1], q.device).double()[:, None, None] * (j - i)
    if variant != "full":
        s = s.masked_fill(j > i, float("-inf"))
    if variant == "window":
        s = s.masked_fill(i - j >= WINDOW, float("-inf"))
    return s.softmax(-1) @ v


LINEAR_CONTENDERS = ("tileweld", "inductor", "eager")
LINEAR_ROWS = (1, 16, 32, 2048)
WIDTH, QKV_WIDTH, HIDDEN = 4096, 12288, 14336  # a Llama of 8 billion parameters, all heads with keys of their own


def norm_linear(x, scale, weight):
    """RMSNorm and one projection, [rows, WIDTH] to [rows, QKV_WIDTH]."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    return torch.nn.functional.linear(normed * scale, weight)


def gated_mlp(x, gate, up):
    """The first half of a gated MLP, [rows, WIDTH] to [rows, HIDDEN]."""
    return torch.nn.functional.silu(torch.nn.functional.linear(x, gate)) * torch.nn.functional.linear(x, up)


LINEARS = {"norm + linear": (norm_linear, [(WIDTH,), (QKV_WIDTH, WIDTH)]), "gated MLP": (gated_mlp, [(HIDDEN, WIDTH), (HIDDEN, WIDTH)])}


def measure_linear(case: str, rows: int) -> dict:
    """One row: milliseconds, TB/s of weights and TFLOP/s of every contender, errors against the same function of float64 inputs."""
    from triton.testing import do_bench_cudagraph

    spelled, shapes = LINEARS[case]
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    weights = [(torch.randn(shape, device="cuda") / WIDTH ** (0.5 * (len(shape) - 1))).bfloat16() for shape in shapes]
    elements = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    torch._dynamo.reset()
    calls = {
        "tileweld": torch.compile(spelled, backend="tileweld", dynamic=False),
        "inductor": torch.compile(spelled, mode="max-autotune-no-cudagraphs", dynamic=False),
        "eager": spelled,
    }
    reference = spelled(x[:32].double(), *[w.double() for w in weights])
    row = {"case": case, "rows": rows}
    for name, call in calls.items():
        try:
            with torch.no_grad():
                out = call(x, *weights)[:32].double()  # also tunes, which a graph's capture cannot
                row[f"{name} error"] = ((out - reference).norm() / reference.norm()).item()
                row[f"{name} ms"] = do_bench_cudagraph(lambda: call(x, *weights), return_mode="median")
            row[f"{name} TB/s"] = 2 * elements / row[f"{name} ms"] / 1e9
            row[f"{name} TF"] = 2 * elements * rows / row[f"{name} ms"] / 1e9
        except Exception as error:  # a contender that cannot run the case is reported, not hidden
            row[f"{name} failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    row["numerics"] = "ok" if "tileweld error" in row and row["tileweld error"] <= 2 * row.get("eager error", 5e-3) else "WRONG"
    if "tileweld ms" in row and "inductor ms" in row:
        row["against inductor"] = row["inductor ms"] / row["tileweld ms"]
    return row


NORM_CONTENDERS = ("copy", "tileweld", "inductor", "eager")
NORM_WIDTHS = (128, 1024, 4096, 8192, 16384, 32768, 65536)
NORM_ELEMENTS = 1 << 27  # 256 MB a tensor: no L2 cache holds it


def plain_norm(x, residual, scale):
    """RMSNorm, [rows, width]; ``residual`` is not read."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * scale


def added_norm(x, residual, scale):
    """The sum with the residual stream, and its RMSNorm."""
    y = x + residual
    return y, plain_norm(y, residual, scale)


NORMS = {"rms_norm": (plain_norm, 2), "add_rms_norm": (added_norm, 4)}  # tensors of [rows, width] read and written


def measure_norm(case: str, width: int) -> dict:
    """One row: GB/s of every contender by the bytes that must move, a copy of the same bytes among them; errors against float64."""
    from triton.testing import do_bench

    spelled, tensors = NORMS[case]
    torch.manual_seed(0)
    rows = NORM_ELEMENTS // width
    x, residual = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scale = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(x)
    torch._dynamo.reset()
    calls = {"copy": lambda *_: target.copy_(x), "tileweld": torch.compile(spelled, backend="tileweld", dynamic=False), "inductor": torch.compile(spelled, dynamic=False), "eager": spelled}
    as_list = lambda made: list(made) if isinstance(made, tuple) else [made]  # noqa: E731
    reference = as_list(spelled(x[:32].double(), residual[:32].double(), scale.double()))
    row = {"case": case, "width": width, "rows": rows}
    for name, call in calls.items():
        try:
            with torch.no_grad():
                if name != "copy":
                    row[f"{name} error"] = max(((a[:32].double() - e).norm() / e.norm()).item() for a, e in zip(as_list(call(x, residual, scale)), reference))
                milliseconds = do_bench(lambda: call(x, residual, scale), return_mode="median")
            row[f"{name} GB/s"] = (2 if name == "copy" else tensors) * NORM_ELEMENTS * 2 / milliseconds / 1e6
        except Exception as error:  # a contender that cannot run the case is reported, not hidden
            row[f"{name} failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    row["numerics"] = "ok" if "tileweld error" in row and row["tileweld error"] <= 2 * row.get("eager error", 5e-3) else "WRONG"
    if "tileweld GB/s" in row and "copy GB/s" in row:
        row["of a copy"] = row["tileweld GB/s"] / row["copy GB/s"]
    return row


#: scheme -> (activation of tileweld::int8_linear, dtype of x and of what cuBLAS multiplies, rows)
INT8 = {"weight_only": ("float", torch.bfloat16, (1, 2, 4, 8, 16, 64, 1024, 4096)), "dynamic": ("int8", torch.bfloat16, (16, 256, 2048, 8192)), "llm_int8": ("mixed", torch.float16, (16, 2048, 8192))}
INT8_WIDTH = 28672  # gate and up together: 117 MB of int8, more than an L2 cache holds
OUTLIERS, THRESHOLD = 6, 6.0  # columns of x that are 20 times as large, as few of a model's are


def measure_int8(scheme: str, rows: int) -> dict:
    """One row: [rows, WIDTH] to [rows, INT8_WIDTH] by the generated kernels, activations quantised by them, and by cuBLAS in x's dtype.

    The error is that against the definition, whose integers are exact; "against float" says how far int8 is from the float product.
    """
    from triton.testing import do_bench_cudagraph

    from tileweld.codegen.triton.int8_linear import emit
    from tileweld.compiler.ir.int8_linear import quantized, reference
    from tileweld.compiler.ir.linear import Spec
    from tileweld.runtime.source_module import load_python_source

    activation, dtype, _ = INT8[scheme]
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH, device="cuda", dtype=dtype)
    if activation == "mixed":
        x[:, torch.randperm(WIDTH, device="cuda")[:OUTLIERS]] *= 20
        x = torch.where(x.abs() < THRESHOLD, x, x.sign() * x.abs().clamp(min=THRESHOLD))
    weight = (torch.randn(INT8_WIDTH, WIDTH, device="cuda") / WIDTH**0.5).to(dtype)
    q, scale = quantized(weight)
    kernel = emit(Spec(), x_dtype=dtype, activation=activation, groups=[1], k=WIDTH, widths=[INT8_WIDTH])
    launch, out = load_python_source(kernel.name, kernel.source).linear, x.new_empty(rows, INT8_WIDTH)
    calls = {"tileweld": lambda: launch([out, x, q, scale], [], [0.0, THRESHOLD]), "cublas": lambda: torch.nn.functional.linear(x, weight)}
    row = {"scheme": scheme, "rows": rows}
    for name, call in calls.items():
        try:
            with torch.no_grad():
                call()  # also tunes, which a graph's capture cannot
                row[f"{name} ms"] = do_bench_cudagraph(call, return_mode="median")
            row[f"{name} TB/s"] = weight.numel() * (1 if name == "tileweld" else 2) / row[f"{name} ms"] / 1e9
            row[f"{name} TF"] = 2 * weight.numel() * rows / row[f"{name} ms"] / 1e9
        except Exception as error:  # a contender that cannot run the case is reported, not hidden
            row[f"{name} failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    if "tileweld ms" in row:
        launch([out, x, q, scale], [], [0.0, THRESHOLD])
        some = min(rows, 32)
        exact = x[:some].double() @ weight.double().T
        # the outlier columns are those of all rows: they are given to the definition, which sees some
        columns = ((x.float().abs() >= THRESHOLD) & x.isfinite()).any(0) if activation == "mixed" else None
        expected, = reference(x[:some].float(), [q], [scale], [], [], 0.0, Spec(), activation, THRESHOLD, columns)
        row["tileweld error"] = ((out[:some].double() - expected.double()).norm() / expected.double().norm()).item()
        row["against float"] = ((out[:some].double() - exact).norm() / exact.norm()).item()
        row["numerics"] = "ok" if row["tileweld error"] <= (4e-3 if dtype == torch.bfloat16 else 1e-3) else "WRONG"
    if "tileweld ms" in row and "cublas ms" in row:
        row["against cublas"] = row["cublas ms"] / row["tileweld ms"]
    return row


def cases(quick: bool):
    tokens = (1024, 4096) if quick else (1024, 2048, 4096, 8192, 16384)
    for width, variant, n in itertools.product((64, 128), VARIANTS, tokens):
        yield variant, width, n, 16, 16
    for n in tokens:
        yield "causal", 128, n, 32, 8


def main(name: str = "h200", quick: bool = typer.Option(False, help="two lengths a variant"), only: str = typer.Option("", help="attention, linear, norms or int8; all without it")) -> None:
    """Measure every case and store benchmarks/results/NAME.json."""
    described = machine()
    sections = {
        "attention_forward": ("attention", measure, list(cases(quick)), ["variant", "head dim", "tokens", "heads", "numerics", *[f"{c} TF" for c in CONTENDERS]],
                              lambda variant, width, n, heads, kv: {"variant": variant, "head dim": width, "tokens": n, "heads": f"{heads}/{kv}", **{f"{c} ms": None for c in CONTENDERS}}),
        "fused_linear": ("linear", measure_linear, list(itertools.product(LINEARS, LINEAR_ROWS)), ["case", "rows", "numerics", *[f"{c} ms" for c in LINEAR_CONTENDERS], "tileweld TB/s", "tileweld TF", "against inductor"],
                         lambda case, rows: {"case": case, "rows": rows, **{f"{c} ms": None for c in LINEAR_CONTENDERS}}),
        "norms": ("norms", measure_norm, list(itertools.product(NORMS, NORM_WIDTHS)), ["case", "width", "numerics", *[f"{c} GB/s" for c in NORM_CONTENDERS], "of a copy"],
                  lambda case, width: {"case": case, "width": width, **{f"{c} GB/s": None for c in NORM_CONTENDERS}}),
        "int8_linear": ("int8", measure_int8, [(scheme, rows) for scheme, (*_, all_rows) in INT8.items() for rows in all_rows], ["scheme", "rows", "numerics", "tileweld ms", "cublas ms", "tileweld TB/s", "tileweld TF", "against float", "against cublas"],
                        lambda scheme, rows: {"scheme": scheme, "rows": rows, "tileweld ms": None, "cublas ms": None}),
    }
    for section, (word, measured, chosen, columns, empty) in sections.items():
        if only not in ("", word):
            continue
        if not torch.cuda.is_available():
            path = store(f"{name}.json", {section: {"measured": False, "note": "no GPU was at hand when this file was written: nothing here has been measured", "date": described["date"], "rows": [empty(*case) for case in chosen]}})
            typer.echo(f"no GPU on this machine: {path} says so and its columns stay empty ({section})")
            continue
        import triton

        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "date": described["date"]}
        rows = []
        for case in chosen:
            rows.append(measured(*case))
            store(f"{name}.json", {section: {"measured": True, **device, "rows": rows}})  # after every case: a cut run keeps what it has
        show(f"{section.replace('_', ' ')}, bf16, {device['device']}", rows, columns)


if __name__ == "__main__":
    typer.run(main)
