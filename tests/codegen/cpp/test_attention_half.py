"""C++ attention of float32 queries over keys and values of half types, a cache of half the bytes, against the definition in float64."""
import pytest
import torch

from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, is_widened

from .test_attention_int8 import check, inputs, kernel, launchers

F16, BF16, F32, F64, I8 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8
CAUSAL = {"score": "0.125*s", "mask": "j <= i + 3"}
POSITION = {"score": "0.125*s", "mask": "j <= c0", "fill": -3e38}  # as a static cache is masked: what lies behind is not read


def nothing(*sizes):
    return []


CASES = {
    "float16": (CAUSAL, nothing, F32, F16, F16, (64, 64)),
    "bfloat16": (CAUSAL, nothing, F32, BF16, BF16, (64, 64)),
    "odd head dims": (CAUSAL, nothing, F32, F16, BF16, (33, 20)),
    "wide": (CAUSAL, nothing, F32, BF16, F16, (160, 144)),
    "keys alone": (CAUSAL, nothing, F32, F16, F32, (64, 64)),
    "values alone": (CAUSAL, nothing, F32, F32, F16, (64, 64)),
    "beside int8": (CAUSAL | {"score": "0.01*s"}, nothing, F32, I8, F16, (64, 64)),
    "a position": (POSITION, lambda B, Hk, Tq, Tk: [torch.tensor(Tk // 2)], F32, F16, F16, (64, 64)),
}


@pytest.fixture(scope="module")
def built():
    return dict(zip(CASES, launchers([kernel(case) for case in CASES.values()])))


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(built, name):
    for Tq, Tk in ((1, 1), (1, 130), (1, 700), (3, 300), (17, 17), (150, 333)):  # streamed, packed; whole and partial chunks
        check(built[name], CASES[name], *inputs(CASES[name], Tq, Tk))
    for heads, kv_heads in ((2, 2), (8, 2), (16, 1)):  # a row for every KV head, and several that share a reading
        check(built[name], CASES[name], *inputs(CASES[name], 1, 300, heads, kv_heads))


@pytest.mark.parametrize("Tq", [1, 40])
def test_strides(built, Tq):
    """As rows of [B, T, heads, D], with a distance between the elements of a row, one head for all."""
    q, k, v, captures = inputs(CASES["float16"], Tq, 99)
    spread = torch.randn(2, 2, 99, 128).half()
    for keys, values in ((k.transpose(1, 2).contiguous().transpose(1, 2), v), (spread[..., ::2], spread[..., 1::2]), (k[:, :1].expand(2, 2, 99, 64), v.mT.contiguous().mT)):
        check(built["float16"], CASES["float16"], q, keys, values, captures)


def test_numbers_at_the_ends(built):
    """Subnormals and the largest float16 are widened exactly, and an inf among the values that a row sees reaches it."""
    q, k, v, captures = inputs(CASES["float16"], 1, 4)
    v[:, :, 0], v[:, :, 1], k[:, :, 2] = 2.0 ** -24, 65504.0, 2.0 ** -20
    check(built["float16"], CASES["float16"], q, k, v, captures)
    v[:, :, 3, 5] = torch.inf
    assert check(built["float16"], CASES["float16"], q, k, v, captures)[..., 5].isinf().all()


@pytest.mark.parametrize(("q", "k", "v"), [(F16, F32, F16), (BF16, F16, BF16), (F16, F16, BF16), (F32, F64, F64)], ids=str)
def test_what_would_be_rounded_is_refused(q, k, v):
    assert not is_widened(k, q) and k != q or not is_widened(v, q)
    with pytest.raises(UnsupportedError, match="no C\\+\\+ attention kernel for q of"):
        emit(Variant(), q_dtype=q, k_dtype=k, v_dtype=v, head_dim=16, value_dim=16)
