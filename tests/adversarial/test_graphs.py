"""Graphs that are long, deep or change modes."""
import torch
import torch._dynamo
from torch import nn


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="tileweld")


def test_a_value_that_is_used_twice_at_each_of_forty_steps():
    def function(x):
        for _ in range(40):  # as a tree 2**40 operations
            x = x + torch.sin(x) * 0.1
        return x

    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(function)(x), function(x))


def test_a_chain_of_three_hundred_operations():
    def function(x):
        for k in range(300):
            x = x * 0.9 + 0.1 if k % 2 else torch.sin(x)
        return x

    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(function)(x), function(x))


def test_casts_inside_autocast_are_those_of_eager():
    def function(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.mm(x, x).float()
            with torch.autocast("cpu", enabled=False):
                z = torch.mm(x, y) * 2
            w = torch.mm(x, z)
            return y.exp(), (y - 1).sum(-1), z, w, torch.softmax(w.float(), -1)

    x = torch.randn(8, 8)
    torch.testing.assert_close(compiled(function)(x), function(x), rtol=3e-2, atol=3e-2)  # with their dtypes


def test_autocast_ends_where_a_capture_fails():
    from tileweld.compiler.capture import _Capturing

    def broken(x):
        raise ValueError

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    graph.output(graph.call_function(broken, (x,)))
    try:
        _Capturing(torch.fx.GraphModule({}, graph)).run(torch.ones(1))
    except ValueError:
        pass
    assert not torch.is_autocast_enabled("cpu")


def test_a_layer_norm_of_a_transposed_tensor_is_contiguous():
    """In training AOT views the norm's result, which is contiguous where its parts keep the transposed strides."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(torch.autograd.grad(compiled(layer)(x).square().sum(), list(layer.parameters())), expected, rtol=1e-3, atol=1e-3)


def test_elu_of_heads_is_differentiated():
    """torch says strides for elu's gradient that its kernel does not make, and a view of it fails in aot_eager; here it is its parts."""
    w, x = torch.randn(32, 32, requires_grad=True), torch.randn(2, 6, 32)

    def function(x, w):
        return (torch.nn.functional.elu((x @ w).unflatten(-1, (4, 8)).transpose(1, 2)) + 1).cumsum(2).sin().sum()

    expected = torch.autograd.grad(function(x, w), w)
    torch.testing.assert_close(torch.autograd.grad(compiled(function)(x, w), w), expected)
