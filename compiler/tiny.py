"""Tiny models of transformers from their config classes: two layers, hidden size 64, random weights, no downloads."""
from __future__ import annotations

import os
from difflib import get_close_matches

import torch

from .errors import OptionError
from .targets import TargetError

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
FAMILIAR = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "bert", "t5", "vit", "deepseek_v3")
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
# Tried in turn until a model runs: grouped heads, one KV head a head, and a head dim that is the rotary one (MLA).
ATTEMPTS = ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": 8})
# What the general table gets wrong: names that mean something else there, or sizes that must fit each other.
EXCEPTIONS = {
    "phi3": {"rope_scaling": None}, "gptj": {"rotary_dim": 8}, "codegen": {"rotary_dim": 8}, "albert": {"embedding_size": 32},
}


def tiny_model(name: str, attn: str = "eager") -> torch.nn.Module:
    """transformers' model for a config name ("llama", "t5", "vit"), seeded, eval mode. Raises OptionError for an unknown name."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise TargetError("hf: targets need transformers", cure="pip install 'tileweld[hf]'") from error
    from transformers.utils import logging

    if name not in CONFIG_MAPPING:
        raise _unknown(name, sorted(CONFIG_MAPPING.keys()))
    logging.set_verbosity_error()
    failure = None
    for changes in ATTEMPTS:
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                config = _tiny(CONFIG_MAPPING[name], {**changes, **EXCEPTIONS.get(name, {})})
                model = _auto_class(config).from_config(config, attn_implementation=attn).eval()
                model(**tiny_inputs(model, 1, 5))
            return model
        except Exception as error:
            failure = failure or error
    raise TargetError(f"transformers makes no tiny {name!r} with attention {attn!r}: {type(failure).__name__}: {_first_line(failure)}", where=f"hf:{name}", cure="write a factory for it: file.py:factory") from failure


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _unknown(name: str, known: list[str]) -> OptionError:
    near = get_close_matches(name, known, n=8, cutoff=0.4) or FAMILIAR
    return OptionError(f"unknown Hugging Face architecture {name!r}", where=f"hf:{name}", cure=f"near: {', '.join(near)}; transformers here has {len(known)}, the keys of its CONFIG_MAPPING")


def _tiny(config_class, exceptions):
    """A config with the sizes of TINY wherever it has such a field, nested configs included."""
    defaults = config_class()
    changed = {field: number for field, number in (TINY | SPECIAL_TOKENS).items() if _is_size(defaults, field)}
    changed |= {field: None for field in ("layer_types", "mlp_layer_types") if getattr(defaults, field, None) is not None and not _is_computed(defaults, field)}
    nested = {field: _tiny(type(getattr(defaults, field)), exceptions) for field in getattr(config_class, "sub_configs", {}) if getattr(defaults, field, None) is not None}
    return config_class(**{**changed, **nested, **({"use_cache": False} if hasattr(defaults, "use_cache") else {}), **{k: v for k, v in exceptions.items() if hasattr(defaults, k)}})


def _is_computed(config, field) -> bool:
    """Is the field a property, also under the name that the config maps it to?"""
    return isinstance(getattr(type(config), getattr(type(config), "attribute_map", {}).get(field, field), None), property)


def _is_size(config, field) -> bool:
    if _is_computed(config, field):
        return False
    if field in SPECIAL_TOKENS:
        return hasattr(config, field)
    # vocab_size and the like are ints; a list is a size per stage, which has no general tiny form
    return isinstance(getattr(config, field, None), int) or (field in ("n_inner", "head_dim", "num_key_value_heads", "vocab_size") and field in vars(config))


def _auto_class(config):
    from transformers.models.auto import modeling_auto as auto

    def has(mapping):
        return config.model_type in getattr(auto, mapping)

    if getattr(config, "is_encoder_decoder", False) and has("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"):
        return auto.AutoModelForSeq2SeqLM
    if getattr(config, "is_encoder_decoder", False) and has("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"):
        return auto.AutoModelForSpeechSeq2Seq
    if has("MODEL_FOR_MASKED_LM_MAPPING_NAMES"):  # first: encoders are in both
        return auto.AutoModelForMaskedLM
    if has("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        return auto.AutoModelForCausalLM
    return auto.AutoModel


def tiny_inputs(model, batch: int = 2, length: int = 17, pad: bool = False) -> dict:
    """Seeded keyword inputs for a tiny model: tokens [batch, length], pixels, or audio features. pad: the first row has three pads on the left."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    inputs = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        size = size if isinstance(size, (tuple, list)) else (size, size)
        inputs["pixel_values"] = torch.randn(batch, getattr(vision, "num_channels", 3), *size, generator=generator)
    elif main in ("input_features", "input_values"):
        bins = getattr(config, "num_mel_bins", 80)
        inputs[main] = torch.randn(batch, bins, 512, generator=generator) if main == "input_features" else torch.randn(batch, 4000, generator=generator)
    text = getattr(config, "text_config", config)
    vocabulary = getattr(text, "vocab_size", None) or 128
    if main == "input_ids" or hasattr(config, "text_config"):
        inputs["input_ids"] = torch.randint(3, vocabulary, (batch, length), generator=generator)
    if pad and "input_ids" in inputs:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, : min(3, length - 1)] = 0
        inputs["attention_mask"] = mask
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(3, vocabulary, (batch, max(1, length - 4)), generator=generator)
    return inputs
