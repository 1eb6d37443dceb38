"""Triton attention over keys and values as they are stored, int8 or floats: what its tests share. An interpreted kernel against the definition in float64."""
import math

import torch
from tileweld.codegen.triton.attention import emit
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.compiler.ir.attention_keys import definition
from tileweld.runtime.interpret import interpreted_entry

#: relative to the largest output; fp16's and bf16's weights are computed in fp32 by the interpreter, and the output is rounded
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def run(texts, captures, *, dtype=torch.float32, k=torch.int8, v=torch.int8, B=2, H=4, Hk=2, Tq=5, Tk=70, D=16, Dv=16, stored=None, tolerance=TOLERANCE):
    """texts: fields of a Variant; dtypes of q, k and v; stored: positions that k has, of Tk. Returns what the kernel wrote."""
    def numbers(dtype, *shape):
        return torch.randint(-127, 128, shape, dtype=dtype) if dtype == torch.int8 else torch.randn(shape).to(dtype)

    q, keys, values = numbers(dtype, B, H, Tq, D), numbers(k, B, Hk, Tk if stored is None else stored, D), numbers(v, B, Hk, Tk, Dv)
    variant = Variant(**{"fill": -math.inf, **texts}, integer_captures=integer_captures(captures))
    kernel = emit(variant, q_dtype=dtype, k_dtype=k, v_dtype=v, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=D, value_dim=Dv)
    out = empty_output(q, Dv).fill_(7)
    interpreted_entry(kernel.name, kernel.source, kernel.entry)([out, q, keys, values, *captures], [])
    wanted = definition if variant.key else reference
    expected = wanted(q.double(), *(x if x.dtype == torch.int8 else x.double() for x in (keys, values)), [c.double() if c.is_floating_point() else c for c in captures], [], variant)
    assert torch.equal(out.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().max().clamp(min=1e-6)
    torch.testing.assert_close(out.double() / scale, expected / scale, rtol=0, atol=tolerance[dtype], equal_nan=True)
    return out
