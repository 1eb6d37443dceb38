"""torch.compile(model, backend="tileweld"): the entry point, training, dynamic shapes, and what happens with bad input."""
import functools

import pytest
import torch
from tileweld import models
from tileweld.compiler.backend import tileweld
from tileweld.compiler.errors import OptionError
from tileweld.compiler.report import Report
from torch._dynamo.exc import BackendCompilerFailed


def compiled(model, report=None, dynamic=None, fullgraph=False, **options):
    """model compiled with tileweld, its doings in report."""
    return torch.compile(model, backend=functools.partial(tileweld, options=options or None, report=report), dynamic=dynamic, fullgraph=fullgraph)


def attention(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return torch.tanh(scores / 5).mul(5).softmax(-1) @ v


def qkv(batch=2, heads=2, rows=9, keys=11, width=16, dtype=torch.float32):
    return torch.randn(batch, heads, rows, width, dtype=dtype), torch.randn(batch, heads, keys, width, dtype=dtype), torch.randn(batch, heads, keys, width, dtype=dtype)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(b.abs().max().item(), 1e-30) if b.numel() else 0)


def test_registered_by_entry_point():
    assert "tileweld" in torch._dynamo.list_backends(exclude_tags=())
    q, k, v = qkv()
    close(torch.compile(attention, backend="tileweld")(q, k, v), attention(q, k, v))


def test_options_reach_the_backend():
    q, k, v = qkv()
    close(torch.compile(attention, backend="tileweld", options={"target": "reference", "verify": True})(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("name", ["llama_gqa", "t5_bias", "gpt_oss_sinks"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_training_equals_eager(name, dynamic):
    """Gradients of every parameter, in fullgraph mode; a parameter's error is measured against the largest gradient of the model."""
    module = models.load(name)
    model, inputs, report = module.build().train(), module.example_inputs(), Report()

    def step(f):
        model.zero_grad()
        out = f(*inputs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, expected_grads = step(model)
    got, grads = step(compiled(model, report, dynamic, fullgraph=True))
    assert report.counts["attention"] > 0 and not report.refusals
    close(got, expected)
    assert grads.keys() == expected_grads.keys()
    top = max(g.abs().max() for g in expected_grads.values())
    for n in grads:
        assert (grads[n] - expected_grads[n]).abs().max() <= 1e-5 * top, n


def test_dynamic_shapes_compile_once():
    report = Report()
    f = compiled(attention, report, dynamic=True)
    for rows, keys in ((9, 11), (5, 30), (17, 4)):
        q, k, v = qkv(rows=rows, keys=keys)
        close(f(q, k, v), attention(q, k, v))
    assert len(report.graphs) == 1


@pytest.mark.parametrize("options, told", [({"traget": "cpp"}, "target"), ({"target": "cuda"}, "reference"), ({"passes": {"attntion": False}}, "attention"), ({"verify": 1}, "True | False"), ({"strict": "yes"}, "True | False")])
def test_unknown_option_lists_what_exists(options, told):
    with pytest.raises(BackendCompilerFailed, match="OptionError") as error:
        torch.compile(attention, backend="tileweld", options=options)(*qkv())
    assert told in str(error.value)
    with pytest.raises(OptionError):
        tileweld(None, [], options=options)


def test_a_pass_can_be_turned_off():
    report = Report()
    q, k, v = qkv()
    close(compiled(attention, report, passes={"attention": False})(q, k, v), attention(q, k, v))
    assert not report.counts


def test_float64_runs_on_the_definition():
    report = Report()
    q, k, v = qkv(dtype=torch.float64)
    close(compiled(attention, report)(q, k, v), attention(q, k, v), 1e-12)
    assert [u.implementation for u in report.kernels] == ["reference"] and "float64" in report.kernels[0].reason


@pytest.mark.parametrize("shape", [dict(rows=0), dict(keys=0), dict(batch=0), dict(rows=1, keys=1, heads=1, batch=1)])
def test_zero_and_one_length(shape):
    q, k, v = qkv(**shape)
    close(compiled(attention)(q, k, v), attention(q, k, v))


def test_strided_and_expanded_inputs():
    q = torch.randn(2, 9, 2, 32)[..., ::2].transpose(1, 2)
    k = torch.randn(1, 1, 11, 16).expand(2, 2, 11, 16)
    v = torch.randn(2, 2, 16, 11).transpose(2, 3)
    close(compiled(attention)(q, k, v), attention(q, k, v))


def test_mask_of_the_wrong_shape_is_eagers_error():
    q, k, v = qkv()
    with pytest.raises(Exception, match="must match the size of tensor|broadcast"):
        compiled(attention)(q, k, v, torch.zeros(9, 12))


def test_inputs_on_different_devices_are_eagers_error():
    q, k, v = qkv()
    with pytest.raises(Exception, match="device"):
        compiled(attention)(q, k.to("meta"), v)


def test_bad_input_leaves_the_model_usable():
    q, k, v = qkv()
    f = compiled(attention)
    with pytest.raises(Exception):
        f(q, k, v, torch.zeros(9, 12))
    close(f(q, k, v), attention(q, k, v))


def test_without_a_compiler_it_warns_and_runs_on_the_definition(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    report = Report()
    q, k, v = qkv()
    close(compiled(attention, report)(q, k, v), attention(q, k, v))
    assert report.kernels[0].implementation == "reference"
    assert report.warnings and "install" in report.warnings[0]


def test_strict_without_a_compiler_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(BackendCompilerFailed, match="CompilerNotFound"):
        compiled(attention, strict=True)(*qkv())


def test_strict_raises_on_a_refusal():
    def leaking(q, k, v):
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights

    with pytest.raises(BackendCompilerFailed, match="RefusalError"):
        compiled(leaking, strict=True)(*qkv())


def test_graph_breaks_are_dynamos_and_counted():
    def broken(q, k, v):
        x = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(x, k, v)

    report = Report()
    q, k, v = qkv()
    close(compiled(broken, report)(q, k, v), broken(q, k, v))
    assert len(report.graphs) == 2 and report.counts["attention"] == 2


def test_interrupted_build_can_be_repeated(monkeypatch):
    """A build cut off by Ctrl-C raises, and the next call builds."""
    from tileweld.compiler import lower

    q, k, v = qkv(width=24)
    real = lower.compile_cpp

    def interrupted(units):
        raise KeyboardInterrupt

    monkeypatch.setattr(lower, "compile_cpp", interrupted)
    f = compiled(attention)
    with pytest.raises(KeyboardInterrupt):
        f(q, k, v)
    monkeypatch.setattr(lower, "compile_cpp", real)
    torch._dynamo.reset()
    close(f(q, k, v), attention(q, k, v))
