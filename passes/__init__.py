"""Rewrites of the captured graph into fused ops, one file each.

A rewrite is a module with NAME and find(graph), see compiler/ir/rewrite.py; a normalisation has transform(gm) instead.
"""
from . import add_layer_norm, add_rms_norm, attention, bias_rules, canonicalise, complex_product, cross_entropy, embedding_norm, fold_norm, gated_mlp, int8, joint_values, layer_norm, layer_norm_linear, linear, linear_epilogue, lora, merge_lse, mha_to_gqa, qkv_rotary, reassociate, rms_norm, rms_norm_linear, rotary, row_gather, row_max

PIPELINE = (
    canonicalise,  # first: what means the same is spelled the same, and nothing is written in place any more
    complex_product,  # rotary as a product of complex numbers -> in real ones, which every pass below reads
    lora,  # x W^T + s (x A^T) B^T -> one linear of a merged weight, in inference; before every pass that would take the layer or an adapter alone
    joint_values,  # one softmax's weights times several values -> times the values side by side; before attention, which takes one product
    merge_lse,  # attention over chunks of keys, put together by hand -> softmax and log-sum-exp of every chunk, one op that merges; before attention, which makes one kernel of the two
    attention,  # softmax(score(q k^T)) v -> tileweld::attention
    row_gather,  # off by default: operands of attention that only move the columns of one linear -> a linear of gathered rows; before bias_rules and reassociate, who look for linears
    bias_rules,  # a key bias is dropped, a value bias goes into the output projection's; after attention, which says what the score is, and before whoever takes the linears
    reassociate,  # (q W_UK) c for q (W_UK c): absorbed MLA, where it is the cheaper order; after attention, whose q, k and v it reads, and before the linears are taken
    layer_norm,  # (x - mean) / sqrt(var + eps) w + b, spelled out -> aten.layer_norm, which the passes below look for
    rms_norm,  # x rsqrt(mean(x^2) + eps) w -> tileweld::rms_norm
    cross_entropy,  # loss(float(softcap(logits)), targets) -> tileweld::cross_entropy; before a matmul takes the cap into its epilogue
    gated_mlp,  # act(gate(x)) * up(x) -> tileweld::linear; before the passes that would take gate or up alone
    qkv_rotary,  # the other linears of one x, with rotary on what has it -> tileweld::linear
    linear_epilogue,  # a linear and the pointwise chain behind it -> tileweld::linear
    linear,  # every other product with a weight -> tileweld::linear; what is left are products of activations
    mha_to_gqa,  # fewer KV heads, where options ask for it; behind the matmuls, whose texts say what is a bias and what rotary
    rms_norm_linear,  # a norm that matmuls alone read -> their prologue; after them, since it asks who reads the norm
    layer_norm_linear,  # the same for layer norms
    rotary,  # x cos + partner(x) sin -> tileweld::rotary, where no projection has taken it: behind the norms of q and k
    embedding_norm,  # a sum of embeddings and its norm -> tileweld::embedding_norm; before add_norm, which would take the last addition alone
    add_rms_norm,  # x + residual and its norm, both used -> tileweld::add_rms_norm; after the matmuls have taken what they can
    add_layer_norm,  # the same for layer norms
    fold_norm,  # off by default: a norm's weight into the matrices behind it; after the norms are in prologues, before int8 rounds the matrices
    int8,  # linear -> int8_linear with the texts that it has by then; where options ask for it, or a module holds int8
    row_max,  # the rows' maxima of what a dynamic product rounds, from the product that makes them; last: it asks which products are int8
)
