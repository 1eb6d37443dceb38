"""Products written as einsums: with a weight they are linears as any other, in every orientation; other einsums stay."""
import pytest
import torch
from tileweld.compiler.explain import explain as rewritten
from torch import nn

aten = torch.ops.aten
B, T, D, H, K = 2, 5, 16, 4, 6


def weight(*sizes):
    return nn.Parameter(torch.randn(sizes, generator=torch.Generator().manual_seed(1)))


LINEARS = {
    "a matrix": ("btd,df->btf", (B, T, D), weight(D, 7)),
    "a transposed matrix": ("btd,fd->btf", (B, T, D), weight(7, D)),
    "into heads": ("btd,dhk->bthk", (B, T, D), weight(D, H, K)),
    "into heads, heads first": ("btd,dhk->bhtk", (B, T, D), weight(D, H, K)),
    "into heads, stored so": ("btd,hkd->bthk", (B, T, D), weight(H, K, D)),
    "out of heads": ("bthk,hkd->btd", (B, T, H, K), weight(H, K, D)),
    "out of heads, the other order": ("ibnd,hnd->ibh", (T, B, H, K), weight(D, H, K)),
    "heads before positions": ("bhtk,hkd->btd", (B, H, T, K), weight(H, K, D)),
    "an ellipsis": ("...d,df->...f", (B, T, D), weight(D, 7)),
    "no output": ("btd,df", (B, T, D), weight(D, 7)),
    "the positions last": ("bdt,df->bft", (B, D, T), weight(D, 7)),
}


def written(equation, w, turned):
    terms, arrow, output = equation.partition("->")
    if turned:  # the weight first
        return lambda x: torch.einsum(",".join(terms.split(",")[::-1]) + arrow + output, w, x) * 2
    return lambda x: torch.einsum(equation, x, w) * 2


def linears(report):
    return sum(report.counts[name] for name in ("linear", "linear_epilogue"))


@pytest.mark.parametrize("case", LINEARS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_with_a_weight_is_a_linear(case, turned, compare):
    equation, sizes, w = LINEARS[case]
    report = compare(written(equation, w, turned), torch.randn(sizes), strict=True)
    assert linears(rewritten(written(equation, w, turned), torch.randn(sizes))) == 1
    assert not any(n.target is aten.einsum.default for gm in report.graphs for n in gm.graph.nodes)


@pytest.mark.parametrize("case", ["into heads, heads first", "out of heads, the other order"])
def test_the_batch_may_be_symbolic_and_gradients_are_kept(case):
    equation, sizes, w = LINEARS[case]
    run = torch.compile(written(equation, w, False), backend="tileweld", dynamic=True, options={"target": "reference", "strict": True})
    for batch in (sizes[0], sizes[0] + 3):
        x = torch.randn(batch, *sizes[1:], requires_grad=True)
        eager, ours = (torch.autograd.grad(f(x).square().sum(), (x, w)) for f in (written(equation, w, False), run))
        for a, b in zip(eager, ours):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * a.abs().max().item())


OTHERS = {
    "a matrix a head": ("bthd,hdk->bthk", (B, T, H, D), weight(H, D, K)),
    "summed dims apart": ("bthk,hdk->btd", (B, T, H, K), weight(H, D, K)),
    "a dim of one element": ("btd,df->btf", (B, T, 1), weight(D, 7)),
    "a diagonal": ("btt,tf->bf", (B, T, T), weight(T, 7)),
    "a sum of x alone": ("btd,df->bf", (B, T, D), weight(D, 7)),
    "a sum of the weight alone": ("btd,df->btd", (B, T, D), weight(D, 7)),
    "an outer product": ("bt,df->btdf", (B, T), weight(D, 7)),
    "a vector": ("btd,d->bt", (B, T, D), weight(D)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_einsums_stay(case, compare):
    equation, sizes, w = OTHERS[case]
    (gm,) = compare(written(equation, w, False), torch.randn(sizes)).graphs
    assert [n for n in gm.graph.nodes if n.target is aten.einsum.default]


def test_two_activations_and_two_weights_stay(compare):
    a, b = weight(D, D), weight(D, 7)
    for f in (lambda x: torch.einsum("btd,bsd->bts", x, x.tanh()), lambda x: x @ torch.einsum("de,ef->df", a, b)):
        (gm,) = compare(f, torch.randn(B, T, D)).graphs
        assert [n for n in gm.graph.nodes if n.target is aten.einsum.default]


def test_one_operand_is_a_permutation(compare):
    (gm,) = compare(lambda x: torch.einsum("ijb->bij", x) + 1, torch.randn(T, T, B)).graphs
    assert [n for n in gm.graph.nodes if n.target is aten.permute.default] and not [n for n in gm.graph.nodes if n.target is aten.einsum.default]
    (gm,) = compare(lambda x: torch.einsum("ijb->bi", x) + 1, torch.randn(T, T, B)).graphs
    assert [n for n in gm.graph.nodes if n.target is aten.einsum.default]
