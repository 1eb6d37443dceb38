"""A residual addition and its norm become one op with both results; the sum keeps eager's rounding."""
import pytest
import torch
import torch.nn.functional as F


def rms(x, w):
    return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def gemma(x, w):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w.float())).type_as(x)


def layer(x, w):
    return F.layer_norm(x, x.shape[-1:], w, w)


NORMS = {"rms": (rms, "add_rms_norm"), "gemma": (gemma, "add_rms_norm"), "layer": (layer, "add_layer_norm")}


def block(norm):
    def fn(x, residual, w):
        for _ in range(3):
            residual = x + residual
            x = torch.sin(norm(residual, w))
        return x, residual

    return fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_both_results_are_eagers(name, dtype, rewriting):
    norm, count = NORMS[name]
    inputs = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 48).to(dtype), torch.randn(48).to(dtype)
    report = rewriting.check(block(norm), *inputs, count={count: 3})
    assert not report.refusals


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_gradients_and_dynamic_shapes(name, rewriting):
    norm, count = NORMS[name]
    inputs = torch.randn(2, 5, 48), torch.randn(2, 5, 48), torch.randn(48)
    rewriting.check_gradients(block(norm), *inputs, count={count: 3}, tolerance=1e-6)  # the spellings cast to float32
    rewriting.check(block(norm), *inputs, count={count: 3}, dynamic=True)


def test_the_sum_is_rounded_before_the_norm(rewriting):
    def fn(x, residual, w):
        s = x + residual
        return rms(s, w), s

    x, residual, w = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16() * 30, torch.randn(256).bfloat16()
    (y, s), report = rewriting.rewritten(fn, x, residual, w)
    expected, total = fn(x, residual, w)
    assert report.counts["add_rms_norm"] == 1 and torch.equal(s, total) and torch.equal(y, expected)


def test_a_weight_computed_in_between(rewriting):
    def fn(x, residual, w):
        s = x + residual
        y = rms(s, torch.tanh(w) * 2)
        return y, s * 2

    rewriting.check(fn, torch.randn(3, 48), torch.randn(3, 48), torch.randn(48), count={"add_rms_norm": 1})


def test_a_weight_computed_from_the_sum_is_refused(rewriting):
    def fn(x, residual, w):
        s = x + residual
        return rms(s, w * s.amax()), s

    rewriting.refused("add_rms_norm", fn, torch.randn(3, 48), torch.randn(3, 48), torch.randn(48), reason="the norm's weight is computed after")


def test_a_norm_without_gradient_stays_without(rewriting):
    def fn(x, residual, w):
        s = x + residual
        with torch.no_grad():
            y = rms(s, w)
        return y, s

    inputs = *(torch.randn(3, 48, requires_grad=True) for _ in range(2)), torch.randn(48, requires_grad=True)
    _, report = rewriting.rewritten(fn, *inputs, grad=True)
    torch._dynamo.reset()
    y, s = torch.compile(fn, backend="tileweld")(*inputs)
    assert report.counts["add_rms_norm"] == 0 and not y.requires_grad and s.requires_grad


@torch.library.custom_op("tests::double_in_place", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


def test_a_weight_that_is_written_in_between_is_refused(rewriting):
    def fn(x, residual, w):
        w = torch.sin(w)
        s = x + residual
        torch.ops.tests.double_in_place(w)
        return rms(s, w), s

    rewriting.refused("add_rms_norm", fn, torch.randn(3, 48), torch.randn(3, 48), torch.randn(48), reason="tests.double_in_place stands between")


def test_norms_that_matmuls_read_are_theirs(rewriting):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = torch.nn.Linear(48, 48, bias=False), torch.nn.Linear(48, 48, bias=False), torch.nn.Parameter(torch.ones(48))

        def forward(self, x, residual):
            s = x + residual
            return s + self.b(torch.sin(self.a(rms(s, self.w))))

    model, inputs = Block(), (torch.randn(4, 48), torch.randn(4, 48))
    rewriting.check(model, *inputs, count={"add_rms_norm": 0, "rms_norm_linear": 1})
    rewriting.check(model, *inputs, count={"add_rms_norm": 1, "rms_norm_linear": 0}, passes_off=("rms_norm_linear",))


@pytest.mark.parametrize("fn", [
    lambda x, r, w: rms(x + r, w),  # the sum is used by the norm alone
    lambda x, r, w: (rms(x + w, w), x + w),  # a bias
    lambda x, r, w: (rms(torch.add(x, r, alpha=2), w), torch.add(x, r, alpha=2)),
    lambda x, r, w: (rms(x * r, w), x * r),
    lambda x, r, w: (F.layer_norm(x + r, x.shape), x + r),
])
def test_what_is_no_residual_norm_is_left(fn, rewriting):
    rewriting.silent("add_rms_norm", fn, torch.randn(3, 48), torch.randn(3, 48), torch.randn(48))
    rewriting.silent("add_layer_norm", fn, torch.randn(3, 48), torch.randn(3, 48), torch.randn(48))
