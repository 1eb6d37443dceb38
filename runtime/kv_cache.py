"""An int8 KV cache: a byte an element, and scales of tokens or of channels.

    of a token and KV head       scale = max_d |x| / 127                        x ~ q scale             symmetric
                                 scale = (max_d x - min_d x) / 255              x ~ q scale + shift     asymmetric: shift = min_d x + 128 scale, a zero point of -shift / scale
    of a channel and KV head     max and min over the tokens of the first update, with HEADROOM: keys alone, the direction that KIVI (2402.02750) finds better for them
    ... and a group of tokens    the same for every ``group`` tokens, and the newest ``group`` ones in floats: KIVI's own form

and |x - what is read| <= scale / 2; in a cache with scales of channels for all tokens, later ones that are further out are clamped. Keys come here behind their rotary embedding, so that it is the channels of turned
keys that have a scale: channels which a rotary turns into each other over the positions have much the same.

Groups: a token becomes int8 when another takes its place among the newest, ``group`` tokens later. Its group is then complete and the group's range final, so that nothing is clamped, or quantised twice, and a
step of decoding works on two tokens, the new one and the one that leaves, whatever the group (KIVI has between none and ``group`` newest tokens in floats and quantises a group at once). Shapes are static.
Tokens come in order, each once: a position that is written again would be read where it was first.

Tokens are quantised alone, so that appending gives what quantising all at once gives, bit by bit (scales of channels: once the first update has set them; of groups: always). `update` returns the dequantised tensors by
plain torch operations: in eager they are made anew at every step, which is right and slow; under torch.compile(backend="tileweld")
attention reads the int8 elements, and everything else folds (passes/attention.py): scales of tokens into its score and its weights, scales of channels into the queries, shifts into
a number for every query and key, and for every query; scales of groups are applied to the keys that a kernel has just read.

A row with an inf or a NaN has a scale that is one: everything read from it is NaN. A row of zeros has the scale 0. In groups such a token is exact while it is among the newest, and then makes its channel
of its group NaN.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..compiler.errors import OptionError

LARGEST = 127  # of a quantised element: the range is symmetric
STEPS = 255  # between the ends -128 and 127 of an asymmetric one
HEADROOM = 127 / 64  # by which the range of a channel exceeds that of the first update's tokens; its ends are 64 steps (by 2 they lay halfway between integers, and rounding hung on the last bit). SmolLM2 behind 128 tokens: perplexity +0.27 %, with 1.25 +1.1 %: what is clamped costs more than a step twice as wide
ROUND = 1.5 * 2.0**23  # adding it to a float32 rounds to the nearest integer, to even from halfway; unlike torch.round it becomes part of one kernel with all the rest


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [..., D], scale float32 [..., 1]) of keys or values x [..., D] of a float dtype; symmetric, one scale for the last dim."""
    scale = x.float().abs().amax(-1, keepdim=True) / LARGEST
    return rounded(x, scale), scale


def quantize_kv_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 [..., D], scale, shift float32 [..., 1]) of x [..., D]: x ~ q scale + shift, with the ends of a row at -128 and 127."""
    wide = x.float()
    scale, shift = _ends_range(wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True))
    return rounded(wide - shift, scale, LARGEST + 1), scale, shift


def channel_range(x: Tensor, asymmetric: bool = False) -> tuple[Tensor, Tensor | None]:
    """(scale, shift or None) float32 [B, H, 1, D] for every channel of keys x [B, H, T, D], wide enough for tokens that are HEADROOM times as far out."""
    wide = x.float()
    low, high = wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)
    if not asymmetric:
        return torch.maximum(high, -low) * (HEADROOM / LARGEST), None
    return (high - low) * (HEADROOM / (2 * LARGEST)), (high + low) / 2


def _ends_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) that put low at -128 and high at 127."""
    scale = (high - low) / STEPS
    return scale, low + (LARGEST + 1) * scale


def rounded(x: Tensor, scale: Tensor, lowest: int = LARGEST) -> Tensor:
    """x / scale to the nearest of the integers from -lowest to 127, as int8."""
    q = ((x.float() / torch.where(scale == 0, 1, scale)).clamp(-lowest, LARGEST) + ROUND) - ROUND
    return torch.where(q == q, q, 0).to(torch.int8)


def dequantize_kv(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, shift: Tensor | None = None) -> Tensor:
    """q [..., D] int8 times scale float32 (plus shift), rounded once to ``dtype``."""
    wide = q.float() * scale
    return (wide if shift is None else wide + shift).to(dtype)


class Int8KV:
    """Keys and values of one layer, for a loop that is written by hand.

        cache = tileweld.Int8KV(batch, kv_heads, length, head_dim, dtype=torch.float32)
        k, v = cache.update(k, v, positions)          # in a model's forward; then attention over k and v with a mask for what is not filled yet

    keys, values: int8 [batch, KV heads, length, head dim]; key_scales, value_scales: float32 [batch, KV heads, length, 1].
    dtype: of what `update` returns.
    asymmetric: scales and shifts, key_shifts and value_shifts in the scales' shapes: 8 bytes a token and KV head instead of 4.
    keys="channel": key_scales (and key_shifts) are [batch, KV heads, 1, head dim], from the tokens of the first update: of the prompt, then.
    keys="channel", group=64: they are [batch, KV heads, groups of so many tokens, head dim], and ``recent`` [batch, KV heads, group, head dim] holds the newest tokens in ``dtype``. Then positions ascend by 1
    from where the last update ended. Raises OptionError for other words and groups.
    """

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, value_dim: int | None = None, *, dtype: torch.dtype = torch.float32, device=None, asymmetric: bool = False, keys: str = "token", group: int = 0):
        if keys not in ("token", "channel"):
            raise OptionError(f"Int8KV: keys={keys!r}", cure='"token" or "channel": what has a scale of its own')
        if group < 0 or (group and keys != "channel"):
            raise OptionError(f"Int8KV: group={group} with keys={keys!r}", cure='the number of tokens that share the scales of channels, with keys="channel"; 0 for one scale for all')
        self.keys = torch.zeros((batch, heads, length, head_dim), dtype=torch.int8, device=device)
        self.values = torch.zeros((batch, heads, length, value_dim or head_dim), dtype=torch.int8, device=device)
        of_keys, of_values = (batch, heads, -(-length // group) if group else 1, head_dim) if keys == "channel" else (batch, heads, length, 1), (batch, heads, length, 1)
        self.key_scales, self.value_scales = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in (of_keys, of_values))
        self.key_shifts, self.value_shifts = (torch.zeros(shape, dtype=torch.float32, device=device) if asymmetric else None for shape in (of_keys, of_values))
        self.recent = torch.zeros((batch, heads, group, head_dim), dtype=dtype, device=device) if group else None
        self.key_lows, self.key_highs = (torch.zeros((batch, heads, 1, head_dim), dtype=torch.float32, device=device) if group and asymmetric else None for _ in range(2))  # of the group that is being filled
        self.dtype, self.asymmetric, self.by_channel, self.group, self.has_range = dtype, asymmetric, keys == "channel", group, False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """keys, key_scales, values, value_scales, and key_shifts, value_shifts, recent, key_lows and key_highs where there are any"""
        return self.keys, self.key_scales, self.values, self.value_scales, *(x for x in (self.key_shifts, self.value_shifts, self.recent, self.key_lows, self.key_highs) if x is not None)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)

    def update(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise and store k and v [batch, KV heads, T, head dim] at ``positions`` [T] (int64); returns the whole cache, dequantised."""
        if self.group:
            self._store_by_group(k.to(self.dtype), positions)
        elif self.by_channel:
            self._store_by_channel(k, positions)
        else:
            self._store(k, positions, self.keys, self.key_scales, self.key_shifts)
        self._store(v, positions, self.values, self.value_scales, self.value_shifts)
        read = self._read_groups(positions if positions.shape[0] == 1 else positions[-1:]) if self.group else dequantize_kv(self.keys, self.key_scales, self.dtype, self.key_shifts)
        return read, dequantize_kv(self.values, self.value_scales, self.dtype, self.value_shifts)

    def _store(self, x: Tensor, positions: Tensor, *into: Tensor | None) -> None:
        for kept, new in zip(into, quantize_kv_asymmetric(x) if self.asymmetric else quantize_kv(x)):
            kept.index_copy_(2, positions, new)

    def _store_by_channel(self, k: Tensor, positions: Tensor) -> None:
        if not self.has_range:
            scale, shift = channel_range(k, self.asymmetric)
            self.key_scales.copy_(scale)
            if shift is not None:
                self.key_shifts.copy_(shift)
            self.has_range = True
        self.keys.index_copy_(2, positions, rounded(k.float() if self.key_shifts is None else k.float() - self.key_shifts, self.key_scales))

    def _store_by_group(self, k: Tensor, positions: Tensor) -> None:
        """Scales of the groups that k's tokens are in, the tokens that are no longer among the newest, and the newest ones."""
        group, tokens = self.group, k.shape[2]
        if tokens == 1:  # as few operations as there may be: this is every step of decoding
            last, wide = positions, k.float()
            slot, groups = last % group, last // group
            begins, leaving, newest = slot == 0, self.recent.index_select(2, slot), k
            if self.asymmetric:
                low, high = torch.where(begins, wide, torch.minimum(self.key_lows, wide)), torch.where(begins, wide, torch.maximum(self.key_highs, wide))
                scale, shift = _ends_range(low, high)
            else:  # the largest of quotients is the quotient of the largest, so that the scale itself can grow
                scale, shift = wide.abs() / LARGEST, None
                scale = torch.where(begins, scale, torch.maximum(scale, self.key_scales.index_select(2, groups)))
        else:
            first, last, near = positions[:1], positions[-1:], torch.arange(group, device=k.device)
            known = torch.cat([self.recent.index_select(2, (first + near) % group), k], 2)  # positions first - group to last
            groups = torch.minimum(first // group + torch.arange((tokens + group - 2) // group + 1, device=k.device), last // group)  # one too many where k begins with a group: the last again
            members = torch.minimum(groups[:, None] * group + near, last) - first + group
            wide, leaving = known.index_select(2, members.flatten()).unflatten(2, members.shape).float(), known[:, :, :tokens]
            slot, newest = positions[-group:] % group, k[:, :, -group:]
            if self.asymmetric:
                low, high = wide.amin(3), wide.amax(3)
                scale, shift = _ends_range(low, high)
                low, high = low[:, :, -1:], high[:, :, -1:]
            else:
                scale, shift = wide.abs().amax(3) / LARGEST, None
        self.key_scales.index_copy_(2, groups, scale)
        if shift is not None:
            self.key_shifts.index_copy_(2, groups, shift)
            self.key_lows.copy_(low)
            self.key_highs.copy_(high)
        left = positions - group
        groups = (left // group).clamp(min=0)
        x = leaving.float() if shift is None else leaving.float() - self.key_shifts.index_select(2, groups)
        q = rounded(x, self.key_scales.index_select(2, groups), LARGEST if shift is None else LARGEST + 1)
        self.keys.index_copy_(2, torch.where(left >= 0, left, last), torch.where((left >= 0)[:, None], q, 0))  # before the first token there is none: zeros go where nothing is read yet
        self.recent.index_copy_(2, slot, newest)

    def _read_groups(self, last: Tensor) -> Tensor:
        """All positions, of which those up to ``last`` [1] are filled."""
        j = torch.arange(self.keys.shape[2], device=last.device)
        wide = self.keys.float() * self.key_scales.index_select(2, j // self.group)
        if self.asymmetric:
            wide = wide + self.key_shifts.index_select(2, j // self.group)
        return torch.where((j <= last - self.group)[:, None], wide, self.recent.index_select(2, j % self.group).float()).to(self.dtype)

    def reset(self) -> None:
        """Forget all tokens, in the same memory; the next update sets the range of the channels again."""
        for x in self.tensors:
            x.zero_()
        self.has_range = False
