"""How many kernels and library calls one decoder layer costs: the number that fusion is about, held."""
import functools

import pytest
import torch
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from tileweld.models import gemma2, llama_gqa


def calls(build, *inputs) -> tuple[int, int]:
    """(kernels and library calls beside attention, attention kernels) of a model's inference graph."""
    torch._dynamo.reset()
    report = Report()
    with torch.no_grad():
        torch.compile(build, backend=functools.partial(tileweld, report=report), dynamic=False)(*inputs)
    assert not report.warnings and len(report.graphs) == 1
    attention = sum(k.op == "attention" for k in report.kernels)
    assert all(k.implementation.startswith("cpp:") for k in report.kernels)
    return len(report.kernels) - attention + sum(report.fallbacks.values()), attention


def of_a_layer(module, *inputs, step: int = 1, **config) -> tuple[float, float]:
    """The difference that more layers make, a layer."""
    few, many = (calls(module.build(layers=n, **config), *inputs) for n in (2, 2 + 2 * step))
    return tuple((b - a) / (2 * step) for a, b in zip(few, many))


@pytest.mark.parametrize("length", [1, 40])
def test_a_llama_layer_is_four_calls_and_attention(length):
    """norm + q, k, v + rotary; attention; projection + residual; norm + gate, up + activation; down + residual. The bound was seven."""
    assert of_a_layer(llama_gqa, torch.randint(0, 256, (1, length))) == (4, 1)


def test_a_gemma2_layer():
    """As Llama's, and its two norms behind the matmuls, each with the residual addition."""
    others, attention = of_a_layer(gemma2, torch.randint(0, 256, (1, 40)))
    assert attention == 1 and others <= 7


def test_a_decoding_step_writes_its_cache_in_place():
    """With a static KV cache: two more calls a layer, which write one position each."""
    def step(layers):
        model = llama_gqa.build(layers=layers)
        return calls(model, torch.tensor([[3]]), model.new_cache(1, 64), torch.tensor([5]))

    few, many = step(2), step(4)
    assert many[1] - few[1] == 2 and (many[0] - few[0]) / 2 <= 7
