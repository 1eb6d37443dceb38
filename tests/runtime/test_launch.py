"""The launcher hands pointers, sizes, strides and scalars over as the ABI of compiler/ir/kernel.py says."""

import time

import pytest
import torch

from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

# out[n] = the n-th integer of the call, then the floats, then the first element of each tensor
SOURCE = """
#include <cstdint>
extern "C" void report(void* const* data, const int64_t* ints, const double* floats) {
    double* out = static_cast<double*>(data[0]);
    const int64_t num_ints = ints[0] - 4;
    for (int64_t n = 0; n < num_ints; ++n) out[n] = double(ints[n]);
    out[num_ints] = floats ? floats[0] : 0;
    for (int n = 0; n < 3; ++n) out[num_ints + 1 + n] = *static_cast<const double*>(data[n + 1]);
}
extern "C" void nothing(void* const*, const int64_t*, const double*) {}
"""


@pytest.fixture(scope="module")
def library():
    return compile_cpp([CppUnit("launch", SOURCE)])[0]


def test_what_a_kernel_receives(library):
    x = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4).transpose(0, 2)
    y = torch.full((5, 1), 7.0, dtype=torch.float64).expand(5, 6)
    z = torch.tensor(9.0, dtype=torch.float64)
    expected_ints = [x.dim() * 2 + y.dim() * 2 + 2 + 2 + 4, 1, *x.shape, *x.stride(), *y.shape, *y.stride(), -3, 2**40]
    out = torch.zeros(expected_ints[0], dtype=torch.float64)
    CppLauncher(library, "report")([out, x[1:], y, z], [-3, 2**40], [0.1])
    expected_ints[2] = x.shape[0] - 1
    assert out.tolist() == [*map(float, expected_ints), 0.1, x[1, 0, 0].item(), 7.0, 9.0]


def test_several_rounds_with_other_tensors(library):
    launch = CppLauncher(library, "report")
    for n in range(5):
        x = torch.full((n + 1,), float(n), dtype=torch.float64)
        out = torch.zeros(2 + 6 + 4, dtype=torch.float64)
        launch([out, x, x, x], [], [float(n)])
        assert out.tolist() == [12.0, 1.0, *[n + 1.0, 1.0] * 3, *[float(n)] * 4]


def test_a_missing_entry(library):
    with pytest.raises(AttributeError, match="absent"):
        CppLauncher(library, "absent")


def test_the_cost_of_a_call(library):
    """Measured 5 us for four tensors of rank 4; the bound leaves room for a busy machine, and catches an ndarray or a dict a call."""
    launch = CppLauncher(library, "nothing")
    tensors = [torch.empty(1, 2, 3, 4).transpose(1, 2) for _ in range(4)]
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(20):
            launch(tensors, (3,))
        best = min(best, (time.perf_counter() - start) / 20)
    assert best < 20e-6
