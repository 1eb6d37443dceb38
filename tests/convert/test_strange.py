"""to_gqa on models that are built in other ways than Llama: converted exactly where their heads are redundant, refused in words that name what stands in the way otherwise."""
import pytest
import torch
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from torch import nn

IDS = torch.randint(31, (4, 8), generator=torch.Generator().manual_seed(1))
HEADS, KV, D, HIDDEN = 4, 4, 6, 20


class Conv1D(nn.Module):
    """A linear layer with its weight [K, N], as transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.3), nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Attention(nn.Module):
    """layout: "apart" (three layers), "stacked" ([q, k, v]), "packed" (by KV head), "shared" (keys are the values), "keys and values" (one layer for both)."""

    def __init__(self, layout, linear, nested=False):
        super().__init__()
        make = {"linear": lambda n, k: nn.Linear(k, n), "conv": Conv1D}[linear]
        self.layout, self.n_heads, self.n_kv_heads = layout, HEADS, KV
        self.inner = nn.Module() if nested else None
        sizes = {"apart": {"asks": HEADS * D, "offers": KV * D, "gives": KV * D}, "stacked": {"everything": (HEADS + 2 * KV) * D}, "packed": {"everything": (HEADS + 2 * KV) * D},
                 "shared": {"asks": HEADS * D, "offers": KV * D}, "keys and values": {"asks": HEADS * D, "offers": 2 * KV * D}}[layout]
        for name, n in sizes.items():
            setattr(self.where, name, make(n, HIDDEN))
        self.back = make(HIDDEN, HEADS * D)

    @property
    def where(self):
        return self.inner or self

    def forward(self, x):
        w, h, g = self.where, self.n_heads, self.n_kv_heads
        if self.layout == "stacked":
            q, k, v = w.everything(x).split([h * D, g * D, g * D], -1)
        elif self.layout == "packed":
            q, k, v = (t.flatten(-2) for t in w.everything(x).unflatten(-1, (g, -1)).split([h // g * D, D, D], -1))
        elif self.layout == "keys and values":
            q, (k, v) = w.asks(x), w.offers(x).chunk(2, -1)
        else:
            q, k = w.asks(x), w.offers(x)
            v = k if self.layout == "shared" else w.gives(x)
        q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(h // g, 1) for t in (k, v))
        return self.back((q @ k.mT / D**0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, layout="apart", linear="linear", nested=False, post=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.post = nn.Embedding(31, HIDDEN), post
        self.blocks = nn.ModuleList(Attention(layout, linear, nested) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.double().eval()

    def forward(self, ids):
        x = self.embed(ids)
        for block, norm in zip(self.blocks, self.norms):
            x = norm(x + block(x)) if self.post else x + block(norm(x))
        return x


def rows_of(block, layout):
    """Rows of keys and of values, [KV, D] each, and the layers they are of."""
    w, n = block.where, torch.arange(KV * D).view(KV, D)
    if layout == "apart":
        return (w.offers, n), (w.gives, n)
    if layout == "stacked":
        return (w.everything, HEADS * D + n), (w.everything, (HEADS + KV) * D + n)
    size = (HEADS // KV + 2) * D
    start = torch.arange(KV)[:, None] * size + torch.arange(D)
    return (w.everything, start + size - 2 * D), (w.everything, start + size - D)


def twins(model, layout):
    """Heads 0, 1 and 2, 3 become one up to a random basis."""
    g = torch.Generator().manual_seed(0)
    for block in model.blocks:
        for linear, rows in rows_of(block, layout):
            weight = linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T
            for a, b in ((0, 1), (2, 3)):
                turn = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0] * 1.5
                weight[rows[b]] = turn @ weight[rows[a]]
                linear.bias.data[rows[b]] = turn @ linear.bias.data[rows[a]]
    return model


@pytest.mark.parametrize("calibration", [None, IDS])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("linear", ["linear", "conv"])
@pytest.mark.parametrize("layout", ["apart", "stacked", "packed"])
def test_redundant_heads_are_merged_exactly_whatever_the_layout(layout, linear, nested, post, calibration):
    model = twins(Model(layout, linear, nested, post), layout)
    with torch.no_grad():
        expected = model(IDS)
        report = convert.to_gqa(model, 2, calibration)
        assert (model(IDS) - expected).norm() <= 1e-9 * expected.norm(), float((model(IDS) - expected).norm() / expected.norm())
    assert [(x.name, x.kv_heads_after, x.groups) for x in report.layers] == [(f"blocks.{n}", 2, ((0, 1), (2, 3))) for n in range(2)] and max(x.residual for x in report.layers) < 1e-6
    assert all(block.n_kv_heads == 2 for block in model.blocks)


REFUSED = {
    "shared": "one linear layer makes two of its queries, keys and values: shared KV", "keys and values": "one linear layer makes two of its queries, keys and values: shared KV",
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_are_refused(layout):
    model = Model(layout)
    state = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ConversionError, match=REFUSED[layout]) as caught:
        convert.to_gqa(model, 2, IDS)
    assert caught.value.where == "blocks.0" and "one linear layer each, or one for all three" in caught.value.cure
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "neox", "bert"])
def test_models_whose_code_has_no_fewer_kv_heads(name):
    """They are told what would do: merging in the compiled graph."""
    transformers = pytest.importorskip("transformers")
    small = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=31)
    model, where = {
        "gpt2": lambda: (transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)), "transformer.h.0.attn"),
        "neox": lambda: (transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(intermediate_size=24, **small)), "gpt_neox.layers.0.attention"),
        "bert": lambda: (transformers.BertModel(transformers.BertConfig(intermediate_size=24, **small)), "encoder.layer.0.attention"),
    }[name]()
    with pytest.raises(ConversionError, match="gives every query head a KV head of its own.*options={'gqa': G}") as caught:
        convert.to_gqa(model.eval(), 2, IDS)
    assert caught.value.where == where


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_and_that_does(name):
    import tileweld
    transformers = pytest.importorskip("transformers")
    model = {"gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)),
             "bert": lambda: transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=31, intermediate_size=24))}[name]().eval()
    with torch.no_grad():
        report = tileweld.explain(lambda ids: model(ids, use_cache=False)[0], IDS, options={"gqa": 2, "target": "reference"})
    assert report.counts["mha_to_gqa"] == 1, [r.reason for r in report.refusals]
