"""Keys and values of a half type that a model widens before the attention: the cast is read through, where queries are float32."""
import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.ir.attention import Variant, reference
from tileweld.models import llama_gqa

B, H, T, S, D = 2, 4, 3, 9, 8
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def operands(kind, kv_heads=2, dtype=F32):
    """q [B, H, T, D], k and v [B, KV heads, S, D]"""
    return torch.randn(B, H, T, D).to(dtype), *(torch.randn(B, kv_heads, S, D).to(kind) for _ in range(2))


def repeated(x, n):
    return x[:, :, None].expand(-1, -1, n, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def by_hand(q, k, v):
    k, v = (repeated(x.to(q.dtype), H // x.shape[1]) for x in (k, v))
    return torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v


def by_library(q, k, v):
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), enable_gqa=k.shape[1] != H)


def dtypes(report):
    (node,) = [n for n in report.graphs[-1].graph.nodes if n.target is torch.ops.tileweld.attention.default]
    return [x.meta["val"].dtype for x in node.args[:3]]


@pytest.mark.parametrize("kind", [F16, BF16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fn", [by_hand, by_library])
def test_the_cast_is_read_through(fn, kv_heads, kind, compare):
    assert dtypes(compare(fn, *operands(kind, kv_heads), fused=1, verify=True)) == [F32, kind, kind]


def test_one_of_them(compare):
    q, k, v = operands(F16)
    assert dtypes(compare(by_library, q, k, v.float(), fused=1)) == [F32, F16, F32]
    assert dtypes(compare(by_library, q, k, v.bfloat16(), fused=1)) == [F32, F16, BF16]


def test_a_factor_is_not_rounded(compare):
    """k scaled behind the cast: the factor is one of the score, never of the stored elements."""
    report = compare(lambda q, k, v: by_library(q, k.float() * 1.2345678, v), *operands(F16), fused=1, tolerance=1e-6)
    assert dtypes(report) == [F32, F16, F16]


@pytest.mark.parametrize(("q", "stored", "expected"), [(F16, F16, F16), (F16, BF16, F32), (torch.float64, F16, torch.float64), (torch.float64, F32, torch.float64)], ids=str)
def test_elsewhere_dtypes_agree(q, stored, expected, compare):
    """float64 is computed by the definition on one dtype; half types among themselves are not exact in each other."""
    def fn(q, k, v):
        wide = torch.promote_types(q.dtype, k.dtype)
        return F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), enable_gqa=True)

    found = dtypes(compare(fn, *operands(stored, dtype=q), fused=1, tolerance=2e-3 if q == F16 else 1e-5))
    assert found[0] == expected and all(d == expected or (expected == F32 and d in (F16, BF16)) for d in found[1:])


def test_gradients():
    """Those of the widened keys and values, rounded to the dtype in which they are stored."""
    q, k, v = (x.requires_grad_() for x in operands(F16))
    out = torch.ops.tileweld.attention(q, k, v, [], [], "0.25*s", "j <= i + 4", float("-inf"), "", "nan")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = by_mask(*wide)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference(*(x.detach() for x in wide), [], [], Variant("0.25*s", "j <= i + 4")), expected.detach())
    grad = torch.randn_like(out)
    for ours, theirs, x in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, wide, grad.double()), (q, k, v)):
        assert ours.dtype == x.dtype
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5 if x.dtype == F32 else 2e-3, rtol=1e-5 if x.dtype == F32 else 2e-3)


def by_mask(q, k, v):
    scores = q @ repeated(k, 2).mT * 0.25
    return torch.softmax(scores.masked_fill(torch.arange(S)[None, :] > torch.arange(T)[:, None] + 4, float("-inf")), -1) @ repeated(v, 2)


@pytest.mark.parametrize("kind", [F16, BF16])
def test_a_model_with_a_half_cache(kind):
    """Decoding with a static cache of a half type: the kernel reads it as it lies, and the tokens are eager's."""
    import tileweld

    model, tokens = llama_gqa.build(), torch.randint(1, 256, (1, 7))
    caches = [model.new_cache(1, 16, kind) for _ in range(2)]
    steps = [(tokens[:, :5], torch.arange(5)), (tokens[:, 5:6], torch.tensor([5])), (tokens[:, 6:], torch.tensor([6]))]
    with torch.no_grad():
        compiled = torch.compile(model, backend="tileweld")
        for x, positions in steps:
            torch.testing.assert_close(compiled(x, caches[0], positions), model(x, caches[1], positions), atol=2e-3 if kind == F16 else 2e-2, rtol=1e-3)
        graph = tileweld.explain(model, tokens[:, 6:], caches[0], torch.tensor([6])).graphs[-1].graph
    found = [[a.meta["val"].dtype for a in n.args[:3]] for n in graph.nodes if n.target is torch.ops.tileweld.attention.default]
    assert found == [[F32, kind, kind]] * 2
