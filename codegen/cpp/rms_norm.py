"""``tileweld::rms_norm`` as C++: rows in parallel, sums of squares in float32 vectors, no torch headers (rms_norm.h)."""
from __future__ import annotations

from pathlib import Path

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.rms_norm import CASTS

ELEMENTS = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
_FOLDER = Path(__file__).parent


def emit(x_dtype: torch.dtype, weight_dtype: torch.dtype | None, rank: int, cast: str) -> Kernel:
    """The kernel for x of `rank` dims, any sizes and strides; weight_dtype None: no weight.

    Tensors of a call: [out, x] or [out, x, weight], out as compiler/ir/rms_norm.py defines it; no integers; floats: eps, offset.
    Raises UnsupportedError for float64 and what is no float dtype.
    """
    for name, dtype in (("x", x_dtype), ("weight", weight_dtype)):
        if dtype is not None and dtype not in ELEMENTS:
            raise UnsupportedError(f"no C++ rms_norm kernel for {name} of {dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    if rank < 1 or cast not in CASTS:
        raise UnsupportedError(f"no C++ rms_norm kernel for rank {rank}, cast {cast!r}", cure=f"rank 1 or more, cast one of {CASTS}")
    weighted = weight_dtype is not None
    out_dtype = torch.promote_types(x_dtype, weight_dtype) if weighted and cast == "before" else x_dtype
    rounds = weighted and cast == "before" and x_dtype != torch.float32
    short = str(x_dtype).removeprefix("torch.")
    detail = f"{short}[{rank}-d]" + (f", weight {str(weight_dtype).removeprefix('torch.')}, rounds {cast} it" if weighted else ", no weight")
    parts = [
        f"// tileweld rms_norm: out = x rsqrt(mean(x^2) + eps){' (offset + weight)' if weighted else ''} over the last dim; from the rewrite `rms_norm`\n//   {detail}\n",
        (_FOLDER / "vector.h").read_text(),
        "// ---- this variant\n",
        f"using X = {ELEMENTS[x_dtype]};\nusing Weight = {ELEMENTS[weight_dtype] if weighted else 'float'};\nusing Out = {ELEMENTS[out_dtype]};\n"
        f"constexpr int RANK = {rank};\nconstexpr bool HAS_WEIGHT = {str(weighted).lower()}, ROUND_BEFORE = {str(rounds).lower()};\n#define ENTRY rms_norm\n",
        (_FOLDER / "rms_norm.h").read_text(),
    ]
    return Kernel("rms_norm", "cpp", "\n".join(parts), "rms_norm", rewrite="rms_norm", detail=detail)
