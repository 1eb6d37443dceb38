"""Every product with a weight becomes the op; products of activations and what has no plain operands do not."""
import pytest
import torch
import torch.nn.functional as F

K, N = 24, 40
OP = torch.ops.tileweld.linear.default


def operands():
    return torch.randn(2, 5, K), torch.randn(N, K), torch.randn(N)


def test_with_and_without_a_bias(rewriting):
    x, w, b = operands()
    for fn, inputs, epilogue in ((F.linear, (x, w), "a0"), (F.linear, (x, w, b), "a0 + c0[j]"), (torch.addmm, (b, x[0], w.T.contiguous()), "a0 + c0[j]")):
        report = rewriting.check(fn, *inputs, count={"linear": 1})
        (call,) = [n for n in report.graphs[0].graph.nodes if n.target is OP]
        assert call.args[7] == [epilogue]


def test_a_result_that_is_read_twice_is_a_linear_all_the_same(rewriting):
    rewriting.check(lambda x, w: (lambda y: (y.sum(), y.cumsum(-1)))(F.linear(x, w)), *operands()[:2], count={"linear": 1})


def test_views_casts_and_slices_of_a_weight(rewriting):
    x, w, _ = operands()
    weight = torch.nn.Parameter(torch.cat([w, w]))
    rewriting.check(lambda x: F.linear(x, weight[N:]), x, count={"linear": 1})
    rewriting.check(lambda x: x.bfloat16() @ weight.to(torch.bfloat16).T, x, count={"linear": 1}, tolerance=1e-2)


def test_no_rows_no_width_and_dynamic_rows(rewriting):
    layer = torch.nn.Linear(K, N)
    rewriting.check(lambda x: layer(x), torch.randn(0, 5, K), count={"linear": 1})
    rewriting.check(lambda x: layer(x), torch.randn(3, 5, K), count={"linear": 1}, dynamic=True)
    rewriting.check(F.linear, torch.randn(3, 0), torch.randn(N, 0), count={"linear": 1})


def test_an_output_keeps_its_strides(rewriting):
    x, w, b = operands()
    got, _ = rewriting.rewritten(F.linear, x, w, b)
    assert got.stride() == F.linear(x, w, b).stride()


@pytest.mark.parametrize("fn", [lambda q, k: q @ k.mT, lambda q, k: torch.einsum("btd,bsd->bts", q, k), lambda q, k: q[0] @ k[0].T, lambda q, k: torch.bmm(q, k.mT)])
def test_products_of_activations_are_none(rewriting, fn):
    rewriting.silent("linear", fn, torch.randn(2, 5, K), torch.randn(2, 7, K))


def test_a_weight_that_the_graph_computes_is_refused(rewriting):
    rewriting.refused("linear", lambda x, w, v: F.linear(x, w * v), *operands()[:2], torch.randn(N, K), reason="its weight is computed in the graph")


def test_a_weight_a_batch_element_is_refused(rewriting):
    weight = torch.nn.Parameter(torch.randn(2, K, N))
    rewriting.refused("linear", lambda x: x @ weight, torch.randn(2, 5, K), reason="one matrix a batch element")


def test_integers_are_refused(rewriting):
    rewriting.refused("linear", lambda x, w: torch.addmm(w[:, 0], x, w.T), torch.randint(9, (5, K)), torch.randint(9, (N, K)), reason="expected a float dtype")


def test_autocast_inside_and_around(rewriting):
    def inside(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w)

    x, w, _ = operands()
    got, report = rewriting.rewritten(inside, x, w)
    assert got.dtype == torch.bfloat16 and report.counts["linear"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        got, report = rewriting.rewritten(F.linear, x, w)
    assert got.dtype == torch.bfloat16 and report.counts["linear"] == 1
