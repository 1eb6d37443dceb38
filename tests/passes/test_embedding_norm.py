"""Embeddings, their sum and its norm become one op; the padding row keeps its zero gradient, a bad index raises."""
import pytest
import torch
import torch.nn.functional as F

COUNT = {"embedding_norm": 1}
D = 16


class Bert(torch.nn.Module):
    def __init__(self, kind="layer", residual=False):
        super().__init__()
        self.words, self.types, self.positions = torch.nn.Embedding(11, D, padding_idx=0), torch.nn.Embedding(2, D), torch.nn.Embedding(9, D)
        self.norm = torch.nn.LayerNorm(D) if kind == "layer" else torch.nn.RMSNorm(D, eps=1e-5)
        self.residual = residual

    def forward(self, tokens, types):
        s = self.words(tokens) + self.types(types) + self.positions(torch.arange(tokens.shape[1]))
        y = torch.sin(self.norm(s))
        return (y, s) if self.residual else y


class Gemma(torch.nn.Module):
    def __init__(self, is_tensor):
        super().__init__()
        self.words, self.norm = torch.nn.Embedding(11, D), torch.nn.RMSNorm(D, eps=1e-6)
        self.register_buffer("scale", torch.tensor(D**0.5))
        self.is_tensor = is_tensor

    def forward(self, tokens, types):
        s = self.words(tokens) * (self.scale.to(self.words.weight.dtype) if self.is_tensor else D**0.5)
        return torch.sin(self.norm(s)), s


class Learned(torch.nn.Module):
    """Positions are rows of a parameter, added first; the words are read twice."""

    def __init__(self):
        super().__init__()
        self.words, self.rows, self.norm = torch.nn.Embedding(11, D), torch.nn.Parameter(torch.randn(9, D)), torch.nn.LayerNorm(D, bias=False)

    def forward(self, tokens, types):
        return torch.sin(self.norm(self.rows[:tokens.shape[1]] + self.words(tokens)))


MODELS = {
    "bert": (lambda: Bert(), "3 of 3 terms gathered, layer norm"),
    "rms": (lambda: Bert("rms"), "3 of 3 terms gathered, rms norm"),
    "residual": (lambda: Bert(residual=True), "3 of 3 terms gathered, layer norm, the sum is used elsewhere"),
    "scaled": (lambda: Gemma(False), "1 of 1 terms gathered, rms norm, the sum is used elsewhere"),
    "scaled by a tensor": (lambda: Gemma(True), "1 of 1 terms gathered, rms norm, the sum is used elsewhere"),
    "learned rows": (lambda: Learned(), "1 of 2 terms gathered, layer norm"),
}


def tokens(length=5):
    return torch.randint(0, 11, (2, length)), torch.randint(0, 2, (2, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_become_one_op(name, dtype, rewriting):
    build, detail = MODELS[name]
    report = rewriting.check(build().to(dtype), *tokens(), count={**COUNT, "add_rms_norm": 0, "add_layer_norm": 0}, tolerance=1e-5 if dtype == torch.float32 else 1e-2)
    assert not report.refusals and [f.detail for f in report.fusions if f.rewrite == "embedding_norm"] == [detail]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_dynamic_shapes(name, rewriting):
    model = MODELS[name][0]()
    rewriting.check_gradients(model, *tokens(), count=COUNT)
    rewriting.check(model, *tokens(), count=COUNT, dynamic=True)


def test_the_sum_in_half_precision_is_eagers_bit_for_bit(rewriting):
    model = Bert(residual=True).bfloat16()
    inputs = tokens()
    (_, s), report = rewriting.rewritten(model, *inputs)
    assert report.counts["embedding_norm"] == 1 and torch.equal(s, model(*inputs)[1])


def test_the_padding_row_has_no_gradient():
    model = Bert()
    ids, types = torch.tensor([[0, 1, 2, 0, 3]]), torch.zeros(1, 5, dtype=torch.int64)
    torch.compile(model, backend="tileweld")(ids, types).square().sum().backward()
    assert not model.words.weight.grad[0].any() and model.words.weight.grad[1].any()


@pytest.mark.parametrize("position", [11, -1])
def test_an_index_out_of_range_raises_as_eager(position):
    model, (ids, types) = Bert(), tokens()
    compiled = torch.compile(model, backend="tileweld")
    with torch.no_grad():
        compiled(ids, types)
        ids[1, 2] = position
        for f in (model, compiled):
            with pytest.raises(IndexError):
                f(ids, types)


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_other_gradients_are_refused(option, rewriting):
    def fn(ids, weight):
        return F.layer_norm(F.embedding(ids, weight, **{option: True}), (D,))

    rewriting.refused("embedding_norm", fn, tokens()[0], torch.randn(11, D), reason=f"the embedding has {option}")


@pytest.mark.parametrize("fn", [
    lambda ids, w: F.embedding(ids, w) + 1,
    lambda ids, w: F.layer_norm(torch.sin(F.embedding(ids, w)), (D,)),
    lambda ids, w: F.layer_norm(F.embedding(ids, w), (5, D)),
    lambda ids, w: F.layer_norm(torch.add(F.embedding(ids, w), w[0], alpha=2), (D,)),
])
def test_what_is_no_embedding_norm_is_left(fn, rewriting):
    rewriting.silent("embedding_norm", fn, tokens()[0], torch.randn(11, D))
