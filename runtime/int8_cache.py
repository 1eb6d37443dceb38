"""`tileweld.Int8Cache`: the int8 KV cache of kv_cache.py as a static cache of Hugging Face models.

    cache = tileweld.Int8Cache(model.config, max_cache_len=2048)
    model.forward = torch.compile(model.forward, backend="tileweld")
    model.generate(**inputs, past_key_values=cache)

`asymmetric`, `keys` and `group` are those of `tileweld.Int8KV`. It has the interface of transformers' StaticCache; layers with a sliding window keep all positions, of which the model's mask leaves the window.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.errors import UnsupportedError
from .kv_cache import Int8KV

try:
    from transformers.cache_utils import Cache, StaticLayer
except ImportError as error:
    raise UnsupportedError("tileweld.Int8Cache is for Hugging Face models, and transformers is not installed", cure="pip install 'tileweld[hf]', or use tileweld.Int8KV in a loop of your own") from error

#: layers whose cache is that of plain attention
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


class Int8Layer(StaticLayer):
    """The cache of one layer; allocated at the first update, of which it takes batch, KV heads, head dims, dtype and device. options: of Int8KV."""

    def __init__(self, max_cache_len: int, **options):
        super().__init__(max_cache_len=max_cache_len)
        self.options = options

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim = batch, heads, head_dim, value_states.shape[-1]
        self.kv = Int8KV(batch, heads, self.max_cache_len, head_dim, self.v_head_dim, dtype=self.dtype, device=self.device, **self.options)
        self.keys, self.values = self.kv.keys, self.kv.values
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for x in (*self.kv.tensors, self.cumulative_length):
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store key_states and value_states [batch, KV heads, T, head dim] behind what is there; returns all positions, dequantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[-2]
        positions = torch.arange(length, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(length)
        return self.kv.update(key_states, value_states, positions)

    def reset(self) -> None:
        """Forget all tokens, in the same memory."""
        if self.is_initialized:
            self.kv.reset()
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, in the same memory (beam search)."""
        if self.is_initialized:
            for x in self.kv.tensors:
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def offload(self) -> None:
        raise UnsupportedError("an int8 cache is not offloaded", cure="it stays on the model's device")


class Int8Cache(Cache):
    """An int8 cache for every layer of a Hugging Face model.

    config: the model's; max_cache_len: positions that it holds; asymmetric, keys, group: see Int8KV (keys="channel" takes the range of every channel from the first update, the prompt; with group=64 from every 64 tokens). Raises UnsupportedError for models with layers that keep something else
    than keys and values of every token (linear attention, chunked attention, shared caches).
    """

    def __init__(self, config, max_cache_len: int, *, asymmetric: bool = False, keys: str = "token", group: int = 0):
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        unknown = sorted({*kinds} - {*ATTENTION_LAYERS})
        if unknown or getattr(text, "kv_sharing_modes", None) is not None or getattr(text, "attention_chunk_size", None) is not None:
            raise UnsupportedError(f"tileweld.Int8Cache keeps keys and values of attention layers, and this model has {', '.join(unknown) or 'chunked or shared ones'}", cure="use transformers' own cache")
        super().__init__(layers=[Int8Layer(max_cache_len, asymmetric=asymmetric, keys=keys, group=group) for _ in kinds])

    @property
    def bytes(self) -> int:
        """Bytes of all layers so far; 0 before the first update."""
        return sum(layer.kv.bytes for layer in self.layers if layer.is_initialized)
