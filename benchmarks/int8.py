"""int8 of whole models: `python benchmarks/int8.py [CASE ...]`; without a case, all of them.

Contenders run interleaved in one process: eager, TorchInductor and tileweld in float32, tileweld's int8 schemes, torchao's through Inductor, ONNX
Runtime's quantize_dynamic and llama.cpp's Q8_0 where they are installed (`pip install torchao onnxruntime onnx onnxscript llama-cpp-python gguf`).
Every contender's error is against float32 eager on the same inputs. Results go to benchmarks/results/int8.json.
"""
from __future__ import annotations

import copy
import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fusion
import torch
import typer
from cpu import llama
from fusion import logits
from harness import interleaved, relative_error, run_cases, show

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch._dynamo.config.recompile_limit = 64  # one limit for all contenders of a model: past it, they would silently be eager

COLUMNS = ["contender", "median_ms", "min_ms", "max_ms", "float/it", "it/ours", "error", "first call s"]


def tileweld(model, scheme: str | dict | None = None, **options):
    return torch.compile(model, backend="tileweld", options=options | ({"int8": scheme} if scheme else {}))


def torchao(model, config: str):
    """A copy of the model that torchao has quantised, through Inductor; None where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    import torchao.quantization as ao

    copied = copy.deepcopy(model)
    ao.quantize_(copied, getattr(ao, config)())
    return torch.compile(copied, backend="inductor")


def contest(title: str, calls: dict[str, Callable[[], torch.Tensor] | None], ours: str, floats: tuple[str, ...], rounds: int) -> dict:
    """Time the calls that there are; error against the first; ratios to the best of ``floats``, and to ``ours``."""
    calls, first, errors = {name: call for name, call in calls.items() if call is not None}, {}, {}
    with torch.no_grad():
        expected = None
        for name, call in calls.items():
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
            start = time.perf_counter()
            result = call()
            first[name] = time.perf_counter() - start
            expected = result.clone() if expected is None else expected
            errors[name] = relative_error(result, expected) if isinstance(result, torch.Tensor) and result.shape == expected.shape else float("nan")
        print(file=sys.stderr)
        times = interleaved(calls, rounds, warmup=2)
    best = min(times[name]["median_ms"] for name in floats)
    rows = [{"contender": name, **t, "float/it": best / t["median_ms"], "it/ours": t["median_ms"] / times[ours]["median_ms"], "error": errors[name], "first call s": first[name]} for name, t in times.items()]
    show(title, rows, COLUMNS)
    return {"rows": rows}


def llama_cpp(config: dict, length: int) -> Callable | None:
    """One token at position ``length`` through llama.cpp on a random model of these sizes in Q8_0; None where it is not installed.

    The file is written here: same layers, same sizes, so the same bytes are read. Its numbers are its own: the figure is a time.
    """
    if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")):
        return None
    import gguf
    import numpy as np
    from llama_cpp import llama_cpp as c

    path = Path(tempfile.mkdtemp()) / "model.gguf"
    hidden, heads, kv = config["hidden"], config["heads"], config["kv_heads"]
    width = hidden // heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["layers"])
    writer.add_feed_forward_length(config["intermediate"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config["vocab"])
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)

    def put(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5 if len(shape) == 2 else np.ones(shape, np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind) if len(shape) == 2 else values, raw_dtype=kind if len(shape) == 2 else None)

    put("token_embd.weight", config["vocab"], hidden)
    put("output.weight", config["vocab"], hidden)
    put("output_norm.weight", hidden)
    for k in range(config["layers"]):
        for name, *shape in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q", hidden, hidden), ("attn_k", kv * width, hidden), ("attn_v", kv * width, hidden), ("attn_output", hidden, hidden),
                             ("ffn_gate", config["intermediate"], hidden), ("ffn_up", config["intermediate"], hidden), ("ffn_down", hidden, config["intermediate"])):
            put(f"blk.{k}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    c.llama_backend_init()
    log = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(log, None)
    loaded = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 1024, 1024, torch.get_num_threads(), torch.get_num_threads()
    context = c.llama_init_from_model(loaded, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {path}")

    def evaluate(tokens, start: int) -> None:
        batch = c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for k, token in enumerate(tokens):
            batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.logits[k] = token, start + k, 1, k == len(tokens) - 1
            batch.seq_id[k][0] = 0
        if c.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        c.llama_batch_free(batch)

    evaluate([int(t) for t in random.integers(0, config["vocab"], length)], 0)
    memory = c.llama_get_memory(context)

    def call(keep=(log, loaded)):
        c.llama_memory_seq_rm(memory, 0, length, -1)
        evaluate([5], length)

    return call


def onnx_dynamic(model, tokens) -> tuple[Callable | None, Callable | None]:
    """(float32, quantize_dynamic) of ONNX Runtime on the exported model; None where it is not installed or the export fails."""
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnx", "onnxscript")):
        return None, None
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    folder = Path(tempfile.mkdtemp())
    torch.onnx.export(Logits(), (tokens,), folder / "model.onnx", dynamo=True, opset_version=18, verbose=False)
    quantize_dynamic(folder / "model.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def runner(name):
        session = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: tokens.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return runner("model.onnx"), runner("int8.onnx")


DECODE = dict(vocab=8192, hidden=1024, layers=6, heads=16, kv_heads=4, intermediate=2816)


def case_decode() -> dict:
    """One token, 1024 wide, 6 layers, 16/4 heads, cache 1024, weight_only: <= 1.7x the int8 floor, >= 3.5x Inductor's float32, >= 7x torchao's int8 weight-only, not slower than llama.cpp's Q8_0."""
    from tileweld.models import llama_gqa

    model = llama_gqa.build(**DECODE)
    cache = model.new_cache(1, 1024)
    with torch.no_grad():
        model(torch.randint(0, DECODE["vocab"], (1, 700)), cache, torch.arange(700))
    token, position = torch.tensor([[5]]), torch.tensor([700])
    halves = [tuple(x.half() for x in layer) for layer in cache]  # llama.cpp's default for keys and values
    forwards = {"eager": model, "inductor": torch.compile(model, backend="inductor"), "tileweld": tileweld(model), "tileweld weight_only": tileweld(model, "weight_only"), "tileweld dynamic": tileweld(model, "dynamic"),
                "torchao weight-only": torchao(model, "Int8WeightOnlyConfig"), "torchao dynamic": torchao(model, "Int8DynamicActivationInt8WeightConfig")}
    calls = {name: (lambda forward=forward: forward(token, cache, position)) for name, forward in forwards.items() if forward is not None}
    calls["tileweld weight_only, float16 KV"] = lambda: forwards["tileweld weight_only"](token, halves, position)
    unguarded = tileweld(model, "weight_only", guard_filter_fn=torch.compiler.skip_all_guards_unsafe)  # who knows that model and shapes stay as they are, as llama.cpp does, may tell torch
    calls["tileweld weight_only, float16 KV, no guards"] = lambda: unguarded(token, halves, position)
    weights = [torch.randint(-127, 127, p.shape, dtype=torch.int8) for p in model.parameters() if p.dim() == 2 and p is not model.embed_tokens.weight]
    bytes_read = sum(w.numel() for w in weights)
    words = [w.view(torch.int64) for w in weights]
    calls |= {"llama.cpp Q8_0, float16 KV": llama_cpp(DECODE, 700), "read every int8 weight": lambda: [w.amax() for w in words] and None, "read as many bytes of float32": lambda: [w.view(torch.float32).sum() for w in weights] and None}
    result = contest("decode in int8: 1024 wide, 6 layers, 16/4 heads, cache 1024", calls, "tileweld weight_only", ("eager", "inductor"), 31)
    by = {row["contender"]: row["median_ms"] for row in result["rows"]}
    floor = min(by.pop("read every int8 weight"), by.pop("read as many bytes of float32"))
    print(f"floor: {bytes_read / 1e6:.1f} MB of weights in {floor:.2f} ms; tileweld weight_only takes {by['tileweld weight_only'] / floor:.2f}x of it")
    return {**result, "floor_ms": floor, "weight_bytes": bytes_read}


def case_prefill() -> dict:
    """Llama 768 wide, 4 layers, 1024 tokens. dynamic: >= 2.2x the better of eager and Inductor in float32, >= 1.5x torchao's dynamic and ONNX Runtime's; llm_int8: >= 1.5x float32. torchao and ONNX Runtime quantise the projection to the vocabulary too, which is 11 % of the work: "int8 head" does as well."""
    model, tokens = llama("sdpa")
    forwards = {"eager": model, "inductor": torch.compile(model, backend="inductor"), "tileweld": tileweld(model), "tileweld dynamic": tileweld(model, "dynamic"), "tileweld llm_int8": tileweld(model, "llm_int8"),
                "tileweld dynamic, int8 head": tileweld(model, {"scheme": "dynamic", "lm_head": True}), "tileweld weight_only": tileweld(model, "weight_only"), "torchao dynamic": torchao(model, "Int8DynamicActivationInt8WeightConfig")}
    calls = {name: (lambda forward=forward: logits(forward(tokens))) for name, forward in forwards.items() if forward is not None}
    calls["onnxruntime"], calls["onnxruntime quantize_dynamic"] = onnx_dynamic(model, tokens)
    return contest("prefill in int8: Llama 768 wide, 4 layers, 1024 tokens", calls, "tileweld dynamic, int8 head", ("eager", "inductor"), 9)


def with_outliers(model, share: float = 0.01, factor: float = 30.0) -> int:
    """Give norms' results columns that are `factor` times the others, and the layers that read them weights as much smaller: floats compute what they did. In place; returns the columns of each."""
    for layer in model.model.layers:
        for norm, readers in ((layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)), (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj))):
            columns = torch.randperm(norm.weight.numel())[:max(1, int(share * norm.weight.numel()))]
            norm.weight[columns] *= factor
            for reader in readers:
                reader.weight[:, columns] /= factor
    return len(columns)


def case_outliers() -> dict:
    """The same prefill with 1 % of the columns behind norms 30 times the others, as large models have them: llm_int8 >= 1.5x float32, with outliers to find and to multiply as floats. Their errors are what llm_int8 is for."""
    model, tokens = llama("sdpa")
    with torch.no_grad():
        columns = with_outliers(model)
    forwards = {"eager": model, "inductor": torch.compile(model, backend="inductor"), "tileweld dynamic": tileweld(model, "dynamic"), "tileweld llm_int8": tileweld(model, "llm_int8")}
    result = contest(f"prefill in int8, {columns} outlier columns of 768 behind every norm", {name: (lambda forward=forward: logits(forward(tokens))) for name, forward in forwards.items()}, "tileweld llm_int8", ("eager", "inductor"), 9)
    return {**result, "columns": columns}


def case_smollm2_decode() -> dict:
    """SmolLM2-135M, real weights: a loop of 32 greedy tokens behind 512, static cache, weight_only: >= 2.5x eager."""
    model = fusion.smollm2()
    cache, rewind = fusion.prefilled(model)

    def loop(forward):
        def call():
            rewind()  # every loop writes the same slots
            token = torch.tensor([[1000]])
            for _ in range(32):
                result = forward(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                token = result[:, -1].argmax(-1, keepdim=True)
            return result

        return call

    forwards = {"eager": model, "inductor": torch.compile(model, backend="inductor"), "tileweld": tileweld(model), "tileweld weight_only": tileweld(model, "weight_only")}
    return contest("SmolLM2-135M, 32 greedy tokens behind 512", {name: loop(forward) for name, forward in forwards.items()}, "tileweld weight_only", ("eager",), 5)


def resident(how: str, path: str) -> dict:
    """MiB that a model of the decode case needs, run once: "float32", packed here ("weight_only"; "linear layers" alone, its table stays float), or packed earlier and loaded from ``path`` ("loaded"). For a process of its own.

    resident: once it was compiled and called; peak: from packed to then, compiling included; peak of packing: before, the float model included.
    """
    from tileweld.models import llama_gqa

    def now(key: str = "VmRSS") -> float:
        gc.collect()
        return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    import tileweld as _tileweld
    from tileweld import convert

    token, quantise = torch.tensor([[5]]), how != "float32"
    small = llama_gqa.build(**DECODE | dict(layers=1, vocab=64))  # whatever a first call loads
    if quantise:
        convert.quantize_(small, "weight_only")
    with torch.no_grad():
        torch.compile(small, backend="tileweld")(token)
    torch._dynamo.reset()
    del small
    before = now()
    with torch.device("meta" if how == "loaded" else "cpu"):
        model = llama_gqa.build(**DECODE)
    if how in ("weight_only", "linear layers"):
        convert.quantize_(model, "weight_only", embedding=None if how == "weight_only" else False)
    elif how == "loaded":
        convert.load_quantized(model, path)
    peak = now("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with torch.no_grad():
        torch.compile(model, backend="tileweld")(token)
    parameters = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 2**20
    row = {"what": how, "resident MiB": now() - before, "peak MiB": now("VmHWM") - before, "peak of packing MiB": max(0.0, peak - before), "tensors MiB": parameters, "version": _tileweld.__version__}
    if how == "weight_only":  # for the next row; behind the measurement, since float32 saves nothing either: safetensors and its library's pages are 1.2 MiB
        convert.save_quantized(model, path)
    return row


def case_memory() -> dict:
    """Memory of the decode model packed to weight_only, peak and resident, in processes that compile it themselves and in others that find its executable on disk: <= 0.35x float32's in the same state."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for executable in ("compiled here", "on disk"):
            for how in ("float32", "weight_only", "linear layers", "loaded"):
                environment = os.environ | {"TILEWELD_CACHE_DIR": f"{folder}/{how.replace(' ', '-')}"}
                out = subprocess.run([sys.executable, "-c", f"import json, int8; print('row', json.dumps(int8.resident({how!r}, {folder + '/model.safetensors'!r})))"], cwd=Path(__file__).parent, capture_output=True, text=True, env=environment)
                if out.returncode:
                    raise RuntimeError(out.stderr[-2000:])
                row = json.loads(out.stdout.rsplit("row ", 1)[1])
                floats = row if how == "float32" else floats
                rows.append({"what": how, "executable": executable, **row, "share": row["resident MiB"] / floats["resident MiB"], "share of peak": row["peak MiB"] / floats["peak MiB"]})
    show("memory of the decode model, run once", rows, ["what", "executable", "resident MiB", "share", "peak MiB", "share of peak", "peak of packing MiB", "tensors MiB"])
    return {"rows": rows}


CASES = {"decode": case_decode, "prefill": case_prefill, "outliers": case_outliers, "smollm2_decode": case_smollm2_decode, "memory": case_memory}


def main(cases: list[str] = typer.Argument(None, help=f"some of: {', '.join(CASES)}"), rounds_file: bool = typer.Option(True, "--store/--no-store", help="write benchmarks/results/int8.json")) -> None:
    """Run the cases, print their tables, store their figures."""
    run_cases(CASES, cases, "int8.json", rounds_file)


if __name__ == "__main__":
    typer.run(main)
