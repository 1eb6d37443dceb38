"""torch's fused encoder calls are captured as what they stand for: equal to eager, fused, and left alone where they cannot be read."""
import pytest
import torch
from tileweld.compiler import fast_paths
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from torch import nn

B, T, D, H = 2, 10, 32, 4


def masks(kind):
    padding = torch.arange(T) >= torch.tensor([[T], [6]])
    causal = nn.Transformer.generate_square_subsequent_mask(T)
    return {"none": {}, "padding": {"src_key_padding_mask": padding}, "causal": {"src_mask": causal}, "both": {"src_mask": causal, "src_key_padding_mask": padding.float().masked_fill(padding, -torch.inf)},
            "a bias": {"src_mask": torch.eye(T).roll(1, 0)}, "nothing seen": {"src_key_padding_mask": torch.arange(T) >= torch.tensor([[T], [0]])}}[kind]


def layer(**given):
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(D, H, 64, **{"batch_first": True, **given}).eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize("given", [{}, {"norm_first": True, "activation": "gelu"}], ids=["post-norm relu", "pre-norm gelu"])
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "both", "a bias", "nothing seen"])
def test_an_encoder_layer_in_inference_is_fused_and_equal(kind, given):
    model, report, x = layer(**given), Report(), torch.randn(B, T, D)
    run = torch.compile(model, backend=lambda gm, inputs: tileweld(gm, inputs, options={"target": "reference"}, report=report), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x, **masks(kind)), model(x, **masks(kind)), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert report.counts["attention"] == 1 and report.counts["linear_epilogue"] >= 2
    assert [(s.seen, s.fused) for s in report.softmaxes] == [(1, 1)]


@pytest.mark.parametrize("mask_type", [0, 1, 2])
def test_self_attention_equals_the_call(mask_type):
    x, w, b, o, ob = (torch.randn(s) for s in ((B, T, D), (3 * D, D), (3 * D,), (D, D), (D,)))
    mask = torch.rand({0: (T, T), 1: (B, T), 2: (B, H, T, T)}[mask_type]) > 0.7
    with torch.no_grad():
        expected = torch._native_multi_head_attention(x, x, x, D, H, w, b, o, ob, mask, False, True, mask_type)[0]
    got, weights = fast_paths.PARTS[torch._native_multi_head_attention](x, x, x, D, H, w, b, o, ob, mask, False, True, mask_type)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert weights is None


def test_what_is_read_otherwise_stays_one_call():
    x, w, b, o, ob = (torch.randn(s) for s in ((B, T, D), (3 * D, D), (3 * D,), (D, D), (D,)))
    call = fast_paths.PARTS[torch._native_multi_head_attention]
    assert call(x, x.clone(), x, D, H, w, b, o, ob, None, False) is NotImplemented  # another tensor of keys
    assert call(x, x, x, D, H, w, b, o, ob, None, True) is NotImplemented  # the weights are wanted
    assert call(x, x, x, D, H, w, b, o, ob, torch.zeros(T, T), False) is NotImplemented  # the mask's type is not said
    assert call(x, x, x, D, H, w, b, o, ob, torch.zeros(B, T, T), False, True, 2) is NotImplemented
    ragged = torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)])
    assert call(ragged, ragged, ragged, D, H, w, b, o, ob, None, False) is NotImplemented


def test_a_seen_weight_keeps_eager_s_call():
    """The positive case's negative: attention whose weights are returned is no fast path, and is refused as any other."""
    model, report, x = nn.MultiheadAttention(D, H, batch_first=True).eval(), Report(), torch.randn(B, T, D)
    run = torch.compile(lambda x: model(x, x, x), backend=lambda gm, inputs: tileweld(gm, inputs, options={"target": "reference"}, report=report), fullgraph=True)
    with torch.no_grad():
        for ours, eager in zip(run(x), model(x, x, x)):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
    assert [r for r in report.refusals if r.rewrite == "attention"]
