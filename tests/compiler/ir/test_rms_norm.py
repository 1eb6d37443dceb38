"""The op's definition against the papers' formula, its fake and gradient, and a symbolic eps."""
import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.ir import rms_norm as ir

OP = torch.ops.tileweld.rms_norm


def llama(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gemma(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())).to(x.dtype)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_to_the_two_orders_of_casting(x_dtype, w_dtype):
    x, w = torch.randn(3, 5, 96).to(x_dtype), torch.randn(96).to(w_dtype)
    for expected, actual in [(llama(x, w, 1e-5), OP(x, w, 1e-5, 0.0, "before")), (gemma(x, w, 1e-6), OP(x, w, 1e-6, 1.0, "after"))]:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_default_eps_is_that_of_aten(dtype):
    x = torch.full((2, 64), 1e-4, dtype=dtype)
    assert torch.equal(OP(x, None, ir.default_eps(dtype), 0.0, "after"), F.rms_norm(x, (64,)))


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 8), (5,), (0, 4), (2, 1)])
@pytest.mark.parametrize("with_weight", [True, False])
def test_opcheck_and_gradcheck(shape, with_weight):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if with_weight else None
    for offset, cast in [(0.0, "before"), (1.0, "after")]:
        torch.library.opcheck(OP, (x, w, 1e-3, offset, cast))
    if x.numel():
        inputs = (x, w) if with_weight else (x,)
        assert torch.autograd.gradcheck(lambda x, w=None: OP(x, w, 1e-3, 1.0, "after"), inputs)


def test_half_gradients_have_the_inputs_dtypes():
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    w = torch.randn(16).requires_grad_()
    OP(x, w, 1e-5, 0.0, "before").sum().backward()
    expected = torch.autograd.grad(llama(x, w, 1e-5).sum(), (x, w))
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(x.grad, expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(w.grad, expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("x", "weight", "cast", "message"), [
    (torch.tensor(1.0), None, "after", "no dims"),
    (torch.ones(2, 4, dtype=torch.int64), None, "after", "float dtype"),
    (torch.ones(2, 4), torch.ones(3), "after", r"weight \[3\]"),
    (torch.ones(2, 4), torch.ones(1, 4), "after", "2 dims"),
    (torch.ones(2, 4), None, "later", "later"),
])
def test_a_wrong_call_says_what_was_expected(x, weight, cast, message):
    with pytest.raises(RuntimeError, match=message):
        torch.compile(lambda: OP(x, weight, 1e-5, 0.0, cast), backend="eager", fullgraph=True)()


def test_a_symbolic_eps_is_guarded_not_frozen():
    compiled = torch.compile(lambda x, eps: OP(x, None, eps, 0.0, "after"), backend="aot_eager", dynamic=True)
    x = torch.randn(3, 8)
    for eps in (1e-5, 0.5, 2.0):
        torch.testing.assert_close(compiled(x, eps), ir.reference(x, None, eps, 0.0, "after"))


@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_gradient_is_laid_out_as_its_fake_says(layouts):
    """Heads before positions in one of grad and x and behind them in the other: who views dx relies on x's strides."""
    grad, x = (torch.randn(2, 3, 5, 8) if plain else torch.randn(2, 5, 3, 8).transpose(1, 2) for plain in layouts)
    torch.library.opcheck(torch.ops.tileweld.rms_norm_backward, (grad, x, torch.randn(8), 1e-6, 0.0))
    assert torch.ops.tileweld.rms_norm_backward(grad, x, torch.randn(8), 1e-6, 0.0)[0].stride() == x.stride()
