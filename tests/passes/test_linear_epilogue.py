"""What stands behind a linear is computed in its epilogue, as far as it is the linear's alone; the rest stays, with the reason."""
import pytest
import torch
import torch.nn.functional as F

K, N = 24, 40

CHAINS = {
    "gelu": F.gelu, "relu of a scale": lambda y: F.relu(0.3 * y), "softcap": lambda y: 30 * torch.tanh(y / 30), "silu and a square": lambda y: F.silu(y).square(),
    "gelu new": lambda y: 0.5 * y * (1 + torch.tanh(0.79788 * (y + 0.044715 * y.pow(3)))), "clamp": lambda y: y.clamp(-1, 2) + 1, "a where": lambda y: torch.where(y > 0, y, 0.1 * y),
}


def operands(dtype=torch.float32):
    return torch.randn(2, 5, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


@pytest.mark.parametrize("chain", CHAINS)
def test_pointwise_chains(rewriting, chain):
    rewriting.check(lambda x, w, b: CHAINS[chain](F.linear(x, w, b)), *operands(), count={"linear_epilogue": 1, "linear": 0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_layer_scale_and_a_row_factor(rewriting, dtype):
    def fn(x, w, b, residual, scale, rows):
        return residual + F.linear(x, w, b) * scale * rows

    x, w, b = operands(dtype)
    report = rewriting.check(fn, x, w, b, torch.randn(2, 5, N).to(dtype), torch.randn(N).to(dtype), torch.randn(2, 5, 1).to(dtype), count={"linear_epilogue": 1})
    (call,) = [n for n in report.graphs[0].graph.nodes if n.target is torch.ops.tileweld.linear.default]
    assert call.args[7] == ["c3[i, j] + (a0 + c0[j])*c1[j]*c2[i]"]


def test_a_residual_that_is_transposed_or_broadcast(rewriting):
    x, w, b = operands()
    rewriting.check(lambda x, w, r: F.linear(x, w) + r.mT, x, w, torch.randn(2, N, 5), count={"linear_epilogue": 1})
    rewriting.check(lambda x, w, r: F.linear(x, w) + r[:, None], x, w, torch.randn(2, N), count={"linear_epilogue": 1})


def test_every_spelling_of_the_product(rewriting):
    x, w, b = operands()
    weight = torch.nn.Parameter(w)
    rewriting.check(lambda x, w, b: torch.addmm(b, x.view(-1, K), w).view(2, 5, N).relu(), x, w.T.contiguous(), b, count={"linear_epilogue": 1})
    rewriting.check(lambda x, b: F.relu(x @ weight.T + b), x, b, count={"linear_epilogue": 1})
    rewriting.check(lambda x, b: F.relu(x @ weight[:, :K].t() + b), x, b, count={"linear_epilogue": 1})
    transposed = torch.nn.Parameter(w.T.contiguous())
    rewriting.check(lambda x: torch.tanh(x @ transposed), x, count={"linear_epilogue": 1})


def test_dynamic_rows_and_gradients(rewriting):
    x, w, b = operands()
    layer = torch.nn.Linear(K, N)
    rewriting.check(lambda x, r: r + F.gelu(layer(x)), x, torch.randn(2, 5, N), count={"linear_epilogue": 1}, dynamic=True)
    rewriting.check_gradients(lambda x, w, b, r: r + F.gelu(F.linear(x, w, b)), x, w, b, torch.randn(2, 5, N), count={"linear_epilogue": 1})


def test_the_chain_ends_where_rows_meet(rewriting):
    report = rewriting.check(lambda x, w, b: torch.softmax(F.relu(F.linear(x, w, b)) * 2, -1), *operands(), count={"linear_epilogue": 1})
    assert "relu" in next(f.detail for f in report.fusions if f.rewrite == "linear_epilogue")


# ---------------------------------------------------------------- what must stay


def test_a_hidden_state_that_is_returned_is_refused(rewriting):
    def fn(x, w, b):
        y = F.linear(x, w, b)
        return F.gelu(y), y

    rewriting.refused("linear_epilogue", fn, *operands(), reason="also used elsewhere, by the graph's output")


@pytest.mark.parametrize("fn", [
    lambda x, w, b: F.dropout(F.linear(x, w, b), 0.5, True),
    lambda x, w, b: F.linear(x, w, b).sum(-1),
    lambda x, w, b: F.linear(x, w, b).cumsum(-1),
    lambda x, w, b: F.linear(x, w, b).to(torch.int32),
    lambda x, w, b: F.linear(x, w, b).to(torch.bfloat16),
    lambda x, w, b: F.linear(x, w, b).double(),
    lambda x, w, b: F.linear(x, w, b)[:, -1:],
    lambda x, w, b: F.linear(x, w, b).expand(3, 2, 5, N),
], ids=["dropout", "sum", "cumsum", "integers", "narrow", "wide", "last row", "expand"])
def test_what_is_no_epilogue(rewriting, fn):
    rewriting.silent("linear_epilogue", fn, *operands())


def test_the_last_row_alone_is_cut_before_the_softcap(rewriting):
    rewriting.silent("linear_epilogue", lambda x, w, b: torch.tanh(F.linear(x, w, b)[:, -1]), *operands())


def test_a_chain_that_reads_one_row_in_another_is_left_alone(rewriting):
    rewriting.refused("linear_epilogue", lambda x, w, b: (lambda y: y * y.flip(1))(F.linear(x, w, b)), *operands(), reason="used elsewhere, by flip")


def test_a_write_in_between_is_seen(rewriting):
    """The residual is written after the linear and before the sum: functionalised, or not fused; the result is eager's either way."""
    def fn(x, w, b, r):
        r = r.clone()
        y = F.linear(x, w, b)
        before = r + 1
        r.mul_(2)
        return y + r, before

    rewriting.check(fn, *operands(), torch.randn(2, 5, N), count={})


def test_a_written_input_between_product_and_sum(rewriting):
    def fn(x, w, b, r):
        y = F.linear(x, w, b)
        r.mul_(2)
        return y + r

    inputs = (*operands(), torch.randn(2, 5, N))
    expected = fn(*(t.clone() for t in inputs))
    got, _ = rewriting.rewritten(fn, *(t.clone() for t in inputs))
    torch.testing.assert_close(got, expected)


def test_gradients_stop_where_the_model_stops_them(rewriting):
    """The linear under no_grad, the activation outside: one op would differentiate both or neither."""
    def fn(x, w, s):
        with torch.no_grad():
            y = F.linear(x, w)
        return torch.tanh(y * s)

    x, w, _ = operands()
    w, s = w.requires_grad_(), torch.randn(N, requires_grad=True)
    got, report = rewriting.rewritten(fn, x, w, s, grad=True)
    grads = torch.autograd.grad(got.sum(), (w, s), allow_unused=True)
    assert grads[0] is None and grads[1] is not None and report.counts["linear_epilogue"] == 0
