"""C++ attention over keys and values as they are stored, int8 or floats: what its tests share. A kernel against a definition in float64."""
import torch
from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.ir.attention import empty_output
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def numbers(dtype, *shape):
    return torch.randint(-127, 128, shape, dtype=dtype) if dtype == torch.int8 else torch.randn(shape).to(dtype)


def emitted(variant, captures, dtypes, dims, **known):
    """The kernel of a variant; dtypes of q, k, v; head dims of keys and values."""
    q, k, v = dtypes
    return emit(variant, q_dtype=q, k_dtype=k, v_dtype=v, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], head_dim=dims[0], value_dim=dims[1], **known)


def launchers(kernels):
    return [CppLauncher(library, k.entry) for library, k in zip(compile_cpp([CppUnit.of(k) for k in kernels]), kernels)]


def compare(run, variant, q, k, v, captures, definition):
    """What a kernel writes, near definition(q, k, v, captures, sizes, variant) on float64."""
    out = empty_output(q, v.shape[3])
    run([out, q, k, v, *captures], [])
    expected = definition(q.double(), *(x if x.dtype == torch.int8 else x.double() for x in (k, v)), [c.double() if c.is_floating_point() else c for c in captures], [], variant)
    scale = max(1.0, expected.nan_to_num().abs().max().item())
    torch.testing.assert_close(out.double() / scale, expected / scale, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype], equal_nan=True)
    return out
