"""Hugging Face architectures in training: the gradients of all parameters equal eager's, with left padding, whose rows see no key."""
import importlib.util
from pathlib import Path

import pytest
import torch
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("test_architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


def step(run, model, x):
    model.zero_grad()
    out = architectures.output(run(**x))
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).sin()).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}  # AOT gives zeros where eager gives None


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_gradients_of_all_parameters(name):
    """fp32, 1e-5 of the parameter's largest gradient; against 1e-2 of the largest of all, so 1e-7 of that, where it is zero but for rounding (a key's bias)."""
    model, report = architectures.build(name, "eager"), Report()
    run = torch.compile(model, backend=lambda gm, x: tileweld(gm, x, options={"target": "reference"}, report=report), fullgraph=True)
    torch.manual_seed(1)
    x = architectures.inputs(name, 20)
    eager, ours = step(model, model, x), step(run, model, x)
    assert report.counts["attention"] == architectures.CORES.get(name, 1)
    largest = max(g.abs().max().item() for g in eager.values())
    wrong = {n: (ours[n] - g).abs().max().item() / g.abs().max().item() for n, g in eager.items() if not (ours[n] - g).abs().max() <= 1e-5 * max(g.abs().max().item(), 1e-2 * largest)}
    assert not wrong


@pytest.mark.parametrize("name", ["t5", "gpt_oss"])
def test_attention_backward_kernels(name):
    """The generated kernels, a learned bias and learned sinks among what has a gradient; fp32, bounds as above."""
    model, report = architectures.build(name, "eager"), Report()
    run = torch.compile(model, backend=lambda gm, x: tileweld(gm, x, report=report), fullgraph=True)
    torch.manual_seed(1)
    x = architectures.inputs(name, 20)
    eager, ours = step(model, model, x), step(run, model, x)
    largest = max(g.abs().max().item() for g in eager.values())
    wrong = {n: (ours[n] - g).abs().max().item() for n, g in eager.items() if not (ours[n] - g).abs().max() <= 1e-5 * max(g.abs().max().item(), 1e-2 * largest)}
    assert not wrong
    runs = [k.implementation for k in report.kernels if k.op == "attention_backward"]
    assert runs and all(r.startswith("cpp:") for r in runs)
