"""BigBird as a table of blocks: a window of blocks, global blocks at the front, and for each head some random blocks a row, drawn once from a seed.

Source: Zaheer et al., arXiv 2007.14062. Post-norm encoder as in BERT. The table [H, blocks, blocks] is a buffer, part of the checkpoint: token i
sees token j iff table[h, i // block, j // block]. The paper's last block is global too; here only the front ones are, so that the pattern does
not depend on the length.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = None
VARIANTS = {}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 128
    max_positions: int = 128
    block: int = 4              # tokens a block
    window_blocks: int = 1      # blocks seen on each side of one's own
    global_blocks: int = 1      # at the front: they see all and are seen by all
    random_blocks: int = 2      # drawn for each head and block row
    seed: int = 0               # of the drawing; layer n draws from seed + n


def block_table(c: Config, seed: int) -> Tensor:
    """[H, blocks, blocks] bool, true where a block row sees a block column."""
    n = c.max_positions // c.block
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.arange(n).view(-1, 1), torch.arange(n).view(1, -1)
    fixed = ((row - column).abs() <= c.window_blocks) | (row < c.global_blocks) | (column < c.global_blocks)    # [n, n]
    draw = torch.rand(c.heads, n, n, generator=generator).masked_fill(fixed, -1.0)      # only blocks not yet seen
    picked = draw.topk(min(c.random_blocks, n), dim=-1).indices                         # [H, n, random]
    return fixed | torch.zeros(c.heads, n, n, dtype=torch.bool).scatter(-1, picked, True)


class SelfAttention(nn.Module):
    def __init__(self, c: Config, seed: int):
        super().__init__()
        if c.hidden % c.heads:
            raise ValueError(f"hidden {c.hidden} must be a multiple of heads {c.heads}")
        self.heads, self.head_dim, self.block = c.heads, c.hidden // c.heads, c.block
        self.query, self.key, self.value = (nn.Linear(c.hidden, c.hidden) for _ in range(3))
        self.dense = nn.Linear(c.hidden, c.hidden)
        self.register_buffer("table", block_table(c, seed))                             # [H, blocks, blocks]

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.query(x).view(b, t, self.heads, self.head_dim)
        k = self.key(x).view(b, t, self.heads, self.head_dim)
        v = self.value(x).view(b, t, self.heads, self.head_dim)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.head_dim)
        of_block = torch.arange(t, device=x.device) // self.block                       # [T]
        seen = self.table[:, of_block[:, None], of_block[None, :]]                      # [H, T, T]
        seen = seen[None] & attention_mask[:, None, None, :]                            # [B, H, T, T]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return self.dense(torch.einsum("bhts,bshd->bthd", weights, v).reshape(b, t, -1))


class Layer(nn.Module):
    def __init__(self, c: Config, seed: int):
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(c, seed), nn.LayerNorm(c.hidden)
        self.up, self.down, self.output_norm = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden), nn.LayerNorm(c.hidden)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, attention_mask))
        return self.output_norm(x + self.down(F.gelu(self.up(x), approximate="tanh")))


class BigBird(nn.Module):
    """forward(input_ids [B, T] int64, attention_mask [B, T] bool) -> masked-LM logits [B, T, vocab]. T need not be a multiple of the block."""

    def __init__(self, c: Config):
        super().__init__()
        if c.max_positions % c.block:
            raise ValueError(f"max_positions {c.max_positions} must be a multiple of block {c.block}")
        self.config = c
        self.word, self.position, self.norm = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.max_positions, c.hidden), nn.LayerNorm(c.hidden)
        self.layers = nn.ModuleList(Layer(c, c.seed + i) for i in range(c.layers))
        self.head = nn.Linear(c.hidden, c.vocab)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if input_ids.size(1) > self.config.max_positions:
            raise ValueError(f"{input_ids.size(1)} tokens, but max_positions is {self.config.max_positions}; build(max_positions=...) takes more")
        position = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.position(position))
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.head(x)


def build(**overrides) -> nn.Module:
    """BigBird from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = BigBird(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """(input_ids [batch, length] int64, attention_mask [batch, length] bool); every second row ends in a quarter of padding."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 256, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    attention_mask[1::2, length - length // 4:] = False
    return input_ids, attention_mask
