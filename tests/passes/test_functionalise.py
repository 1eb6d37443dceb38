"""In-place ops become values; effects on inputs stay; what cannot be proved stays in place and is reported as frozen."""
import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.capture import capture
from tileweld.passes.functionalise import functionalise, written

aten = torch.ops.aten


def functional(fn, *inputs, dynamic=False):
    """(results, graph, frozen storages)"""
    kept = []

    def backend(gm, example_inputs):
        graph = capture(gm, example_inputs)
        kept.append((graph, functionalise(graph)))
        graph.recompile()
        return graph.forward

    torch._dynamo.reset()
    result = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    return result, *kept[0]


def writes(graph) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if written(n)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_built_in_place(dynamic):
    def fn(x):
        mask = torch.full((x.shape[0], x.shape[0]), 0.0)
        mask[1:, :2] = -5.0
        mask[:, 0].fill_(1)
        mask.masked_fill_(mask > 0.5, 7.0)
        mask.t()[0] += 2
        return torch.softmax(x @ x.t() + mask, -1), mask

    x = torch.randn(6, 6)
    result, graph, frozen = functional(fn, x, dynamic=dynamic)
    assert not frozen and not writes(graph)
    for actual, expected in zip(result, fn(x)):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def test_a_cache_gets_its_new_value_at_the_end():
    def fn(cache, position, new, q):
        cache.index_copy_(1, position, new)
        return torch.softmax(q @ cache.transpose(1, 2), -1) @ cache

    cache, new, q = torch.zeros(2, 8, 4), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    position = torch.tensor([3, 4])
    ours, eager = cache.clone(), cache.clone()
    result, graph, frozen = functional(fn, ours, position, new, q)
    assert torch.equal(result, fn(eager, position, new, q)) and torch.equal(ours, eager)
    assert not frozen and writes(graph) == ["aten.copy_.default"]
    assert graph.graph.output_node().prev.target is aten.copy_.default


def test_a_result_that_aliases_an_input_goes_on_doing_so():
    def fn(x):
        x.mul_(2)
        return x[1:], x

    x = torch.ones(4)
    (view, same), graph, _ = functional(fn, x)
    view.zero_()
    assert x.tolist() == [2, 0, 0, 0] and same is x


def test_what_reads_before_a_write_sees_the_old_value():
    def fn(x):
        before = x + 1
        alias = x.view(-1)
        x[0] = 9
        return before, alias * 1.0, before.sub_(1)

    x = torch.randn(2, 3)
    ours, eager = x.clone(), x.clone()
    result, graph, frozen = functional(fn, ours)
    assert not frozen
    for actual, expected in zip(result, fn(eager)):
        assert torch.equal(actual, expected)
    assert torch.equal(ours, eager)


def random_write(x):
    y = x + 0
    y.bernoulli_(0.5)
    return y.sin()


def through_as_strided(x):
    y = x + 0
    y.as_strided((2,), (5,)).zero_()
    return y.sin()


def metadata(x):
    y = x + 0
    y.unsqueeze_(0)
    y.add_(1)
    return y.sin()


def grad_mode(x):
    y = x * 1
    with torch.no_grad():
        y.mul_(2)
    return y.sin()


def detached(x):
    y = x * 1
    y.detach().mul_(2)
    return y.sin()


def out_argument(x):
    y = x + 0
    torch.mul(x, 2, out=y)
    return y.sin()


@pytest.mark.parametrize("fn", [random_write, through_as_strided, metadata, grad_mode, detached, out_argument])
def test_what_cannot_be_proved_stays_in_place(fn):
    x = torch.randn(4, 4, requires_grad=fn in (grad_mode, detached))
    torch.manual_seed(1)
    result, graph, frozen = functional(fn, x)
    assert frozen and writes(graph)
    torch.manual_seed(1)
    assert torch.equal(result, fn(x))
    if x.requires_grad:
        assert torch.equal(*(torch.autograd.grad(r.sum(), x)[0] for r in (result, fn(x))))


def test_batch_norm_in_training_updates_its_statistics():
    def fn(x, mean, var):
        y = F.batch_norm(x, mean, var, training=True)
        mean.mul_(2)
        return y + mean

    x, mean, var = torch.randn(8, 3), torch.zeros(3), torch.ones(3)
    ours, eager = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    result, graph, frozen = functional(fn, x, *ours)
    assert frozen and torch.equal(result, fn(x, *eager))
    assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])


def test_gradients_pass_through_what_was_written():
    def fn(x, w):
        y = x * w
        y[1:].mul_(w[1:])
        y.t().add_(1)
        return y.sin()

    x, w = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    result, graph, frozen = functional(fn, x, w)
    assert not frozen and not writes(graph)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), w), torch.autograd.grad(fn(x, w).sum(), w))
