"""Autocast as casts in the graph: the same ops see the same dtypes as eager's, products are fused, and errors against float64 are at most twice eager's."""
import copy

import pytest
import tileweld
import torch
import torch.nn.functional as F
from tileweld import models
from tileweld.compiler.autocast import make_casts_explicit
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

HALF = (torch.bfloat16, torch.float16)


def near(eager, ours, exact, factor=2.0):
    """Mean errors against float64: at most `factor` times eager's, or two roundings of a bfloat16 where eager happens to be exact."""
    assert ours.dtype == eager.dtype
    scale = exact.abs().mean().item()
    assert (ours.double() - exact).abs().mean().item() <= factor * (eager.double() - exact).abs().mean().item() + 1e-4 * scale


def compiled(f, **options):
    torch._dynamo.reset()
    return torch.compile(f, backend="tileweld", fullgraph=True, options=options)


def tiny(name):
    if name == "llama":
        found = models.load("llama_gqa")
        return found.build().eval(), found.example_inputs(batch=2, length=16)
    pytest.importorskip("transformers", reason="an extra")
    from tileweld.compiler.tiny import tiny_model

    torch.manual_seed(0)
    return tiny_model(name), (torch.randint(3, 128, (2, 16)),)


def tensor(result):
    return result if isinstance(result, torch.Tensor) else result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inference_around_the_model(name, dtype):
    model, inputs = tiny(name)
    exact = tensor(copy.deepcopy(model).double()(*inputs)).detach()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        report = tileweld.explain(model, *inputs)
        eager, ours = tensor(model(*inputs)), tensor(compiled(model)(*inputs))
    near(eager, ours, exact)
    assert {r.rewrite for r in report.refusals} <= {"layer_norm_linear"}  # a stream of float32 before matmuls of halves: the cast is part of the norm's region
    assert report.counts["attention"] == 2
    assert report.counts["gated_mlp" if name == "llama" else "linear_epilogue"] >= 2 and report.counts["qkv_rotary"] == 2
    assert not {"mm", "addmm", "bmm"} & set(report.fallbacks)


@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_training(name, around):
    model, inputs = tiny(name)
    weights = torch.randn(tensor(model(*inputs)).shape)

    def forward(model, run, dtype=torch.bfloat16, enabled=True):
        def inside(*inputs):
            with torch.autocast("cpu", dtype, enabled=enabled):
                return run(*inputs)

        model.zero_grad()
        if around:
            with torch.autocast("cpu", dtype, enabled=enabled):
                out = tensor(run(*inputs))
        else:
            out = tensor((inside if run is model else compiled(inside))(*inputs))
        (out.double() * weights).sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    double, other = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact, eager = forward(double, double, enabled=False), forward(model, model)
    ours = forward(other, compiled(other) if around else copy.copy(other).forward)
    assert len(eager) == len(ours)
    total = [0.0, 0.0]
    for a, b, c in zip(eager, ours, exact, strict=True):
        assert a.dtype == b.dtype
        scale = c.abs().mean().item() + 1e-6
        total[0] += (a.double() - c).abs().mean().item() / scale
        total[1] += (b.double() - c).abs().mean().item() / scale
    assert total[1] <= 2 * total[0]


def test_backward_inside_autocast_is_not_cast_again():
    """The backward runs while autocast is on: its float32 matmuls (attention's) stay float32, as they were traced."""
    x = torch.randn(2, 2, 9, 8, requires_grad=True)

    def f(x):
        with torch.autocast("cpu", enabled=False):
            return torch.softmax(x @ x.mT * 0.3, -1) @ x

    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = torch.autograd.grad(compiled(f)(x).square().sum(), x)
    (exact,) = torch.autograd.grad(f(x.double()).square().sum(), x)
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-4)


def test_the_backward_of_regions_and_products_is_of_autocast_dtypes():
    m, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        report = tileweld.explain(m, x)
    assert report.counts["linear_epilogue"] == 1 and report.counts["linear"] == 1 and {r.rewrite for r in report.refusals} <= {"layer_norm_linear"}


def casts(f, *inputs, dtype=torch.bfloat16):
    """(was it made explicit, ops with the dtypes of their arguments) of a function captured under autocast."""
    with torch.autocast("cpu", dtype):
        gm = make_fx(f, tracing_mode="fake", pre_dispatch=True)(*inputs)
        made = make_casts_explicit(gm.graph)
    return made, [(str(n.target), *(str(a.meta["val"].dtype).removeprefix("torch.") for a in n.all_input_nodes)) for n in gm.graph.nodes if n.op == "call_function"]


X, W = torch.randn(4, 8), torch.randn(8, 8)
SAME = {
    "linear": lambda x, w: F.linear(x, w), "matmul": lambda x, w: x @ w, "a norm is not cast": lambda x, w: F.layer_norm(x, (8,), w[0]), "softmax": lambda x, w: torch.softmax(x @ w, -1) @ w,
    "mixed": lambda x, w: torch.cat([x @ w, x]), "float32 only": lambda x, w: F.mse_loss(x @ w, x), "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w), "a cast of one's own": lambda x, w: (x @ w).float() + x,
    "off inside": lambda x, w: off(x, w), "sdpa": lambda x, w: F.scaled_dot_product_attention(x[None, None], w[None, None], w[None, None]), "integers": lambda x, w: (x > 0).long() @ (w > 0).long(),
    "float64 stays": lambda x, w: x.double() @ w.double(), "in place": lambda x, w: (x @ w).add_(1) @ w, "addmm": lambda x, w: torch.addmm(x[0], x, w), "a product of many": lambda x, w: (x @ w).float().prod(-1),
}


def off(x, w):
    with torch.autocast("cpu", enabled=False):
        y = x @ w
    return y @ w


@pytest.mark.parametrize("name", SAME)
def test_results_and_dtypes_are_eagers(name):
    with torch.autocast("cpu", torch.bfloat16):
        expected = SAME[name](X, W)
        got = compiled(SAME[name])(X, W)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_casts_are_ops():
    made, ops = casts(lambda x, w: F.linear(x, w).float() @ w, X, W)
    assert made and ops == [("aten.to.dtype", "float32")] * 2 + [("aten.linear.default", "bfloat16", "bfloat16"), ("aten.to.dtype", "bfloat16")] + [("aten.to.dtype", "float32")] * 2 + [("aten.matmul.default", "bfloat16", "bfloat16")]


def test_what_is_already_of_the_dtype_is_not_cast():
    made, ops = casts(lambda x, w: F.linear(x, w), X.bfloat16(), W.bfloat16())
    assert made and ops == [("aten.linear.default", "bfloat16", "bfloat16")]


def test_ops_that_autocast_leaves_alone_are_not_touched():
    made, ops = casts(lambda x, w: F.gelu(x * w[:4]) + x.sum(), X, W)
    assert made and not [op for op in ops if op[0] == "aten.to.dtype"]


def test_a_function_with_a_body_of_its_own_stays_under_autocast(recwarn):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x @ x

        @staticmethod
        def backward(ctx, g):
            return g

    x = torch.randn(8, 8, requires_grad=True)
    w = torch.randn(8, 8)

    def f(x, w):
        return F.linear(Square.apply(x), w)

    with torch.autocast("cpu", torch.bfloat16):
        report = tileweld.explain(f, x, w)
        expected, got = f(x, w), compiled(f)(x, w)
    assert [r.reason for r in report.refusals if "autocast" in r.reason] and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-1)
