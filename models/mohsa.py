"""Multi-overlapped-head self-attention (MOHSA): every head's q, k and v also see the neighbouring heads' nearest columns.

Source: Zhang et al., arXiv 2410.14874 (ViT). Head i's Q is [last p columns of Q_(i-1), Q_i, first p columns of Q_(i+1)], zeros at the two ends, and so are K and V: heads of d + 2p, and an output
projection from heads * (d + 2p). The paper's are vision transformers; here patches are tokens of a vocabulary, and the model looks both ways.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = None
VARIANTS = {
    "no_overlap": dict(overlap=0),
    "wide": dict(overlap=4),
    "padded": dict(spelling="pad"),
}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    overlap: int = 2                # p: columns taken from each neighbour
    spelling: str = "cat"           # of the neighbours: cat with zeros, or F.pad; the same function
    max_positions: int = 512


def overlapped(x: Tensor, p: int, spelling: str = "cat") -> Tensor:
    """x [B, T, H, d] -> [B, T, H, d + 2p]."""
    if p == 0:
        return x
    last, first = x[:, :, :-1, -p:], x[:, :, 1:, :p]
    if spelling == "pad":
        return torch.cat([F.pad(last, (0, 0, 1, 0)), x, F.pad(first, (0, 0, 0, 1))], -1)
    nothing = x.new_zeros(*x.shape[:2], 1, p)
    return torch.cat([torch.cat([nothing, last], 2), x, torch.cat([first, nothing], 2)], -1)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        if c.hidden % c.heads or not 0 <= c.overlap <= c.hidden // c.heads:
            raise ValueError(f"hidden {c.hidden} must be a multiple of heads {c.heads}, and overlap {c.overlap} at most the head dim")
        self.config, self.dim = c, c.hidden // c.heads
        self.q, self.k, self.v = (nn.Linear(c.hidden, c.hidden) for _ in range(3))
        self.o = nn.Linear(c.heads * (self.dim + 2 * c.overlap), c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        q, k, v = (overlapped(f(x).unflatten(-1, (c.heads, self.dim)), c.overlap, c.spelling).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.dim**-0.5, -1)                   # [B, H, T, T]
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm_1, self.norm_2, self.attn = nn.LayerNorm(c.hidden), nn.LayerNorm(c.hidden), Attention(c)
        self.up, self.down = nn.Linear(c.hidden, 4 * c.hidden), nn.Linear(4 * c.hidden, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class MOHSA(nn.Module):
    """forward(input_ids [B, T] int64) -> logits [B, T, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed, self.positions = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.max_positions, c.hidden)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.hidden), nn.Linear(c.hidden, c.vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.size(1) > self.config.max_positions:
            raise ValueError(f"{input_ids.size(1)} tokens, but max_positions is {self.config.max_positions}; build(max_positions=...) takes more")
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.size(1), device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(**overrides) -> nn.Module:
    """MOHSA from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MOHSA(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(input_ids [batch, length] int64,)"""
    return (torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
