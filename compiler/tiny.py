"""Tiny models of transformers from their config classes: two layers, hidden size 64, random weights, no downloads."""
from __future__ import annotations

import importlib
import itertools
import os
from difflib import get_close_matches

import torch

from .errors import OptionError
from .targets import TargetError
from .tiny_config import tiny_config
from .tiny_inputs import layouts, make, tiny_inputs

__all__ = ["tiny_inputs", "tiny_model"]

MOST_CLASSES = 3  # that are tried: a module may have ten, which fail alike
FAMILIAR = ("llama", "mistral", "qwen3", "gemma2", "gpt2", "bert", "t5", "vit", "deepseek_v3")
# Tried in turn until a model runs: grouped heads, one KV head a head, a head dim that is the rotary one (MLA), heads twice as wide as the model (Mamba 2), sections of a rotary in three dims, experts where there are none by default.
ATTEMPTS = (
    {}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": 8}, {"head_dim": 32, "num_heads": 4, "n_groups": 2, "state_size": 16, "chunk_size": 8},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
    {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
)
# What the general table gets wrong: names that mean something else there, or sizes that must fit each other.
EXCEPTIONS = {
    "phi3": {"rope_scaling": None}, "gptj": {"rotary_dim": 8}, "codegen": {"rotary_dim": 8}, "albert": {"embedding_size": 32}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
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
    exceptions, failure = EXCEPTIONS.get(name, {}), None
    for number, guess, changes in itertools.product(range(MOST_CLASSES), (True, False), ATTEMPTS):
        try:
            with torch.random.fork_rng(), torch.no_grad():
                config = tiny_config(CONFIG_MAPPING[name], {**changes, **exceptions}, guess)
                if number >= len(classes := _classes(config)):
                    break
                torch.manual_seed(0)
                model = classes[number]._from_config(config, attn_implementation=attn).eval()
                _settle_layout(model)
            return model
        except Exception as error:
            failure = failure or error
    raise TargetError(f"transformers makes no tiny {name!r} with attention {attn!r}: {type(failure).__name__}: {_first_line(failure)}", where=f"hf:{name}", cure="write a factory for it: file.py:factory") from failure


def _settle_layout(model) -> None:
    """Find the inputs that the model runs on, and note them on it; what the likeliest raised where there are none."""
    failure = None
    for layout in layouts(model):
        try:
            model(**make(model, layout, 2, 5, False))
        except Exception as error:
            failure = failure or error
            continue
        model.tileweld_layout = layout
        return
    raise failure or TypeError("its forward takes no arguments that are known")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _unknown(name: str, known: list[str]) -> OptionError:
    near = get_close_matches(name, known, n=8, cutoff=0.4) or FAMILIAR
    return OptionError(f"unknown Hugging Face architecture {name!r}", where=f"hf:{name}", cure=f"near: {', '.join(near)}; transformers here has {len(known)}, the keys of its CONFIG_MAPPING")


def _classes(config) -> list:
    """transformers' classes for the config that have a forward: one that predicts tokens first, then the bare model, then what else its module has."""
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto as auto

    heads = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ") if getattr(config, "is_encoder_decoder", False) else ()
    heads = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in (*heads, "MASKED_LM", "CAUSAL_LM")]  # masked first: encoders are in both
    names = [name for mapping in (*heads, "MODEL_MAPPING_NAMES") for found in [getattr(auto, mapping).get(config.model_type, ())] for name in ([found] if isinstance(found, str) else found)]
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.config_class is type(config) and not c.__name__.endswith("PreTrainedModel")]
    return sorted(found, key=lambda c: names.index(c.__name__) if c.__name__ in names else len(names))[:MOST_CLASSES]
