"""Values at the edges of dtypes between fused operations: what torch defines, a kernel gives."""
import pytest
import torch
import torch._dynamo


def same(function, *args, atol=1e-5):
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="tileweld")(*args), function(*args), rtol=atol, atol=atol, equal_nan=True)


def test_integers_wrap_in_their_dtype_and_become_floats_before_they_are_squared():
    def function(a, b, e, f, g):
        return ((a - b).float() * 2, (a * b).float() + 1, (-a.to(torch.int8)).float() * 1.5, (e * f).float() * 2, (e + f) // 3 + 1, (g.float() * g.float()) + 1, (g.float() ** 2) * 0.5, (g.int() + 1).float() * 2)

    torch.manual_seed(0)
    a, b = (torch.randint(0, 256, (4, 9), dtype=torch.uint8) for _ in range(2))
    e, f = (torch.randint(-2**31, 2**31 - 1, (4, 9), dtype=torch.int32) for _ in range(2))
    same(function, a, b, e, f, torch.randint(-2**62, 2**62, (4, 9)))


def test_remainders_and_quotients_of_floats_are_exact():
    x = torch.tensor([5.0, -5.0, 1.0, 1000.5, 1e8, -0.0, float("inf"), float("nan"), 7.5])
    y = torch.tensor([float("inf"), float("inf"), 0.1, 6.2831855, 0.1, 1.0, 2.0, 2.0, -2.0])
    same(lambda x, y: (torch.remainder(x, y) + 0, (x // y) * 2, x % 0.3 + 1, torch.div(x, y, rounding_mode="floor") * 2), x, y)


@pytest.mark.parametrize("function", [lambda a, b: a // b + 1, lambda a, b: a % b * 2])
def test_a_division_of_integers_by_zero_is_an_error_and_not_the_end_of_the_process(function):
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        torch.compile(function, backend="tileweld")(torch.tensor([1, -7]), torch.tensor([0, 3]))


def test_a_comparison_happens_in_the_common_dtype():
    x = torch.tensor([0.1, 0.3, 0.7, 3.3, 2.0]).bfloat16()  # 0.1 as bfloat16 is 0.10009765625, and not more than 0.1
    same(lambda x: ((x * 1 > 0.1).float() * 2, torch.where(x == 0.1, x * 2, x), (x < 0.7) | (x > 3.3)), x)


def test_variances_of_complex_numbers_of_halves_and_of_too_few_numbers():
    same(lambda x, z: (x.var(-1, correction=9) * 2, z.var(-1) * 2), torch.randn(4, 8), torch.randn(4, 8, dtype=torch.complex64))
    same(lambda x: x.var(0).float() * 2, torch.randn(64, 64).bfloat16() + 100, atol=3e-2)


@pytest.mark.parametrize("target", ["auto", "reference"])
def test_numbers_without_a_dimension_and_tensors_without_elements(target):
    def number(x, y):
        return torch.softmax(x, 0) * 2, torch.log_softmax(x, -1) + 1, (x - x.mean(0)) * 2, x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * y, x.index_select(0, torch.tensor([0])) * 2, x.cumsum(0) * 2, x.amax() * 2

    def nothing(x, y):
        return x.sum(0) * 2 + 1, x.mean(0) * 2, torch.cat([x, y]) * 2 + 1, torch.softmax(x, 0) * 2

    for function, args in ((number, (torch.tensor(2.0), torch.randn(8))), (nothing, (torch.randn(0, 5), torch.randn(3, 5)))):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(function, backend="tileweld", options={"target": target})(*args), function(*args), equal_nan=True)
