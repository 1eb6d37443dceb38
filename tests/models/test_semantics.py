"""What each architecture means, checked against formulas written here a second time, slowly or in other words."""
import math

import pytest
import torch
import torch.nn.functional as F

from tileweld import models
from tileweld.models import alibi, annotated_mha, bigbird, deepseek_mla, dilated, gemma2, gpt_oss_sinks, llama_gqa, longformer, minigpt, mpt_mha, t5_bias


def influence(model, inputs, position: int) -> set[int]:
    """Rows of the output that change when token `position` of the first input does. Models with one layer: who sees this key."""
    changed = inputs[0].clone()
    changed[:, position] = changed[:, position] % 250 + 1
    difference = (model(*inputs) - model(changed, *inputs[1:])).abs().amax(dim=(0, 2))
    return set(difference.gt(1e-6).nonzero().flatten().tolist())


def randn64(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


# ---- windows and blocks: the influence of one token is exactly the set of queries that may see it

@pytest.mark.parametrize("module", [gemma2, gpt_oss_sinks])
def test_window_really_limits(module):
    inputs = module.example_inputs(1, 16)
    for position in (0, 7):
        assert influence(module.build(layers=1, window=6), inputs, position) == set(range(position, position + 6))
        assert influence(module.build(layers=1, window=None), inputs, position) == set(range(position, 16))
    assert influence(module.build(layers=2, window=6), inputs, 0) == set(range(16)), "every other layer sees everything"


@pytest.mark.parametrize("window, dilation", [(4, 1), (4, 2), (3, 5)])
def test_dilated_sees_multiples_of_the_dilation(window, dilation):
    model = dilated.build(layers=1, window=window, dilations=(dilation,))
    for position in (0, 3):
        expected = {position + n * dilation for n in range(window)} & set(range(16))
        assert influence(model, dilated.example_inputs(1, 16), position) == expected


def test_longformer_window_global_tokens_and_padding():
    model = longformer.build(layers=1, window=2)
    tokens = longformer.example_inputs(1, 16)[0]
    real, is_global = torch.ones(1, 16, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool)
    real[0, 14:], is_global[0, 5] = False, True
    inputs = (tokens, real, is_global)
    assert influence(model, inputs, 5) == set(range(16))                # a global key is seen by all
    assert influence(model, inputs, 10) == {5, 8, 9, 10, 11, 12}        # others by the window and by the global query
    assert influence(model, inputs, 15) == {15}                         # padding by none: only its own row's input changed


def test_bigbird_follows_its_table():
    model = bigbird.build(layers=1)
    c, table = model.config, model.layers[0].attention.table
    n = c.max_positions // c.block
    assert table.shape == (c.heads, n, n)
    for h in range(c.heads):
        for row in range(n):
            fixed = set(range(n)) if row == 0 else {0} | {x for x in (row - 1, row, row + 1) if x < n}
            drawn = set(table[h, row].nonzero().flatten().tolist()) - fixed
            assert fixed <= set(table[h, row].nonzero().flatten().tolist()) and len(drawn) == (0 if row == 0 else c.random_blocks)
    assert not torch.equal(table[0], table[1]), "every head draws its own"
    length = 62                                                         # the last block is cut
    tokens, real = bigbird.example_inputs(1, length)
    for position in (0, 21, 61):
        rows = table.any(0)[:, position // c.block].nonzero().flatten().tolist()
        expected = {i for i in range(length) if i // c.block in rows}
        assert influence(model, (tokens, real), position) == expected
    assert torch.equal(table, bigbird.build(layers=1).layers[0].attention.table)
    assert not torch.equal(table, bigbird.build(layers=1, seed=7).layers[0].attention.table)


# ---- biases

def test_alibi_slopes():
    assert alibi.slopes(8).tolist() == [2.0**-k for k in range(1, 9)]                       # the paper's example
    assert alibi.slopes(4).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    six = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]                            # of 4, then every second one of 8
    assert alibi.slopes(6).tolist() == six
    assert mpt_mha.gen_slopes(8).flatten().tolist() == alibi.slopes(8).tolist()
    assert mpt_mha.gen_slopes(6).flatten().tolist() == six


def test_alibi_bias_values():
    slope = torch.tensor([0.5, 0.25])
    distance = alibi.distance_bias(3, slope, torch.float32)
    assert distance[0, 0].tolist() == [[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]] and distance[0, 1, 2, 0] == -0.5
    padded = alibi.bloom_bias(torch.tensor([[1, 1, 1], [0, 1, 1]]), slope, torch.float32)
    assert padded.shape == (4, 1, 3)
    assert padded[:, 0].tolist() == [[0, 0.5, 1], [0, 0.25, 0.5], [0, 0, 0.5], [0, 0, 0.25]]


@pytest.mark.parametrize("module, overrides", [
    (alibi, {}), (alibi, dict(style="distance")), (mpt_mha, {}), (mpt_mha, dict(alibi=False)), (mpt_mha, dict(kv_heads=1))])
def test_left_padding_changes_nothing(module, overrides):
    model = module.build(**overrides)
    tokens, mask = module.example_inputs(1, 12)
    padded = torch.cat([torch.full((1, 4), 3), tokens], 1)
    padded_mask = torch.cat([torch.zeros(1, 4, dtype=torch.bool), mask], 1)
    torch.testing.assert_close(model(padded, padded_mask)[:, 4:], model(tokens, mask), rtol=1e-4, atol=1e-5)


def slow_bucket(relative: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """By counting: the log buckets begin at max_exact * ratio^k; how many of them has this distance reached?"""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset, distance = (buckets if relative > 0 else 0), abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    steps = buckets - exact
    # distance >= exact * (max/exact)^(k/steps), in whole numbers: both sides to the power of `steps`
    reached = max(k for k in range(steps) if distance**steps * exact**k >= exact**steps * max_distance**k)
    return offset + exact + reached


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (64, 200)])
def test_t5_bucket_against_a_slow_one(bidirectional, buckets, max_distance):
    relative = torch.arange(-300, 301)
    got = t5_bias.relative_position_bucket(relative, bidirectional, buckets, max_distance).tolist()
    assert got == [slow_bucket(r, bidirectional, buckets, max_distance) for r in relative.tolist()]
    assert min(got) == 0 and max(got) == buckets - 1


def test_t5_bias_is_a_lookup_by_distance_and_head():
    model = t5_bias.build()
    c = model.config
    for stack, bidirectional in ((model.encoder, True), (model.decoder, False)):
        bias = stack.position_bias(9)
        assert bias.shape == (1, c.heads, 9, 9)
        for i, j, h in [(0, 0, 0), (3, 8, 1), (8, 1, 3)]:
            assert bias[0, h, i, j] == stack.relative_attention_bias.weight[slow_bucket(j - i, bidirectional, c.buckets, c.max_distance), h]


def test_t5_source_padding_is_not_seen():
    model = t5_bias.build()
    source, mask, target = t5_bias.example_inputs(2, 16)
    changed = source.clone()
    changed[~mask] = 9
    torch.testing.assert_close(model(changed, mask, target), model(source, mask, target), rtol=0, atol=1e-6)
    changed[1, 3] += 1
    assert (model(changed, mask, target) - model(source, mask, target)).abs().max() > 1e-3


# ---- attention cores against scaled_dot_product_attention in float64

@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("s_q", [7, 3, 1])
def test_mpt_attention(kv_heads, s_q):
    b, h, d, s_k = 2, 4, 8, 7
    q, k, v = randn64(b, s_q, h * d), randn64(b, s_k, kv_heads * d), randn64(b, s_k, kv_heads * d + 1)[..., 1:]
    bias = mpt_mha.gen_slopes(h).double() * torch.arange(-19, 1).view(1, 1, 1, 20)          # a buffer longer than needed
    keys = torch.ones(b, s_k, dtype=torch.bool)
    keys[1, 5:] = False
    out = mpt_mha.multihead_attention(q, k, v, h, kv_heads, bias, keys)
    heads = lambda x, n: x.reshape(b, -1, n, d).transpose(1, 2).repeat_interleave(h // n, 1)
    i, j = torch.arange(s_k - s_q, s_k).view(-1, 1), torch.arange(s_k)
    mask = (-mpt_mha.gen_slopes(h).double() * (i - j)).masked_fill((j > i) | ~keys[:, None, None, :], float("-inf"))
    expected = F.scaled_dot_product_attention(heads(q, h), heads(k, kv_heads), heads(v, kv_heads), attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=1e-10, atol=1e-12)


def test_mpt_query_without_keys_averages_all_values():
    q, k, v = randn64(1, 6, 16), randn64(1, 6, 16), randn64(1, 6, 17)[..., 1:]
    keys = torch.tensor([[False, False, True, True, True, True]])
    out = mpt_mha.multihead_attention(q, k, v, 2, 2, None, keys)
    torch.testing.assert_close(out[:, :2], v.mean(1, keepdim=True).expand(1, 2, 16))        # finite masks: uniform over hidden keys too


def test_mpt_options_each_change_the_result():
    inputs = mpt_mha.example_inputs()
    outputs = [mpt_mha.build(**o)(*inputs) for o in ({}, dict(clip_qkv=None), dict(qk_ln=False), dict(alibi=False))]
    for k in range(4):
        assert all((outputs[k] - outputs[m]).abs().max() > 1e-3 for m in range(k))


def test_annotated_attention():
    q, k, v = randn64(2, 3, 5, 8), randn64(2, 3, 6, 8), randn64(2, 3, 6, 9)[..., 1:]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])[:, None, None, :]
    out, weights = annotated_mha.attention(q, k, v, mask, torch.nn.Dropout(0.0))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()), rtol=1e-10, atol=1e-12)
    assert weights.shape == (2, 3, 5, 6) and (weights[..., 5] == 0).all()


def test_annotated_keeps_weights_only_when_asked():
    for keep in (True, False):
        model = annotated_mha.build(keep_weights=keep)
        model(*annotated_mha.example_inputs())
        assert (model.decoder[0].src_attn.weights is not None) == keep


@pytest.mark.parametrize("sink", [-50.0, -1.0, 2.0, 50.0])
def test_sink_joins_the_denominator_and_nothing_else(sink):
    attention = gpt_oss_sinks.build(layers=1).double().blocks[0].attn
    c, t = attention.config, 9
    with torch.no_grad():
        attention.sinks.fill_(sink)
        attention.o_proj.weight.copy_(torch.eye(64))
        attention.o_proj.bias.zero_()
        x, one, zero = randn64(2, t, 64), torch.ones(t, 8, dtype=torch.float64), torch.zeros(t, 8, dtype=torch.float64)
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        out = attention(x, one, zero, torch.zeros(t, t, dtype=torch.float64).masked_fill(hidden, -1e300))   # cos 1, sin 0: no rotation
        heads = lambda y, n: y.view(2, t, n, c.head_dim).transpose(1, 2).repeat_interleave(c.heads // n, 1)
        q, k, v = heads(attention.q_proj(x), c.heads), heads(attention.k_proj(x), c.kv_heads), heads(attention.v_proj(x), c.kv_heads)
        scores = (q @ k.mT / math.sqrt(c.head_dim)).masked_fill(hidden, float("-inf"))
        share = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink)                     # sum exp(s) / (sum exp(s) + exp(sink))
        expected = share * F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=1e-9, atol=1e-12)


def test_gemma2_softcap_against_a_loop():
    attention = gemma2.build(layers=1).double().blocks[0].attn
    c, t = attention.config, 9
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(64))
        x, one, zero = randn64(1, t, 64), torch.ones(t, 16, dtype=torch.float64), torch.zeros(t, 16, dtype=torch.float64)
        out = attention(x, one, zero).view(t, c.heads, c.head_dim)
        q, k, v = attention.q_proj(x).view(t, 4, 16), attention.k_proj(x).view(t, 2, 16), attention.v_proj(x).view(t, 2, 16)
        for i in range(t):
            for h in range(c.heads):
                seen = range(max(0, i - 5), i + 1)
                s = torch.stack([50 * torch.tanh(q[i, h] @ k[j, h // 2] / math.sqrt(24.0) / 50) for j in seen])
                expected = sum(w * v[j, h // 2] for w, j in zip(s.softmax(0), seen))
                torch.testing.assert_close(out[i, h], expected, rtol=1e-5, atol=1e-6)       # weights pass through fp32
    assert gemma2.build()(*gemma2.example_inputs()).abs().max() <= 30


@pytest.mark.parametrize("module", [llama_gqa, minigpt, gemma2, gpt_oss_sinks])
def test_gqa_is_mha_with_shared_heads(module):
    inputs = module.example_inputs()
    gqa, mha = (module.build(layers=2, heads=4, kv_heads=n) for n in (2, 4))
    state = gqa.state_dict()
    for key, value in state.items():
        if key.split(".")[-2] in ("k_proj", "v_proj", "wk", "wv"):
            state[key] = value.view(2, -1, *value.shape[1:]).repeat_interleave(2, 0).flatten(0, 1)
    mha.load_state_dict(state)
    torch.testing.assert_close(gqa(*inputs), mha(*inputs), rtol=1e-5, atol=1e-5)


def sdpa(q, k, v, out, heads: int, mask, scale=None):
    """The textbook path: projected q, k, v [B, T, H*D], boolean or float mask, then the output projection."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2))


def test_remaining_attentions_against_sdpa():
    t, x = 10, randn64(2, 10, 64)
    real = torch.arange(t) < torch.tensor([[10], [7]])
    close = lambda got, expected: torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        a = longformer.build(layers=1).double().layers[0].attention
        seen = real[:, None, None, :].expand(2, 1, t, t)
        close(a(x, seen), sdpa(a.query(x), a.key(x), a.value(x), a.dense, 4, seen))

        a = bigbird.build(layers=1).double().layers[0].attention
        seen = seen & a.table.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :t, :t]
        close(a(x, real), sdpa(a.query(x), a.key(x), a.value(x), a.dense, 4, seen))

        a = dilated.build(layers=1).double().blocks[0].attn
        close(a(x), sdpa(*a.qkv(x).chunk(3, -1), a.proj, 4, dilated.dilated_mask(t, 4, 1, x.device)))

        a, bias = t5_bias.build(layers=1).double().encoder.blocks[0].self_attn, randn64(1, 4, t, 10)
        got = a(x, x, bias)
        torch.testing.assert_close(got, sdpa(a.q(x), a.k(x), a.v(x), a.o, 4, bias, scale=1.0), rtol=1e-5, atol=1e-6)     # softmax in fp32

        a, causal = alibi.build(layers=1).double().blocks[0].attn, torch.ones(t, t, dtype=torch.bool).tril()
        bias = alibi.distance_bias(t, alibi.slopes(4).double(), torch.float64)
        a.style = "distance"
        q, k, v = a.query_key_value(x).view(2, t, 4, 3, 16).unbind(3)
        close(a(x, bias, ~causal), sdpa(q.flatten(2), k.flatten(2), v.flatten(2), a.dense, 4, bias.masked_fill(~causal, float("-inf"))))

        a, x = minigpt.build(layers=1, kv_heads=4).double().blocks[0].attn, randn64(2, 10, 128)
        got = a(x, torch.ones(t, 16, dtype=torch.float64), torch.zeros(t, 16, dtype=torch.float64))
        torch.testing.assert_close(got, sdpa(a.wq(x), a.wk(x), a.wv(x), a.wo, 4, causal), rtol=1e-5, atol=1e-6)          # softmax in fp32


def test_mla_equals_its_absorbed_form():
    """score = (W_UK^T q_nope) . c + q_pe . k_pe and out = W_UV (sum p c): the algebra a compiler may use."""
    model = deepseek_mla.build(layers=1).double()
    attention = model.layers[0].attn
    c, t = attention.config, 7
    with torch.no_grad():
        x = randn64(2, t, 64)
        cos, sin = deepseek_mla.rope_tables(torch.arange(t), c.rope_dim, c.rope_theta)
        mask = torch.full((t, t), float("-inf"), dtype=torch.float64).triu(1)
        naive = attention(x, cos, sin, mask, None, torch.arange(t))
        q_nope, q_pe = attention.wq_b(attention.q_norm(attention.wq_a(x))).view(2, t, c.heads, -1).split([16, 8], -1)
        latent, k_pe = attention.wkv_a(x).split([20, 8], -1)
        latent, k_pe = attention.kv_norm(latent), deepseek_mla.apply_rotary(k_pe[:, :, None], cos, sin)[:, :, 0]
        w_uk, w_uv = attention.wkv_b.weight.view(c.heads, 28, 20).split([16, 12], 1)
        scores = torch.einsum("bthp,hpl,bsl->bhts", q_nope, w_uk, latent)
        scores = (scores + torch.einsum("bthr,bsr->bhts", deepseek_mla.apply_rotary(q_pe, cos, sin), k_pe)) / math.sqrt(24) + mask
        out = torch.einsum("bhts,bsl,hvl->bthv", scores.softmax(-1), latent, w_uv)
    torch.testing.assert_close(attention.wo(out.flatten(2)), naive, rtol=1e-5, atol=1e-6)    # the model rounds norms, rope and weights to fp32
    k, v = model.new_cache(3, 10)[0]
    assert k.shape == (3, 10, 20) and v.shape == (3, 10, 8), "a token costs latent + rope numbers, not heads * dims"


# ---- rotary embeddings and norms

def rotary_scores(name: str, q, k, m: int, n: int):
    """q rotated to position m, times k rotated to position n; q and k [D]."""
    module, d = models.load(name), q.numel()
    both = torch.stack([q, k])                                                              # as two tokens
    positions = torch.tensor([m, n])
    if name == "llama_gqa":
        cos, sin = module.rope_tables(positions, d, 10000.0, torch.float64)
        q, k = module.apply_rope(both[None, None], cos, sin)[0, 0]
    elif name == "gemma2":
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = torch.cat([angles, angles], -1)
        q, k = module.apply_rope(both[None, None], angles.cos(), angles.sin())[0, 0]
    elif name == "deepseek_mla":
        q, k = module.apply_rotary(both[None, :, None], *module.rope_tables(positions, d, 10000.0))[0, :, 0]
    elif name == "minigpt":
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        q, k = module.apply_rope(both[None, :, None], angles.cos(), angles.sin())[0, :, 0]
    elif name == "gpt_oss_sinks":
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        q, k = module.apply_rope(both[None, None], angles.cos(), angles.sin())[0, 0]
    return q @ k


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "deepseek_mla", "minigpt", "gpt_oss_sinks"])
def test_rotary_scores_depend_on_the_distance_alone(name):
    q, k = randn64(16), randn64(1, 16)[0]
    a, b = rotary_scores(name, q, k, 9, 4), rotary_scores(name, q, k, 25, 20)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)                                   # tables are fp32
    assert (a - rotary_scores(name, q, k, 9, 3)).abs() > 1e-2
    d = 16                                                                                   # and the angle has the right sign and pairing
    pairs = [(2 * p, 2 * p + 1) if name == "deepseek_mla" else (p, p + d // 2) for p in range(d // 2)]
    expected = sum(
        (complex(q[x], q[y]) * complex(k[x], k[y]).conjugate() * complex(math.cos(5 * w), math.sin(5 * w))).real
        for p, (x, y) in enumerate(pairs) for w in [10000.0 ** (-2 * p / d)])
    assert abs(a.item() - expected) < 1e-4


@pytest.mark.parametrize("module, offset", [(llama_gqa, 0), (minigpt, 0), (deepseek_mla, 0), (gpt_oss_sinks, 0), (gemma2, 1)])
def test_rms_norms(module, offset):
    norm = module.RMSNorm(24, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = randn64(3, 24).float() * 7
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight + offset, 1e-5))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_t5_norm_does_not_centre():
    norm = t5_bias.LayerNorm(t5_bias.Config())
    x = randn64(3, 64).float() + 5
    torch.testing.assert_close(norm(x), F.rms_norm(x, (64,), norm.weight, 1e-6))


# ---- MiniGPT

@pytest.mark.parametrize("size, expected", [
    ("tiny", dict(hidden=128, layers=8, heads=4, kv_heads=1)),
    ("small", dict(hidden=384, layers=12, heads=12, kv_heads=3)),
    ("medium", dict(hidden=640, layers=20, heads=16, kv_heads=4, intermediate=2048, vocab=20000))])
def test_minigpt_sizes(size, expected):
    model = minigpt.build(size=size, layers=1) if size == "medium" else minigpt.build(size)      # 112 M parameters are not needed here
    config = minigpt.Config(**minigpt.SIZES[size])
    assert expected.items() <= vars(config).items()
    assert model.head.weight is model.embed.weight
    assert model(*minigpt.example_inputs()).shape == (2, 16, config.vocab)


def test_minigpt_unknown_size():
    with pytest.raises(ValueError, match="tiny, small, medium"):
        minigpt.build(size="huge")


def test_minigpt_trains():
    model = minigpt.build(layers=2).train()
    tokens, = minigpt.example_inputs(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(model.config.vocab)) < 0.3                               # no better than chance at first
    assert losses[-1] < losses[0] / 2
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
