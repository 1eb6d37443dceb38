"""Tiny configs of transformers' config classes: every size made small by what its field is called, nested configs included, proportions of stages kept."""
from __future__ import annotations

import dataclasses
import math
import re

# One number for every spelling of a size; a config takes those that it has. 4 heads of 16, 2 KV heads.
SIZES = {
    64: "hidden_size d_model n_embd embed_dim dim encoder_hidden_size projection_dim word_embed_proj_dim embedding_size text_embed_dim attention_hidden_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads n_shared_experts num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads n_routed_experts num_local_experts num_experts moe_num_experts",
    128: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size moe_intermediate_size dim_feedforward shared_expert_intermediate_size vocab_size",
    256: "max_position_embeddings n_positions max_sequence_length max_seq_len n_ctx max_source_positions max_target_positions",
    16: "head_dim d_kv attention_head_size query_pre_attn_scalar v_head_dim kv_channels sliding_window qk_nope_head_dim",
    8: "qk_rope_head_dim patch_size rotary_dim",
    32: "q_lora_rank kv_lora_rank image_size",
    1: "n_group topk_group first_k_dense_replace",
}
TINY = {name: number for number, names in SIZES.items() for name in names.split()}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
VOCABULARY = 128
WHERE_NONE = ("n_inner", "head_dim", "num_key_value_heads", "vocab_size")  # set although the default is None: it would be made of other fields, of another size
# What a field is, by the end of its name, for names that SIZES does not have. Numbers only ever shrink.
KINDS = tuple((re.compile(pattern), number) for pattern, number in (
    (r"(layers|n_layer|blocks|depth|num_stages_decoder)$", 2), (r"(heads|n_head)$", 4), (r"kv_heads$", 2), (r"(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|intermediate_dim|d_ff)$", 128),
    (r"(hidden_size|hidden_dim|embed_dim|emb_dim|d_model|projection_size|output_dim|embedding_size|proj_dim|embed_size|latent_dim|width)$", 64), (r"(vocab_size|codebook_size|num_embeddings)$", VOCABULARY), (r"experts$", 4),
    (r"head_dim$", 16), (r"image_size$", 32), (r"(num_queries|num_query_tokens|num_latents)$", 8),
))
STAGE_DEPTHS, STAGE_HEADS = re.compile(r"(depths?|layers|blocks)$"), re.compile(r"(heads)$")
STAGE_SIZES = re.compile(r"(sizes|dims?|channels|widths?)$")
STAGE_UNIT = 16  # channels of the narrowest stage


def tiny_config(config_class, changes: dict, guess: bool = True):
    """An instance of config_class with small sizes. changes: fields that are given, in nested configs too, wherever they exist. guess: by KINDS too, not by SIZES alone."""
    defaults = config_class()
    given = {}
    for field in _fields(defaults):
        value = defaults.__dict__.get(field)
        small = _small(field, value, defaults, guess)
        if small is not value:
            given[field] = small
    given |= {field: None for field in ("layer_types", "mlp_layer_types") if field not in given and _stored(defaults, field) is not None and not _is_computed(defaults, field)}
    nested = {field: tiny_config(type(part), changes, guess) for field in getattr(config_class, "sub_configs", {}) if hasattr(part := _stored(defaults, field), "to_dict")}
    given |= nested | ({"use_cache": False} if hasattr(defaults, "use_cache") else {})
    merged = {field: {**defaults.__dict__.get(field), **x} if isinstance(x, dict) and isinstance(defaults.__dict__.get(field), dict) else x for field, x in changes.items()}
    return config_class(**given | {field: x for field, x in merged.items() if _takes(defaults, field, x)})


def _fields(config) -> list[str]:
    """The fields that its constructor takes; not what __post_init__ makes of them."""
    if dataclasses.is_dataclass(config):
        return [f.name for f in dataclasses.fields(config) if f.init and not f.name.startswith("_")]
    return [name for name in vars(config) if not name.startswith("_")]


def _stored(config, field):
    """A field's value without the config's own checks of who reads it (per-layer attributes raise)."""
    return config.__dict__.get(field) if field in config.__dict__ else getattr(type(config), field, None)


def _takes(config, field, value) -> bool:
    field = getattr(type(config), "attribute_map", {}).get(field, field)
    return field in config.__dict__ and (not isinstance(config.__dict__[field], (list, tuple)) or isinstance(value, list))


def _is_computed(config, field) -> bool:
    """Is the field a property, also under the name that the config maps it to?"""
    return isinstance(getattr(type(config), getattr(type(config), "attribute_map", {}).get(field, field), None), property)


def _small(field: str, value, config, guess: bool):
    """The tiny value of a field; ``value`` itself where it stays."""
    if _is_computed(config, field):
        return value
    if field in SPECIAL_TOKENS:
        return SPECIAL_TOKENS[field]
    if isinstance(value, bool):
        return value
    if isinstance(value, int) or (value is None and field in WHERE_NONE):
        return _small_number(field, value, config, guess)
    if not guess:
        return value
    if isinstance(value, dict):
        return _small_rope(value, config) if "rope" in field else value
    if isinstance(value, (list, tuple)) and value:
        if all(type(x) is int for x in value):
            return type(value)(_small_list(field, value))
        if field.endswith("layer_types") and all(isinstance(x, str) for x in value):
            kinds = [*dict.fromkeys(value)]  # one layer of each kind: a window and all keys
            return (kinds + kinds)[: TINY["num_hidden_layers"]]
    return value


def _small_number(field, value, config, guess):
    if isinstance(_stored(config, "depths"), (list, tuple)):
        staged = {"embed_dim": 2 * STAGE_UNIT, "hidden_size": 2 * STAGE_UNIT}  # it doubles with every stage
        staged |= {"window_size": 4, "image_size": 128} if _stored(config, "window_size") else {}  # 4 stages of patches of 4: the last one is one window
        if field in staged:
            return staged[field]
    if field == "patch_size" and value is not None:
        return min(value, TINY[field])
    if field in TINY:
        return TINY[field]
    if not guess or value is None:
        return value
    if re.search(r"token_(id|index)$", field):  # placeholders of images and the like: at the end of the vocabulary, each its own
        names = sorted(name for name, x in config.__dict__.items() if re.search(r"token_(id|index)$", name) and name not in SPECIAL_TOKENS)
        return VOCABULARY - 1 - names.index(field) if value >= VOCABULARY else value
    return next((number for pattern, number in KINDS if pattern.search(field) and value > number), value)


def _small_list(field, values):
    """Sizes of stages: as many stages, the proportions kept; [height, width] as the number would be."""
    if field in ("image_size", "patch_size"):
        return [min(x, TINY[field]) for x in values]
    if field.endswith("out_indices"):
        return values
    if STAGE_DEPTHS.search(field):
        return [min(x, 2) for x in values]
    if STAGE_HEADS.search(field):
        return [x // math.gcd(*values) for x in values]
    if STAGE_SIZES.search(field) and min(values) > STAGE_UNIT:
        return [max(STAGE_UNIT, x * STAGE_UNIT // min(values) // STAGE_UNIT * STAGE_UNIT) for x in values]
    return values


def _small_rope(parameters: dict, config) -> dict:
    """Rotary parameters whose sections add up to half of a tiny head."""
    small = {name: _small_rope(x, config) if isinstance(x, dict) else x for name, x in parameters.items()}
    if isinstance(sections := small.get("mrope_section"), (list, tuple)):
        half = int(TINY["head_dim"] * small.get("partial_rotary_factor", 1.0)) // 2
        small["mrope_section"] = [half - (len(sections) - 1) * (half // len(sections))] + [half // len(sections)] * (len(sections) - 1)
    return small
