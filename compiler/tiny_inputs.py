"""Inputs for tiny models of transformers: read off the forward's signature and the config, with as many features as a model says that an image has."""
from __future__ import annotations

import inspect
import itertools

import torch

from .tiny_config import VOCABULARY

IMAGES = ("pixel_values", "pixel_values_videos", "video_pixels")
SOUNDS = ("input_features", "input_values", "audio_values", "audio_features", "input_audio_features")
TOKENS = ("input_ids", "decoder_input_ids", "text_input_ids", "qformer_input_ids")
FEATURES = ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds", "inputs", "feature", "features", "hidden_state")
SERIES = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features", "past_values_padding", "freq", "states", "actions", "rewards", "returns_to_go", "timesteps")
SIZE = {"length": 4000, "frames": 512, "past": 64}  # samples of sound, frames of features


def tiny_inputs(model, batch: int = 2, length: int = 17, pad: bool = False) -> dict:
    """Seeded keyword inputs for a tiny model: tokens [batch, length], pixels, or audio features. pad: the first row has three pads on the left.

    Which arguments and layouts a model takes was found when it was made (`layouts`); a model from elsewhere gets the first.
    """
    return make(model, getattr(model, "tileweld_layout", None) or layouts(model)[0], batch, length, pad)


def parameters(model) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def layouts(model) -> list[dict[str, str]]:
    """Ways to call a model, the likeliest first: dicts of argument -> form. What a signature does not say (is sound [B, T] or [B, 1, T]?) is tried."""
    return [dict(items) for items in dict.fromkeys(tuple(layout.items()) for layout in _layouts(model))]


def _layouts(model):
    known = parameters(model)
    main = getattr(model, "main_input_name", "input_ids")
    required = [n for n, p in known.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    wanted = [main] if isinstance(main, str) else [*main]
    text = [n for n in ("input_ids",) if n in known and (main == "input_ids" or hasattr(model.config, "text_config"))]
    wanted += [n for n in SERIES if n in known and main == "states"]  # a trajectory's parts, none of which may be missing
    base = list(dict.fromkeys([*(n for n in wanted if n in known or not known), *text, *required]))
    pictures, sounds = [n for n in IMAGES if n in known], [n for n in SOUNDS if n in known]
    extra = [[]] + [[n] for n in pictures[:1] + sounds[:1]] + [["bbox"]] * ("bbox" in known) + [pictures[:1] + ["bbox"]] * ("bbox" in known and bool(pictures))
    if "input_ids" in base and pictures and "image_grid_thw" in known:
        kinds = [n for n in ("mm_token_type_ids",) if n in known]
        yield {**_forms([*base, pictures[0], "image_grid_thw", *kinds]), pictures[0]: "patches", "input_ids": "image"}
    if "input_ids" in base and pictures and _placeholder(model) is not None:
        yield {**_forms([*base, pictures[0]]), "input_ids": "image"}
    if "input_ids" in base and pictures:
        yield _forms([*base, pictures[0]])  # CLIP's
    for more in extra:
        names = list(dict.fromkeys([*base, *more]))
        sound = [n for n in names if n in SOUNDS]
        for forms in itertools.product(*[_sound_forms(n) for n in sound]):
            yield {**_forms(names), **dict(zip(sound, forms))}
        if any(n in IMAGES for n in names):
            for form in ("video", "patches"):
                yield {**_forms(names), **{n: form for n in names if n in IMAGES}}
        if "past_values" in names:
            yield {**_forms(names), "past_values": "BTC"}
        if "hidden_states" in names:
            yield {**_forms(names), "hidden_states": "patches"}
    yield _forms([n for n in ("input_ids",) if n in known])


def _forms(names) -> dict[str, str]:
    return dict.fromkeys(names, "")


def _sound_forms(name):
    return ("BCT", "BTC", "B1TC") if "features" in name else ("BT", "B1T", "BTC", "BCT")


def _placeholder(model) -> int | None:
    """The token that stands for a feature of an image; None without one, or where the model cannot say how many there are."""
    token = next((x for n in ("image_token_id", "image_token_index") if isinstance(x := model.config.__dict__.get(n), int)), None)
    return token if hasattr(model, "get_image_features") or hasattr(getattr(model, "model", None), "get_image_features") else None


def make(model, layout: dict[str, str], batch: int, length: int, pad: bool) -> dict:
    """The inputs of one layout."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = next((c for n in ("text_config", "decoder_config", "decoder", "llm_config", "language_config") if hasattr(c := config.__dict__.get(n), "to_dict")), config)
    vocabulary = _number(text, "vocab_size", default=VOCABULARY)
    inputs = {}
    for name, form in layout.items():
        if name in IMAGES:
            inputs[name] = _pixels(config, form, batch, generator)
        elif name in SOUNDS:
            inputs[name] = _sound(config, name, form, batch, generator)
        elif name in ("grid_thw", "image_grid_thw"):
            inputs[name] = torch.tensor([[1, 4, 4]])
        elif name == "bbox":
            inputs[name] = torch.tensor([0, 0, 5, 7]).expand(batch, length, 4).clone()
        elif name.endswith("input_ids"):
            inputs[name] = torch.randint(3, min(vocabulary, 100) if vocabulary > 100 else vocabulary, (batch, length), generator=generator)
        elif name in SERIES:
            inputs[name] = _series(config, name, form, batch, generator)
        elif name in FEATURES:
            rows = (16, _patch_columns(config)) if form == "patches" else (batch, length, _number(config, "hidden_size", "d_model", "input_dim", "embed_dim", default=64))
            inputs[name] = torch.randn(*rows, generator=generator)
    if layout.get("input_ids") == "image":
        inputs["input_ids"] = _with_images(model, inputs, generator)
    if "mm_token_type_ids" in layout:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == _placeholder(model)).to(torch.int32)
    if pad and "input_ids" in inputs and layout.get("input_ids") != "image":
        mask = torch.ones(inputs["input_ids"].shape, dtype=torch.int64)
        mask[0, : min(3, mask.shape[1] - 1)] = 0
        inputs["attention_mask"] = mask
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs and "decoder_input_ids" in (parameters(model) or ("decoder_input_ids",)):
        inputs["decoder_input_ids"] = torch.randint(3, min(vocabulary, 100) if vocabulary > 100 else vocabulary, (batch, max(1, length - 4)), generator=generator)
    return inputs


def _number(config, *names, default):
    """The first of these fields that is a number."""
    return next((x for n in names if type(x := getattr(config, n, None)) is int), default)


def _vision(config):
    return next((c for n in ("vision_config", "image_config", "backbone_config", "encoder", "image_encoder_config", "vision_tower_config") if hasattr(c := config.__dict__.get(n), "to_dict")), config)


def _pixels(config, form, batch, generator):
    vision = _vision(config)
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 32
    size = tuple(size) if isinstance(size, (tuple, list)) else (size.get("height", 32), size.get("width", 32)) if isinstance(size, dict) else (size, size)
    channels = _number(vision, "num_channels", "in_channels", "in_chans", default=3)
    if form == "patches":
        return torch.randn(16, _patch_columns(vision), generator=generator)
    frames = (_number(vision, "num_frames", "frames_per_clip", default=2),) if form == "video" else ()
    return torch.randn(batch, *frames, channels, *size, generator=generator)


def _patch_columns(config) -> int:
    """Columns of an image that comes as rows of patches."""
    side = _number(config, "patch_size", default=8)
    return _number(config, "num_channels", "in_channels", "in_chans", default=3) * _number(config, "temporal_patch_size", default=1) * side * side


def _sound(config, name, form, batch, generator):
    audio = next((c for n in ("audio_config", "encoder_config", "audio_encoder_config", "speech_config") if hasattr(c := config.__dict__.get(n), "to_dict")), config)
    bins = _number(audio, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "feature_projection_input_dim", default=80)
    if "features" not in name and form in ("BT", "B1T"):
        return torch.randn(batch, *(1,) * (form == "B1T"), SIZE["length"], generator=generator)
    frames = 2 * _number(audio, "max_source_positions", "max_position_embeddings", default=256) if form == "BCT" else _number(audio, "max_length", default=64)
    shape = {"BCT": (bins, frames), "BTC": (frames, bins), "B1TC": (1, frames, bins)}[form]
    return torch.randn(batch, *shape, generator=generator)


def _series(config, name, form, batch, generator):
    """Past and future of a series, or of a decision transformer's trajectory."""
    lags, future = config.__dict__.get("lags_sequence") or [0], _number(config, "prediction_length", "horizon_length", default=4)
    past = _number(config, "context_length", default=SIZE["past"])
    rows, columns = (future if name.startswith("future") else past + max(lags)), _number(config, "num_input_channels", "input_size", default=1)
    if name == "freq":
        return torch.zeros(batch, 1, dtype=torch.int64)
    if name == "timesteps":
        return torch.arange(8).expand(batch, 8).clone()
    if name in ("states", "actions", "rewards", "returns_to_go"):
        return torch.randn(batch, 8, {"states": _number(config, "state_dim", default=1), "actions": _number(config, "act_dim", default=1)}.get(name, 1), generator=generator)
    if name.endswith("features"):
        return torch.randn(batch, rows, _number(config, "num_time_features", default=1), generator=generator)
    shape = (batch, rows, columns) if columns > 1 or form == "BTC" else (batch, rows)
    return torch.ones(shape) if name.endswith("mask") else torch.zeros(shape) if name.endswith("padding") else torch.randn(shape, generator=generator)


def _with_images(model, inputs, generator):
    """Tokens [1 or batch, n]: six of text, then one placeholder for every feature of the row's image."""
    token, owner = _placeholder(model), model if hasattr(model, "get_image_features") else model.model
    pixels = next(x for n, x in inputs.items() if n in IMAGES)
    arguments = {n: x for n, x in inputs.items() if n in IMAGES or n.endswith("grid_thw")}
    with torch.no_grad():
        found = owner.get_image_features(**arguments)
    found = getattr(found, "pooler_output", found)
    features = sum(x.numel() for x in ([found] if isinstance(found, torch.Tensor) else found)) // _number(getattr(model.config, "text_config", model.config), "hidden_size", "n_embd", "d_model", default=64)
    rows = inputs["input_ids"].shape[0] if pixels.dim() > 2 else 1
    words = torch.randint(3, 100, (rows, 6), generator=generator)
    return torch.cat([words, torch.full((rows, features // rows), token)], 1)
