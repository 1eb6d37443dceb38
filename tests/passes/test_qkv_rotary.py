"""Linears of one x become one op, with rotary in its epilogue in every form; what would be wrong or wasteful is left alone."""
import pytest
import torch
import torch.nn.functional as F
from tileweld import models
from tileweld.compiler.tiny import tiny_inputs, tiny_model

B, T, HEADS, KV, D, WIDTH = 2, 6, 4, 2, 16, 24
OP = torch.ops.tileweld.linear.default


def tables(width=D, length=T):
    angle = torch.outer(torch.arange(length).float(), 100.0 ** -torch.linspace(0, 1, width // 2))
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def rotate_half(x):
    return torch.cat([-x[..., x.shape[-1] // 2:], x[..., : x.shape[-1] // 2]], -1)


def half_split(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def every_two(x, cos, sin):
    """GPT-J: the angle of a pair stands twice, side by side."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos[..., : x.shape[-1] // 2].repeat_interleave(2, -1) + turned * sin[..., : x.shape[-1] // 2].repeat_interleave(2, -1)


def partial(rotate, width):
    return lambda x, cos, sin: torch.cat([rotate(x[..., :width], cos[..., :width], sin[..., :width]), x[..., width:]], -1)


def scaled(x, cos, sin):
    """YaRN: cos and sin carry the attention scaling."""
    return half_split(x, cos * 1.2, sin * 1.2)


FORMS = {"half-split": half_split, "halves": halves, "interleaved": interleaved, "every two": every_two, "partial": partial(half_split, 8), "partial halves": partial(halves, 4), "scaled": scaled}


def heads(y, n):
    return y.view(*y.shape[:-1], n, D).transpose(-2, -3)


def qkv(rotate):
    def fn(x, wq, wk, wv, cos, sin):
        q, k, v = heads(F.linear(x, wq), HEADS), heads(F.linear(x, wk), KV), heads(F.linear(x, wv), KV)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    return fn


def operands(dtype=torch.float32, batch=B):
    x = torch.randn(batch, T, WIDTH).to(dtype)
    return (x, *(torch.randn(n * D, WIDTH).to(dtype) for n in (HEADS, KV, KV)), *(t.to(dtype) for t in tables()))


class Held(torch.nn.Module):
    """fn with its weights as parameters: their shapes are static, those of x need not be."""

    def __init__(self, fn, *weights):
        super().__init__()
        self.fn, self.weights = fn, torch.nn.ParameterList(weights)

    def forward(self, x, *rest):
        return self.fn(x, *iter(self.weights), *rest)


def pairs(report):
    (call,) = [n for n in report.graphs[0].graph.nodes if n.target is OP]
    return list(zip(call.args[8][::2], call.args[8][1::2]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rotary(rewriting, form):
    report = rewriting.check(qkv(FORMS[form]), *operands(), count={"qkv_rotary": 1, "linear": 0})
    expected = {"interleaved": (2, 1), "every two": (2, 1), "partial": (D, 4), "partial halves": (D, 2)}.get(form, (D, D // 2))
    assert pairs(report) == [expected, expected, (0, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_no_worse_than_eager(rewriting, dtype):
    rewriting.check(qkv(half_split), *operands(dtype), count={"qkv_rotary": 1})


@pytest.mark.parametrize("view", [lambda t: t[None, None], lambda t: t[None], lambda t: t.expand(B, 1, T, D), lambda t: t[None, None].expand(B, HEADS, T, D)], ids=["11td", "1td", "b1td", "bhtd"])
def test_layouts_of_the_tables(rewriting, view):
    def fn(x, wq, wk, wv, cos, sin):
        return half_split(heads(F.linear(x, wq), HEADS), view(cos), view(sin)), heads(F.linear(x, wk), KV), heads(F.linear(x, wv), KV)

    report = rewriting.check(fn, *operands(), count={"qkv_rotary": 1})
    assert pairs(report)[0] == (D, D // 2)


def test_tables_that_differ_between_batch_elements(rewriting):
    cos, sin = torch.randn(B, T, D), torch.randn(B, T, D)
    rewriting.check(lambda x, a, b, c, cos, sin: qkv(half_split)(x, a, b, c, cos[:, None], sin[:, None]), *operands()[:4], cos, sin, count={"qkv_rotary": 1})


def test_biases_packed_and_dynamic(rewriting):
    def packed(x, w, bias, cos, sin):
        q, k, v = F.linear(x, w, bias).split([HEADS * D, KV * D, KV * D], -1)
        return half_split(heads(q, HEADS), cos, sin), half_split(heads(k, KV), cos, sin), heads(v, KV)

    n = (HEADS + 2 * KV) * D
    model = Held(packed, torch.randn(n, WIDTH), torch.randn(n))
    for dynamic in (None, True):
        report = rewriting.check(model, torch.randn(B, T, WIDTH), *tables(), count={"qkv_rotary": 1, "linear": 0}, dynamic=dynamic)
        assert pairs(report) == [(D, D // 2), (D, D // 2), (0, 0)]
    rewriting.check(qkv(half_split), *operands(batch=1), count={"qkv_rotary": 1})


def test_gradients(rewriting):
    for form in ("half-split", "interleaved", "partial"):
        rewriting.check_gradients(qkv(FORMS[form]), *operands(), count={"qkv_rotary": 1})


@pytest.mark.parametrize(("name", "count", "rotary"), [("llama", 2, True), ("qwen2", 2, True), ("phi3", 2, True), ("gemma2", 2, True), ("gpt2", 2, False), ("bert", 2, False), ("gpt_neox", 2, True), ("falcon", 2, True), ("bloom", 0, False)])
def test_hugging_face(rewriting, name, count, rotary):
    """gpt_neox and bloom pack q, k and v head by head: one output, without rotary simply one linear."""
    model = tiny_model(name)
    inputs = tiny_inputs(model)
    report = rewriting.check(lambda ids: model(input_ids=ids).logits, inputs["input_ids"], count={"qkv_rotary": count})
    assert all(("rotary on 2 of 3" in f.detail) == rotary for f in report.fusions if f.rewrite == "qkv_rotary")


@pytest.mark.parametrize("name", ["llama_gqa", "annotated_mha"])
def test_models(rewriting, name):
    module = models.load(name)
    rewriting.check(module.build(), *module.example_inputs(2, 9), count={"qkv_rotary": 2 if name == "llama_gqa" else 3})


# ---------------------------------------------------------------- what must stay


def test_a_raw_q_that_is_returned_keeps_its_rotary_outside(rewriting):
    def fn(x, wq, wk, cos, sin):
        q = heads(F.linear(x, wq), HEADS)
        return half_split(q, cos, sin), q, half_split(heads(F.linear(x, wk), KV), cos, sin)

    x, wq, wk, _, cos, sin = operands()
    report = rewriting.check(fn, x, wq, wk, cos, sin, count={"qkv_rotary": 1})
    assert pairs(report) == [(0, 0), (D, D // 2)]


def test_a_norm_of_q_keeps_rotary_outside(rewriting):
    def fn(x, wq, wk, wv, cos, sin):
        q, k = (F.rms_norm(heads(F.linear(x, w), n), (D,)) for w, n in ((wq, HEADS), (wk, KV)))
        return half_split(q, cos, sin), half_split(k, cos, sin), F.linear(x, wv)

    report = rewriting.check(fn, *operands(), count={"qkv_rotary": 1})
    assert pairs(report) == [(0, 0)] * 3 and "no rotary" in next(f.detail for f in report.fusions if f.rewrite == "qkv_rotary")


def test_a_single_linear_and_other_rows_are_not_merged(rewriting):
    x, wq, wk, *_ = operands()
    rewriting.silent("qkv_rotary", lambda x, w: F.linear(x, w), x, wq)
    rewriting.silent("qkv_rotary", lambda x, a, b: (F.linear(x, a), F.linear(x * 2, b)), x, wq, wk)


def test_keys_of_later_layers_are_not_computed_at_once(rewriting):
    """Cross-attention: every decoder layer reads the encoder's output."""
    def fn(memory, wk, wv, x, w):
        for _ in range(2):
            x = x + F.linear(torch.relu(x), w) + F.linear(memory, wk).sum() + F.linear(memory, wv).sum()
        return x

    x, _, wk, wv, *_ = operands()
    rewriting.check(fn, x, wk, wv, torch.randn(B, T, WIDTH), torch.randn(WIDTH, WIDTH), count={"qkv_rotary": 1})


def test_an_output_that_another_is_computed_from_is_no_cycle(rewriting):
    """The second stream reads the first one's result: both linears are merged without it."""
    def fn(x, a, b):
        first = torch.tanh(F.linear(x, a)).flip(-1).cumsum(-1)
        return F.linear(x, b) + first

    x, _, wk, wv, *_ = operands()
    rewriting.check(fn, x, wk, wv, count={"qkv_rotary": 1})


def test_a_scaled_weight_of_another_dtype_is_not_merged(rewriting):
    def fn(x, wq, wk):
        return F.linear(x, wq), F.linear(x.bfloat16(), wk).float()

    x, wq, wk, *_ = operands()
    _, report = rewriting.rewritten(fn, x, wq, wk.bfloat16())
    assert report.counts["qkv_rotary"] == 0
