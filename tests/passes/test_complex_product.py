"""complex_product: rotary in complex numbers, as Llama's own code has it, becomes real, goes into the projection, and is merged by mha_to_gqa; other complex products stay."""

import pytest
import torch
from torch import nn

import tileweld

from .conftest import assert_same, rewritten


class Attention(nn.Module):
    """Llama's reference attention (llama/model.py): view_as_complex of neighbours, times freqs_cis."""

    def __init__(self, heads=4, kv_heads=4, d=8, hidden=32, polar=False):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.d, self.polar = heads, kv_heads, d, polar
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(a, b, bias=False) for a, b in ((hidden, heads * d), (hidden, kv_heads * d), (hidden, kv_heads * d), (heads * d, hidden)))
        angles = torch.outer(torch.arange(64).float(), 10000.0 ** (-torch.arange(0, d, 2).float() / d))
        self.register_buffer("angles", angles)
        self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.wq(x).view(b, t, self.heads, self.d), self.wk(x).view(b, t, self.kv_heads, self.d), self.wv(x).view(b, t, self.kv_heads, self.d)
        freqs = (torch.polar(torch.ones_like(self.angles), self.angles) if self.polar else self.freqs)[:t].view(1, t, 1, -1)
        turned = lambda y: torch.view_as_real(torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2)) * freqs).flatten(3).type_as(y)
        q, k, v = (y.transpose(1, 2) for y in (turned(q), turned(k), v))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        scores = q @ k.mT / self.d**0.5 + torch.full((t, t), float("-inf")).triu(1)
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("polar", [False, True])
def test_it_goes_into_the_projection(polar, rewriting):
    report = rewriting.check(Attention(polar=polar), X, count={"complex_product": 2, "attention": 1, "qkv_rotary": 1})
    assert "rotary on 2 of 3 (interleaved)" in next(f.detail for f in report.fusions if f.rewrite == "qkv_rotary")


def test_no_complex_number_is_left_for_the_kernels():
    module = Attention().eval()
    torch._dynamo.reset()
    with torch.no_grad():
        report = tileweld.explain(module, X)
        torch.testing.assert_close(torch.compile(module, backend="tileweld")(X), module(X), rtol=1e-4, atol=1e-5)
    assert len(report.kernels) == 3 and not report.fallbacks


@pytest.mark.parametrize("kv_heads, groups", [(4, 2), (4, 1), (2, 1)])
def test_heads_that_are_one_up_to_a_rotation_of_pairs_are_merged_exactly(kv_heads, groups):
    """Keys of a group: one head times a complex number a pair, its queries divided by the conjugate, values mixed, as in test_mha_to_gqa."""
    module = Attention(kv_heads=kv_heads).double().eval()
    size, d, n_rep = kv_heads // groups, 8, 4 // kv_heads
    with torch.no_grad():
        k, v = (w.weight.view(kv_heads, d, 32) for w in (module.wk, module.wv))
        for j in range(kv_heads):
            first = j // size * size
            c = torch.polar(torch.rand(d // 2, 1, dtype=torch.float64) + 0.5, 6 * torch.rand(d // 2, 1, dtype=torch.float64)) if j != first else torch.ones(d // 2, 1, dtype=torch.complex128)
            k[j] = torch.view_as_real(torch.view_as_complex(k[first].view(d // 2, 2, 32).transpose(1, 2).contiguous()) * c).transpose(1, 2).reshape(d, 32)
            v[j] = torch.randn(d, d, dtype=torch.float64) @ v[first]
    x = X.double()
    module.freqs = module.freqs.to(torch.complex128)
    module.forward = _in_double.__get__(module)
    with torch.no_grad():
        exact = module(x)
    got, report = rewritten(module, x, gqa=groups)
    assert report.counts["mha_to_gqa"] == 1, [(r.rewrite, r.reason) for r in report.refusals]
    assert_same(exact, got, 1e-8)


def _in_double(self, x):
    """forward without its casts to float32."""
    b, t, _ = x.shape
    q, k, v = (w(x).view(b, t, -1, self.d) for w in (self.wq, self.wk, self.wv))
    turned = lambda y: torch.view_as_real(torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2)) * self.freqs[:t].view(1, t, 1, -1)).flatten(3)
    q, k, v = (y.transpose(1, 2) for y in (turned(q), turned(k), v))
    k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
    scores = q @ k.mT / self.d**0.5 + torch.full((t, t), float("-inf"), dtype=x.dtype).triu(1)
    return self.wo((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


def test_gradients_are_eagers(rewriting):
    freqs = torch.polar(torch.ones(6, 4), torch.rand(6, 4))
    module = nn.Linear(32, 8)
    rewriting.check_gradients(_Turned(module), X, count={"complex_product": 1})
    assert freqs.is_complex()


class _Turned(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.register_buffer("cos", torch.rand(6, 4))

    def forward(self, x):
        y = self.linear(x)
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2))) * torch.complex(self.cos, 1 - self.cos)).flatten(-2)


# ---------------------------------------------------------------- what stays


def kept_complex(x, z):
    """Leaves as a complex number too."""
    y = torch.view_as_complex(x) * z
    return torch.view_as_real(y), y.abs()


def a_sum(x, z):
    return torch.view_as_real(torch.view_as_complex(x) + z)


def two_complex(x, z):
    return torch.view_as_real((z * z) * torch.view_as_complex(x).sum())


@pytest.mark.parametrize("other", [kept_complex, a_sum, two_complex], ids=lambda f: f.__name__)
def test_other_complex_numbers_stay(other, rewriting):
    args = torch.randn(3, 4, 2), torch.randn(3, 4, dtype=torch.complex64)
    got, report = rewriting.rewritten(other, *args)
    assert report.counts["complex_product"] == 0
    for a, b in zip(got if isinstance(got, tuple) else (got,), other(*args) if isinstance(got, tuple) else (other(*args),)):
        torch.testing.assert_close(a, b)


def test_a_product_of_two_tensors_seen_as_complex(rewriting):
    rewriting.check(lambda x, y: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y)), torch.randn(3, 4, 2), torch.randn(3, 4, 2), count={"complex_product": 1})
