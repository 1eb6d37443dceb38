"""``tileweld::cross_entropy`` and its backward as C++: rows in parallel, in blocks of classes that stay in cache, no torch headers (cross_entropy.h)."""
from __future__ import annotations

from pathlib import Path

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.kernel import Kernel

ELEMENTS = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
_FOLDER = Path(__file__).parent


def emit(dtype: torch.dtype, rank: int, capped: bool, backward: bool = False) -> Kernel:
    """The kernel for logits of `dtype` and targets of `rank` dims, any sizes and strides; capped: with a softcap.

    Tensors of a call: [losses, statistics, status, logits, targets], or backward [dlogits, grad, logits, targets, statistics], all as in
    compiler/ir/cross_entropy.py, losses, statistics and dlogits contiguous. status, int32 [1], is set to 1 where a target is out of bounds
    (nothing is read there, and the row's loss and gradient are NaN). Integers: ignore_index; floats: softcap, smoothing. Raises UnsupportedError for float64 and what is no float dtype.
    """
    if dtype not in ELEMENTS:
        raise UnsupportedError(f"no C++ cross_entropy kernel for logits of {dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    name = "cross_entropy_backward" if backward else "cross_entropy"
    detail = f"{str(dtype).removeprefix('torch.')} logits of {rank + 1} dims" + (", softcap" if capped else "")
    meaning = "dx = g (exp(z - top - rest) - [j == target])" if backward else "loss = log(sum exp(z - top)) - (z[target] - top)"
    parts = [
        f"// tileweld {name}: {meaning}; from the rewrite `cross_entropy`\n//   {detail}\n",
        (_FOLDER / "vector.h").read_text(),
        (_FOLDER / "scalar_math.h").read_text(),
        "// ---- this variant\n",
        f"using X = {ELEMENTS[dtype]};\nconstexpr int RANK = {rank};\nconstexpr bool CAPPED = {str(capped).lower()};\n#define {'BACKWARD' if backward else 'FORWARD'} {name}\n",
        (_FOLDER / "cross_entropy.h").read_text(),
    ]
    return Kernel(name, "cpp", "\n".join(parts), name, rewrite="cross_entropy", detail=detail)
