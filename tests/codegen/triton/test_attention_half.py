"""Triton attention of float32 queries over keys and values of half types: interpreted against the definition, and compiled ahead of time."""
import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.attention import emit  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.attention import Variant  # noqa: E402
from tileweld.compiler.kernels_table import table  # noqa: E402

from .test_attention_int8 import run  # noqa: E402

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize("Tq", [1, 70])  # decode, prefill
@pytest.mark.parametrize(("k", "v"), [(F16, F16), (BF16, BF16), (F16, F32), (F32, BF16)], ids=str)
def test_against_the_definition(k, v, Tq):
    run({"score": "0.25*s", "mask": "j <= i + 3"}, [], k=k, v=v, Tq=Tq)


def test_what_would_be_rounded_is_refused():
    with pytest.raises(UnsupportedError, match="no Triton attention kernel for q of torch.float16 and k of torch.float32"):
        emit(Variant(), q_dtype=F16, k_dtype=F32, v_dtype=F16, head_dim=16, value_dim=16)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_ahead_of_time(arch):
    """Compiled for GPUs that are not here: the default tiles fit. Decoding, which is what a cache is for, spills nothing; the prefill's products in float32 keep tiles of two dtypes: 272 bytes on sm_90."""
    made = emit(Variant("0.125*s", "j <= i"), q_dtype=F32, k_dtype=F16, v_dtype=BF16, head_dim=64, value_dim=64)
    assert made.detail.endswith("k float16 v bfloat16")
    for row in table([made], [arch]):
        assert row.result is not None, row.error
        assert row.result.fits and row.result.spills <= (512 if row.kernel == "attention_kernel" else 0), (row.kernel, row.result)
