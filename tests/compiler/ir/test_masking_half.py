"""float16's finfo.min as an additive mask: taken for one only where every row sees a key."""
import pytest
import torch
import tileweld

LOWEST = torch.finfo(torch.float16).min


def attention(q, k, v, padding=None):
    i = torch.arange(q.shape[2])
    visible = i[None, :] <= i[:, None]
    if padding is not None:
        visible = visible & padding[:, None, None, :]
    mask = torch.where(visible, torch.zeros((), dtype=q.dtype), LOWEST)
    return torch.softmax((q @ k.mT) * 0.25 + mask, -1) @ v


def detail(*inputs):
    torch._dynamo.reset()
    with torch.no_grad():
        (fusion,) = tileweld.explain(attention, *inputs).fusions
    return fusion.detail


@pytest.fixture
def qkv():
    return [torch.randn(2, 2, 9, 16, dtype=torch.float16) for _ in range(3)]


def test_causal_is_a_mask(qkv):
    assert detail(*qkv) == "score=0.25*s mask=j <= i"


def test_padding_may_empty_a_row_and_stays_in_the_score(qkv):
    padding = torch.ones(2, 9, dtype=torch.bool)
    assert "mask" not in detail(*qkv, padding) and "-65504" in detail(*qkv, padding)


@pytest.mark.parametrize("padded", [False, True])
def test_equals_float64_as_well_as_eager(qkv, padded):
    padding = torch.ones(2, 9, dtype=torch.bool) if padded else None
    if padded:
        padding[0, :3] = False
    inputs = [*qkv, padding] if padded else qkv
    with torch.no_grad():
        exact = attention(*[x.double() if x is not None and x.is_floating_point() else x for x in inputs])
        eager, ours = attention(*inputs).double(), torch.compile(attention, backend="tileweld")(*inputs).double()
    seen = slice(3, None) if padded else slice(None)  # rows of padding alone: 65504 swallows s in eager, not in float64
    assert (ours - exact)[:, :, seen].abs().max() <= 2 * (eager - exact)[:, :, seen].abs().max() + 1e-4
