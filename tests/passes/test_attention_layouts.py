"""The attention rewrite: groups of heads, the library's own attention, odd shapes, dynamic sizes and writes in place."""

import math

import pytest
import torch
import torch.nn.functional as F

B, H, T, S, D = 2, 4, 6, 9, 8
SCALE = D**-0.5
INF = math.inf


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


def qkv(rows=T, keys=S, width=D, value_width=6):
    return torch.randn(B, H, rows, width), torch.randn(B, H, keys, width), torch.randn(B, H, keys, value_width)


def detail(report):
    (fusion,) = [f for f in report.fusions if f.rewrite == "attention"]
    return fusion.detail


# ---------------------------------------------------------------- groups of heads

GROUPS = {
    "expand": lambda x: x[:, :, None].expand(B, 2, 2, *x.shape[2:]).reshape(B, 4, *x.shape[2:]),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "torch_repeat_interleave": lambda x: torch.repeat_interleave(x, repeats=2, dim=1),
    "stack": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
}


@pytest.mark.parametrize("repeat", GROUPS)
def test_repeated_keys_are_read_where_they_are(repeat, compare):
    q, k, v = qkv()
    report = compare(lambda q, k, v: attend(q @ GROUPS[repeat](k).mT, GROUPS[repeat](v)), q, k[:, :2].clone(), v[:, :2].clone(), fused=1)
    assert "heads=4/2" in detail(report)


def test_tiled_keys_are_not_taken_for_groups(compare):
    """k.repeat(1, 2, 1, 1) gives head h the key head h % 2, not h // 2."""
    q, k, v = qkv()
    compare(lambda q, k, v: attend(q @ k.repeat(1, 2, 1, 1).mT, v.repeat(1, 2, 1, 1)), q, k[:, :2].clone(), v[:, :2].clone(), fused=1)
    compare(lambda q, k, v: attend(q @ k.repeat_interleave(2, 1).mT, v.repeat(1, 2, 1, 1)), q, k[:, :2].clone(), v[:, :2].clone(), fused=1)


def test_grouped_layouts(compare):
    q, k, v = qkv()

    def five(q, k, v):
        return (torch.softmax(q.view(B, 2, 2, T, D) @ k[:, :, None].mT, -1) @ v[:, :, None]).view(B, H, T, -1)

    def einsum(q, k, v):
        weights = torch.softmax(torch.einsum("bkgid,bkjd->bkgij", q.view(B, 2, 2, T, D), k), -1)
        return torch.einsum("bkgij,bkjd->bikgd", weights, v).reshape(B, T, -1)

    def rows_of_a_group(q, k, v):  # a group's heads as rows: [B, 2, 2 T, D]
        return (torch.softmax(q.reshape(B, 2, 2 * T, D) @ k.mT, -1) @ v).view(B, H, T, -1)

    for core in (five, einsum, rows_of_a_group):
        compare(core, q, k[:, :2].clone(), v[:, :2].clone(), fused=1)


def test_one_key_head(compare):
    q, k, v = qkv()
    compare(lambda q, k, v: attend(q @ k.mT, v), q, k[:, :1].clone(), v[:, :1].clone(), fused=1)  # by broadcasting
    compare(lambda q, k, v: attend(torch.einsum("bhid,bjd->bhij", q, k[:, 0]), v), q, k[:, :1].clone(), v[:, :1].clone(), fused=1)


# ---------------------------------------------------------------- scaled_dot_product_attention

LIBRARY = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "bool": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(torch.arange(S) != 3).expand(T, S)),
    "float": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(T, S).masked_fill(torch.arange(S) == 3, -INF)),
    "dense": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q[..., :1] * k[:, :, None, :, 0]),
    "gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "three_dims": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "two_dims": lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
    "broadcast_batch": lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]),
    "transposed": lambda q, k, v: F.scaled_dot_product_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v).transpose(1, 2).reshape(B, T, -1),
}


@pytest.mark.parametrize("case", LIBRARY)
def test_library_attention(case, compare):
    compare(LIBRARY[case], *qkv(), fused=1)


def test_library_mask_is_lifted(compare):
    def core(q, k, v, keep):
        causal = torch.arange(T)[:, None] + (S - T) >= torch.arange(S)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & keep[:, None, None, :])

    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :5] = False
    report = compare(core, *qkv(), keep, fused=1)
    assert "c0[b, j] != 0" in detail(report) and "i" in detail(report)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_library_attention_gives_zeros_where_a_row_sees_nothing(kind, compare):
    keep = torch.ones(B, 1, T, S, dtype=torch.bool)
    keep[1, :, 2] = False
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -INF)
    compare(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *qkv(), mask, fused=1)


# ---------------------------------------------------------------- shapes

SHAPES = [(1, 4, 1, 9, 4, 4), (2, 1, 5, 7, 4, 8), (1, 1, 5, 5, 4, 4), (2, 3, 4, 4, 1, 1), (2, 3, 4, 5, 4, 1), (3, 2, 1, 2, 16, 5), (1, 1, 1, 1, 4, 4), (2, 4, 5, 1, 8, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_of_one(shape, compare):
    b, h, rows, keys, d, dv = shape
    inputs = torch.randn(b, h, rows, d), torch.randn(b, h, keys, d), torch.randn(b, h, keys, dv)
    compare(lambda q, k, v: attend((q @ k.mT).masked_fill(torch.ones(rows, keys).tril(keys - rows) == 0, -INF), v), *inputs, fused=1)
    compare(lambda q, k, v: torch.einsum("bhij,bhjd->bihd", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v), *inputs, fused=1)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4, 4, 4), (2, 3, 0, 4, 4, 4), (2, 2, 3, 0, 4, 4)], ids=str)
def test_empty(shape, compare):
    b, h, rows, keys, d, dv = shape
    compare(lambda q, k, v: attend(q @ k.mT, v), torch.randn(b, h, rows, d), torch.randn(b, h, keys, d), torch.randn(b, h, keys, dv))


SQUARE = {
    "plain": (lambda q, k, v: attend(q @ k.mT, v), 1),
    "k_is_already_transposed": (lambda q, k, v: attend(q @ k, v), 1),
    "q_transposed": (lambda q, k, v: attend(q.mT @ k, v), 1),
    "positions_in_the_head_dim": (lambda q, k, v: attend(q.transpose(1, 2) @ k.permute(0, 2, 3, 1), v.transpose(1, 2)), 1),
    "keys_from_heads": (lambda q, k, v: attend(q @ k.permute(0, 2, 3, 1), v), 1),
    "batch_and_heads_swapped": (lambda q, k, v: attend(q @ k.permute(1, 0, 3, 2), v), 1),
    "all_reversed": (lambda q, k, v: attend(q @ k.permute(3, 2, 1, 0), v.permute(2, 3, 0, 1)), 1),
    "weights_swap_batch_and_heads": (lambda q, k, v: torch.softmax(q @ k.mT, -1).transpose(0, 1) @ v, 1),
    "einsum_scramble": (lambda q, k, v: torch.einsum("bhij,jhbd->ihbd", torch.softmax(torch.einsum("hbid,jdbh->bhij", q, k), -1), v), 1),
    "library_scramble": (lambda q, k, v: F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(0, 1)), 1),
    "self": (lambda q, k, v: attend(q @ q.mT, q), 1),
    "sum_with_transpose": (lambda q, k, v: (lambda s: attend(s + s.mT, v))(q @ k.mT), None),
    "bias_transposed": (lambda q, k, v: attend(q @ k.mT + v.permute(1, 0, 3, 2), v), 1),
    "softmax_over_queries": (lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, 0),
    "softmax_over_heads": (lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v, 0),
    "softmax_over_batch": (lambda q, k, v: torch.softmax(q @ k.mT, 0) @ v, 0),
    "weights_transposed": (lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v, 0),
    "values_on_the_wrong_side": (lambda q, k, v: v @ torch.softmax(q @ k.mT, -1), 0),
}


@pytest.mark.parametrize("case", SQUARE)
def test_equal_sizes_confuse_nothing(case, compare):
    """B == H == T == S == D: only the dataflow tells the dims apart."""
    core, fused = SQUARE[case]
    report = compare(core, *(torch.randn(4, 4, 4, 4) for _ in range(3)))
    assert fused is None or report.counts["attention"] == fused


def test_dynamic_shapes(compare):
    def core(q, k, v):
        rows, keys = q.shape[2], k.shape[2]
        causal = torch.arange(rows)[:, None] + (keys - rows) >= torch.arange(keys)
        return attend((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~causal, -INF), v)

    compare(core, *qkv(), fused=1, dynamic=True)
    compare(core, *qkv(rows=5, keys=5), fused=1, dynamic=True)


def test_dynamic_shapes_through_flattened_heads(compare):
    def core(q, k, v):
        b, h, t, d = q.shape
        weights = torch.softmax(torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, -1, d).mT) * SCALE, -1)
        return torch.bmm(weights, v.reshape(b * h, k.shape[2], -1)).view(b, h, t, -1).transpose(1, 2).reshape(b, t, -1)

    compare(core, *qkv(), fused=1, dynamic=True)


# ---------------------------------------------------------------- writes in place

def _k_is_overwritten(q, k, v):
    scores = q @ k.mT
    k.zero_()
    return attend(scores, v)


def _v_is_overwritten(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    v.add_(1)
    return weights @ v


def _a_view_of_v_is_overwritten(q, k, v):
    view, weights = v.view(B * H, S, -1), torch.softmax(q @ k.mT, -1)
    view[0] = 0
    return weights @ v


def _mask_is_overwritten_later(q, k, v):
    mask = torch.zeros(T, S)
    scores = q @ k.mT + mask
    mask.fill_(5.0)
    return attend(scores, v), mask + 1


def _mask_written_in_place(q, k, v):
    mask = torch.zeros(T, S)
    mask.masked_fill_(torch.ones(T, S).triu(S - T + 1).bool(), -INF)
    return attend((q @ k.mT).mul_(SCALE).add_(mask), v)


def _mask_written_by_slices(q, k, v):
    mask = torch.full((T, S), -INF)
    mask[:, :3] = 0
    mask[2:, 3:5] = 0
    return attend(q @ k.mT + mask, v)


def _weights_written(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    weights[..., 0] = 0
    return weights @ v


def _weights_erased_afterwards(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    out = weights @ v
    weights.zero_()
    return out


WRITES = [(_k_is_overwritten, None), (_v_is_overwritten, None), (_a_view_of_v_is_overwritten, None), (_mask_is_overwritten_later, None),
          (_mask_written_in_place, 1), (_mask_written_by_slices, 1), (_weights_written, 0), (_weights_erased_afterwards, None)]


@pytest.mark.parametrize("core,fused", WRITES, ids=lambda x: getattr(x, "__name__", None))
def test_writes_in_place_keep_their_order(core, fused, compare):
    report = compare(core, *qkv())
    assert fused is None or report.counts["attention"] == fused
