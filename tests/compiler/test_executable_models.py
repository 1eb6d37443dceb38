"""The executable in whole models: results outlive later calls, memory is planned, symbolic lengths, training keeps what it saved."""
import functools
import linecache

import pytest
import torch
from tileweld import models
from tileweld.compiler import assemble
from tileweld.compiler.backend import tileweld


@pytest.fixture
def executables(monkeypatch):
    """The functions that are made."""
    made, load = [], assemble.load

    def kept(text):
        made.append(load(text))
        return made[-1]

    monkeypatch.setattr(assemble, "load", kept)
    torch._dynamo.reset()
    return made


def test_results_outlive_the_next_call_and_the_arena_is_as_small_as_can_be(executables):
    module = models.load("llama_gqa")
    model, inputs = module.build(), module.example_inputs()
    f = torch.compile(model, backend="tileweld", dynamic=False)
    with torch.no_grad():
        first = f(*inputs)
        copy = first.clone()
        second = f(*(x.flip(-1) for x in inputs))
        torch.testing.assert_close(first, copy, rtol=0, atol=0)
        torch.testing.assert_close(second, model(*(x.flip(-1) for x in inputs)), rtol=1e-5, atol=1e-5)
    (run,) = executables
    assert run.text.arena == run.text.naive == run.workspaces.bytes > 0


def test_symbolic_lengths_share_one_executable(executables):
    module = models.load("llama_gqa")
    model = module.build()
    f = torch.compile(model, backend="tileweld", dynamic=True)
    with torch.no_grad():
        for length in (7, 19, 5, 33, 19):
            tokens = torch.randint(1, 200, (2, length))
            torch.testing.assert_close(f(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert len(executables) == 1


def test_two_forwards_before_their_backwards(executables):
    """What the first forward saved is not in memory that the second one writes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16), torch.nn.Sigmoid())
    f = torch.compile(model, backend=functools.partial(tileweld, options=None), dynamic=False)
    inputs = [torch.randn(8, 16, requires_grad=True) for _ in range(3)]
    outs = [f(x) for x in inputs]
    grads = [torch.autograd.grad(o.square().sum(), [x, *model.parameters()]) for o, x in reversed(list(zip(outs, inputs)))]
    for got, x in zip(grads, reversed(inputs)):
        torch.testing.assert_close(got, torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]), rtol=1e-5, atol=1e-6)
    assert len(executables) == 2


def test_a_traceback_finds_the_lines_of_an_executable(executables):
    """Its text is kept whole, and split when somebody looks: no line of it is there before."""
    torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), backend="tileweld", dynamic=False)(torch.randn(2, 4))
    run = executables[0]
    file = run.__code__.co_filename
    assert len(linecache.cache[file]) == 1  # a lazy entry
    assert linecache.getlines(file) == run.text.source.splitlines(keepends=True) and linecache.getline(file, run.__code__.co_firstlineno).startswith("def graph(")
