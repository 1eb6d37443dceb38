"""Executables from disk: a hit gives what compiling gives, and what is not all in its text is never kept."""
import functools
import json
import logging
import operator
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tileweld.compiler import aot, executable_cache, graph_json, lower
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from tileweld.runtime import cache, launch
from torch._functorch._aot_autograd.schemas import MutationType, OutputType
from torch._guards import TracingContext

KERNEL_FREE = {"target": "reference"}  # nothing to build: quick


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Executables of this test alone; its kernels are built in the folder too."""
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "1")


def entries():
    return sorted(cache.root().glob("*" + executable_cache.SUFFIX))


def compiled(fn, *inputs, dynamic=None, grad=False, fresh=True, **how):
    """(result, report) of fn compiled anew."""
    if fresh:
        torch._dynamo.reset()
        launch.load_library.cache_clear()
    report = Report(detailed=False)
    with torch.set_grad_enabled(grad):
        return torch.compile(fn, backend=functools.partial(tileweld, report=report, **how), dynamic=dynamic)(*inputs), report


def twice(fn, make, hits=1, tolerance=0, **how):
    """The results of compiling and of the executable on disk, which must be there and be equal; and its report."""
    (first, before), (second, after) = (compiled(fn, *make(), **how) for _ in range(2))
    assert not before.restored and before.graphs and len(after.restored) == hits and not after.graphs
    torch.testing.assert_close(second, first, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert after.counts == before.counts and [r.reason for r in after.refusals] == [r.reason for r in before.refusals]
    assert [(k.op, k.implementation, k.reason) for k in after.kernels] == [(k.op, k.implementation, k.reason) for k in before.kernels] and set(after.sources) == set(before.sources)
    assert all(row.graph < 0 for row in (*after.fusions, *after.refusals, *after.kernels))
    return second, after


def attention(q, k, v):
    i = torch.arange(q.shape[2])
    return (q @ k.mT * 0.25).masked_fill(i[None, :] > i[:, None], float("-inf")).softmax(-1) @ v


def qkv():
    torch.manual_seed(1)
    return [torch.randn(1, 2, 9, 16) for _ in range(3)]


def test_a_fused_kernel_comes_back():
    result, report = twice(attention, qkv)
    assert report.counts["attention"] == 1 and report.kernels[0].implementation.startswith("cpp:attention")
    torch.testing.assert_close(result, attention(*qkv()), rtol=1e-5, atol=1e-5)


class Embedded(torch.nn.Module):
    """An embedding (its kernel checks positions), a norm, rotary's constants, a matmul."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.out = torch.nn.Embedding(32, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)

    def forward(self, tokens):
        x = self.norm(self.table(tokens))
        inverse = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
        angle = torch.arange(tokens.shape[1])[:, None].float() * inverse
        return self.out(x * torch.cat([angle, angle], -1).cos())


def test_checks_and_constants_come_back_and_weights_are_those_of_the_call():
    model, tokens = Embedded().eval(), torch.randint(0, 32, (2, 5))
    twice(model, lambda: (tokens,))
    run = torch.compile(model, backend=functools.partial(tileweld, report=(report := Report(detailed=False))))
    with torch.no_grad():
        torch.testing.assert_close(run(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        assert len(report.restored) == 1
        model.out.weight.mul_(2.0)
        model.table.weight.add_(0.5)
        torch.testing.assert_close(run(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        with pytest.raises(IndexError):
            run(torch.full((2, 5), 32))
        torch.testing.assert_close(run(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_a_loss_checks_its_targets():
    def loss(logits, targets):
        return F.cross_entropy(logits.float(), targets)

    logits, targets = torch.randn(6, 11), torch.randint(0, 11, (6,))
    twice(loss, lambda: (logits, targets))
    with pytest.raises(IndexError):
        compiled(loss, logits, torch.full((6,), 11))


def test_updates_of_inputs_reach_them():
    """A KV cache: the graph writes to its inputs, in the graph."""
    def step(keys, new, position):
        keys.index_copy_(1, position, new)
        return (keys * 2).sum(1)

    def make():
        return torch.ones(2, 6, 4), torch.full((2, 1, 4), 3.0), torch.tensor([2])

    twice(step, make)
    inputs = make()
    version = inputs[0]._version
    result, report = compiled(step, *inputs)
    expected = make()
    assert report.restored and torch.equal(result, step(*expected)) and torch.equal(inputs[0], expected[0]) and inputs[0]._version > version


def test_grad_mode_and_inference_mode():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).requires_grad_(False)
    result, _ = twice(model, lambda: (torch.ones(2, 8),), grad=True)
    assert not result.requires_grad
    for _ in range(2):
        with torch.inference_mode():
            torch._dynamo.reset()
            assert torch.compile(model, backend="tileweld")(torch.ones(2, 8)).is_inference()
    assert len(entries()) == 2


def test_two_graphs_of_a_function_are_found_each():
    def f(a):
        b = a.relu() * 2
        torch._dynamo.graph_break()
        return b.sum(-1)

    with pytest.warns(UserWarning, match="graph break"):
        _, report = twice(f, lambda: (torch.ones(2, 8),), hits=2, options=KERNEL_FREE)
    assert len(report.warnings) == 1  # the break is said again, as it was


KEPT = {"an input": lambda a: (a * 2, a), "two views of a result": lambda a: (lambda b: (b[0], b[1]))(a * 2), "a shape that changed before the graph": lambda a: a.unsqueeze_(0) * 2, "the same twice": lambda a: (lambda b: (b, b))(a * 2)}
NOT_KEPT = {"a view of an input": lambda a: (a * 2, a[1:]), "an input that is written to": lambda a: (a.mul_(2), a + 1)}


@pytest.mark.parametrize("name", [*KEPT, *NOT_KEPT])
def test_what_torchs_wrapper_does_is_not_lost(name):
    """AOT's wrapper makes views of inputs again: such a graph is not kept, and stays right. What Dynamo does around a graph it does around a kept one."""
    f = (KEPT | NOT_KEPT)[name]
    for number in range(2):
        given, expected = torch.ones(2, 4), torch.ones(2, 4)
        result, report = compiled(f, given, options=KERNEL_FREE)
        wanted = f(expected)
        torch.testing.assert_close(result, wanted)
        assert torch.equal(given, expected) and bool(report.restored) == (number == 1 and name in KEPT)
        if isinstance(result, tuple):
            assert [r is given for r in result] == [w is expected for w in wanted]
            assert [r.untyped_storage()._cdata == result[0].untyped_storage()._cdata for r in result] == [w.untyped_storage()._cdata == wanted[0].untyped_storage()._cdata for w in wanted]


def changed(found, **fields):
    return types.SimpleNamespace(**vars(found) | fields)


def test_wrapper_does_reads_everything_that_makes_a_wrapper(monkeypatch):
    """TracingContext.try_get, fw_metadata (input_info, output_info, ...), guards_context, ShapeEnv.var_to_range: each by itself is a reason."""
    said, views, writes = {}, "making views of results or inputs", "writing to inputs"

    def backend(gm, example_inputs):
        from tileweld.compiler.capture import capture

        guards = aot.guard_count()
        made = aot.compile_graph(capture(gm, example_inputs), example_inputs, lambda g, is_backward: g.forward)
        said["plain"] = aot.wrapper_does(1, guards)
        said["more inputs"], said["guards"] = aot.wrapper_does(2, guards), aot.wrapper_does(1, guards - 1)
        context, try_get = TracingContext.get(), TracingContext.try_get
        meta, shapes = context.fw_metadata, context.fake_mode.shape_env
        (given,), (result,) = meta.input_info, meta.output_info

        def ask(name, **fields):
            monkeypatch.setattr(TracingContext, "try_get", lambda: changed(context, **fields))
            said[name] = aot.wrapper_does(1, guards)
            monkeypatch.setattr(TracingContext, "try_get", try_get)

        ask("aot guards", guards_context=changed(context.guards_context, aotautograd_guards=[1]))
        ask("symbols", fake_mode=changed(context.fake_mode, shape_env=changed(shapes, var_to_range={1: 2})))
        for name, fields in {"shape": {"mutates_metadata": True}, "storage": {"mutation_inductor_storage_resize": True}, "outside": {"mutation_type": MutationType.MUTATED_OUT_GRAPH}, "inside": {"mutation_type": MutationType.MUTATED_IN_GRAPH}}.items():
            ask(name, fw_metadata=changed(meta, input_info=[changed(given, **fields)]))
        for kind in set(OutputType) - {OutputType.non_alias}:
            ask(kind.name, fw_metadata=changed(meta, output_info=[changed(result, output_type=kind)]))
        ask("gradient", fw_metadata=changed(meta, output_info=[changed(result, requires_grad=True)]))
        ask("number", fw_metadata=changed(meta, output_info=[changed(result, raw_type=int)]))
        for name, fields in {"bases": {"num_intermediate_bases": 1}, "tokens": {"tokens": {1: 2}}, "grad mode": {"grad_enabled_mutation": False}, "random": {"num_graphsafe_rng_states": 1}, "tangents": {"traced_tangents": [1]},
                             "subclass": {"subclass_inp_meta": [object()]}, "subclass result": {"subclass_fw_graph_out_meta": [object()]}, "none": {}}.items():
            ask(name, fw_metadata=changed(meta, **fields))
        return made

    with torch.no_grad():
        torch.compile(lambda a: a * 2, backend=backend)(torch.ones(2, 4))
    effects, subclass = "side effects", "wrapping tensor subclasses"
    assert said == {"plain": "", "inside": "", "none": "", "more inputs": writes, "guards": "guards", "aot guards": "guards", "symbols": "shape symbols", "shape": writes, "storage": writes, "outside": writes,
                    **{kind.name: views for kind in set(OutputType) - {OutputType.non_alias}}, "gradient": views, "number": views, "bases": views, "tokens": effects, "grad mode": effects, "random": effects, "tangents": effects,
                    "subclass": subclass, "subclass result": subclass}
    assert aot.wrapper_does(1, 0) == "nothing is known of it"


NOT_FOUND = {
    "strict": dict(options={"target": "reference", "strict": True}), "a pass": dict(options={"target": "reference", "passes": {"linear": False}}), "mode": dict(options=KERNEL_FREE, mode="max-autotune"),
    "dynamic": dict(options=KERNEL_FREE, dynamic=True), "verify": dict(options={"target": "reference", "verify": True}), "grad mode": dict(options=KERNEL_FREE, grad=True),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_another_way_to_compile_does_not_find_it(name):
    f, a = (lambda a: a.relu() * 2), torch.ones(2, 8)
    twice(f, lambda: (a,), options=KERNEL_FREE)
    assert not compiled(f, a, **NOT_FOUND[name])[1].restored


def test_training_is_never_kept():
    model, a = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)), torch.ones(2, 8)
    for _ in range(2):
        result, report = compiled(model, a, grad=True, options=KERNEL_FREE)
        result.sum().backward()
        assert not report.restored and model[0].weight.grad is not None
    assert not entries()


def test_random_numbers_are_drawn_at_every_call():
    model, a = torch.nn.Dropout(0.5).train(), torch.ones(64)
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            run = torch.compile(model, backend=functools.partial(tileweld, options=KERNEL_FREE))
            assert not torch.equal(run(a), run(a))


def test_explain_and_detailed_reports_always_have_their_graphs():
    for _ in range(2):
        report = Report()
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(attention, backend=functools.partial(tileweld, report=report))(*qkv())
        assert len(report.graphs) == len(report.aot) == 1 and not report.restored
    assert not entries()


def test_it_can_be_turned_off(monkeypatch):
    f, a = (lambda a: a.relu() * 2), torch.ones(2, 8)
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "0")
    assert not compiled(f, a, options=KERNEL_FREE)[1].restored and not entries()
    monkeypatch.delenv("TILEWELD_EXECUTABLES")
    twice(f, lambda: (a,), options=KERNEL_FREE)
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "0")
    assert not compiled(f, a, options=KERNEL_FREE)[1].restored


@pytest.mark.parametrize("damage", ["entry cut", "entry changed", "library changed", "library gone", "manifest gone"])
def test_a_damaged_entry_is_compiled_again(damage):
    twice(attention, qkv)
    (entry,) = entries()
    libraries = [cache.root() / name for name, _ in json.loads(entry.read_bytes())["libraries"]]  # beside what walks runs, of which a graph of one kernel has none
    victim = entry if damage.startswith("entry") else entry.with_suffix(".json") if damage.startswith("manifest") else libraries[0]
    if damage.endswith("gone"):
        victim.unlink()
    else:
        content = victim.read_bytes()
        victim.unlink()
        victim.write_bytes(content[: len(content) // 2] if damage.endswith("cut") else content[:-40] + b"x" + content[-39:])
    result, report = compiled(attention, *qkv())
    assert not report.restored
    torch.testing.assert_close(result, attention(*qkv()), rtol=1e-5, atol=1e-5)
    assert compiled(attention, *qkv())[1].restored  # repaired


def test_a_library_is_found_by_its_hash_not_by_what_an_entry_says_its_path_is():
    twice(attention, qkv)
    (entry,) = entries()
    content = json.loads(entry.read_bytes())
    name, digest = content["libraries"][0]
    for forged in ([f"../{name}", digest], ["/tmp/" + name, digest], [name, "0" * 64], ["x" + name, digest]):
        assert executable_cache._launcher(executable_cache.Kernel(**content["built"][0]), *forged) is None
    assert executable_cache._launcher(executable_cache.Kernel(**content["built"][0]), name, digest) is not None


def test_what_was_decided_on_a_busy_machine_is_used_for_an_hour(monkeypatch):
    f, a = (lambda a: a.relu() * 2), torch.ones(2, 8)
    monkeypatch.setattr("tileweld.compiler.pays._known", {"a kernel": (0.0, 0.0)})
    twice(f, lambda: (a,), options=KERNEL_FREE)
    now = executable_cache.time.time()
    monkeypatch.setattr(executable_cache.time, "time", lambda: now + executable_cache.UNSETTLED_SECONDS + 1)
    monkeypatch.setattr("tileweld.compiler.pays._known", {})
    assert not compiled(f, a, options=KERNEL_FREE)[1].restored
    monkeypatch.setattr(executable_cache.time, "time", lambda: now + 1e9)
    assert compiled(f, a, options=KERNEL_FREE)[1].restored  # it was timed this time


def test_what_degraded_is_not_kept(monkeypatch):
    monkeypatch.setattr(lower, "compile_cpp", lambda units: (_ for _ in ()).throw(lower.CompilerNotFound("no compiler")))
    with pytest.warns(UserWarning, match="no compiler"):
        compiled(attention, *qkv())
    assert not entries()


def test_an_object_without_a_recipe_keeps_all_of_it_from_being_kept(caplog):
    with caplog.at_level(logging.DEBUG, "tileweld.runtime"):
        executable_cache.keep("0" * 64, [lambda arguments: ()], Report(), Report().mark(), "")
        with pytest.raises(executable_cache.NotKept, match="a function"):
            executable_cache._recipe("f", lambda: 0, [], [])
        with pytest.raises(executable_cache.NotKept, match="OpOverload"):
            executable_cache._recipe("f", torch.ops.tileweld.attention.default, [], [])
    assert "no text" in caplog.text and not entries()


def test_folded_weights_are_computed_and_watched_by_the_process_that_has_the_entry():
    w, a, b = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((96, 300), (3, 300), (96, 3)))

    def merged(x, w, a, b):
        return x @ (w + 0.5 * (b @ a)).mT.contiguous()

    x = torch.randn(4, 300)
    (first, before), (second, after) = (compiled(merged, x, w, a, b) for _ in range(2))
    assert len(after.restored) == 1 and after.folded_bytes == before.folded_bytes == 96 * 300 * 4
    assert torch.equal(first, second)
    run = torch.compile(merged, backend="tileweld", dynamic=False)
    torch._dynamo.reset()
    with torch.no_grad():
        run(x, w, a, b)
        a.zero_()
        torch.testing.assert_close(run(x, w, a, b), x @ w.mT)


def test_a_graph_as_rows():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(torch.ops.aten.var_mean.correction, (x, [0]), {"correction": float("inf"), "keepdim": True})
    made = graph.call_function(torch.ops.aten.full.default, ([2, 3], -0.0), {"dtype": torch.float64, "device": torch.device("cpu"), "pin_memory": False})
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (graph.call_function(operator.getitem, (pair, 1)), made)))
    again = graph_json.read(json.loads(json.dumps(graph_json.written(graph))))
    assert [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in again.nodes] == [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes]
    graph.call_function(torch.ops.tileweld.rms_norm.default, (x, None, 1e-6))
    with pytest.raises(executable_cache.NotKept, match="rms_norm"):
        graph_json.written(graph)
    with pytest.raises(ValueError, match="os.system"):
        graph_json.read([["os.system", ["true"], {}]])
    with pytest.raises(ValueError, match="an argument"):
        graph_json.read([["aten.full.default", [[1], {"dtype": "load"}], {}]])


FRESH = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
with torch.no_grad():
    result = torch.compile(model, backend="tileweld")(torch.ones(2, 8))
print(result.sum().item(), *sorted(name for name in sys.modules if name in ("tileweld.passes", "tileweld.codegen", "tileweld.compiler.lower", "tileweld.compiler.aot", "tileweld.runtime.build")))
"""


def test_a_new_process_starts_from_it_and_imports_no_compiler():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TILEWELD_EXECUTABLES": "1"}
    cold, warm = (subprocess.run([sys.executable, "-c", FRESH], env=environment, cwd=Path.home(), capture_output=True, text=True, check=True, timeout=300).stdout.split() for _ in range(2))
    assert cold[0] == warm[0] and "tileweld.passes" in cold and warm[1:] == []
