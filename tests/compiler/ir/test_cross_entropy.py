"""The op's definition against torch's cross entropy in float64, its fake, its gradient, and rows that overflow, are ignored or out of bounds."""
import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.ir.cross_entropy import NOTHING_IGNORED

OP = torch.ops.tileweld.cross_entropy.default


def rows(n=6, classes=11, dtype=torch.float64, grad=False):
    targets = torch.randint(0, classes, (n,))
    targets[1] = -100
    return (torch.randn(n, classes, dtype=dtype) * 3).requires_grad_(grad), targets


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_with_gradients(softcap, smoothing):
    x, t = rows(grad=True)
    z = softcap * torch.tanh(x / softcap) if softcap else x
    expected = F.cross_entropy(z, t, reduction="none", label_smoothing=smoothing)
    losses, statistics = OP(x, t, -100, softcap, smoothing)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(statistics.sum(-1), torch.logsumexp(z, -1))
    weights = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad((losses * weights).sum(), x), torch.autograd.grad((expected * weights).sum(), x))
    assert torch.autograd.gradcheck(lambda x: OP(x, t, -100, softcap, smoothing)[0], (x,))


@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
def test_opcheck(shape):
    x = torch.randn(*shape, 7, requires_grad=True)
    t = torch.randint(0, 7, shape)
    torch.library.opcheck(OP, (x, t, -100, 0.0, 0.1))
    torch.library.opcheck(torch.ops.tileweld.cross_entropy_backward.default, (torch.randn(shape), x.detach(), t, torch.randn(*shape, 2), -100, 2.0, 0.0))


def test_the_gradient_has_the_logits_dtype():
    x, t = rows(dtype=torch.bfloat16, grad=True)
    losses, _ = OP(x, t, -100, 0.0, 0.0)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and x.grad.dtype == torch.bfloat16 and not x.grad[1].any()


@pytest.mark.parametrize("target", [-1, 11, -101])
def test_a_target_out_of_bounds_raises_as_eager(target):
    x, t = rows()
    t[3] = target
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        F.cross_entropy(x, t)
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        OP(x, t, -100, 0.0, 0.0)
    with pytest.raises(IndexError):
        OP(x, t, NOTHING_IGNORED, 0.0, 0.0)


def test_hostile_rows_are_eagers():
    x = torch.randn(8, 5)
    x[1] = 3e38
    x[2, 0] = float("inf")
    x[3, 0] = -float("inf")
    x[4] = -float("inf")
    x[5, 4] = float("nan")
    x[6] = 0
    t = torch.tensor([0, 1, 1, 0, 1, 1, 1, -100])
    torch.testing.assert_close(OP(x, t, -100, 0.0, 0.0)[0], F.cross_entropy(x, t, reduction="none"), equal_nan=True)


def test_no_rows():
    losses, statistics = OP(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), -100, 0.0, 0.0)
    assert losses.shape == (0,) and statistics.shape == (0, 2)
