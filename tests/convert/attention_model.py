"""A small float64 decoder for these tests: nothing in it rounds to float32, so that exact means 1e-12; biases, rotary layout and head counts to choose."""
import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LENGTH = 61, 12


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, d, rotary, bias):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.rotary = heads, kv_heads, d, rotary
        self.q_proj = nn.Linear(hidden, heads * d, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, hidden, bias=bias)

    def turn(self, x):
        """Rotary embedding of [B, H, T, d]: "half" pairs (i, i + d/2), "neighbours" (2i, 2i + 1), None none."""
        if self.rotary is None:
            return x
        d, t = x.shape[-1], x.shape[-2]
        angle = torch.outer(torch.arange(t, dtype=x.dtype), 10.0 ** -torch.arange(0, 2, 4 / d, dtype=x.dtype))
        z = torch.complex(x[..., : d // 2], x[..., d // 2:]) if self.rotary == "half" else torch.complex(x[..., ::2], x[..., 1::2])
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1) if self.rotary == "half" else torch.stack([z.real, z.imag], -1).flatten(-2)

    def heads_of(self, x, n):
        return x.unflatten(-1, (n, self.head_dim)).transpose(1, 2)

    def keys(self, x):
        return self.k_proj(x)

    def forward(self, x):
        q, k, v = self.heads_of(self.q_proj(x), self.heads), self.heads_of(self.keys(x), self.kv_heads), self.heads_of(self.v_proj(x), self.kv_heads)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (self.turn(k), v))
        return self.o_proj(F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, layers=2, hidden=24, heads=4, kv_heads=4, d=4, rotary="half", bias=False, attention=Attention):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList(attention(hidden, heads, kv_heads, d, rotary, bias) for _ in range(layers))
        self.double().eval()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) * (1 if p is self.embed.weight else 0.5))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
        return x


def tokens(batch=4, length=LENGTH):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def scramble(module, twins, seed=0):
    """Make KV head j of `module` the head twins[j] up to a random gauge, so that heads of one twin can be merged exactly; in place.

    K gets a complex factor a rotary pair (any invertible matrix without rotary), V any invertible matrix; q and o keep working on them."""
    g, d, h = torch.Generator().manual_seed(seed), module.head_dim, module.kv_heads
    random = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    well = lambda: torch.linalg.qr(random(d, d))[0] * (torch.rand(d, generator=g, dtype=torch.float64) + 0.5)

    def factor():
        if module.rotary is None:
            return well()
        c = torch.polar(torch.rand(d // 2, generator=g, dtype=torch.float64) + 0.5, 3 * random(d // 2))
        i = torch.arange(d).view(2, -1) if module.rotary == "half" else torch.arange(d).view(-1, 2).T
        a = torch.zeros(d, d, dtype=torch.float64)
        a[i[0], i[0]], a[i[0], i[1]], a[i[1], i[0]], a[i[1], i[1]] = c.real, -c.imag, c.imag, c.real
        return a

    with torch.no_grad():
        for linear, gauge in ((module.k_proj, factor), (module.v_proj, well)):
            gauges = [gauge() for _ in twins]
            for p in linear.parameters():
                old = p.clone().unflatten(0, (h, d))
                p.copy_(torch.cat([a @ old[t] for a, t in zip(gauges, twins)]))
    return module
