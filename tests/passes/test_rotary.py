"""Every spelling of rotary becomes one op with eager's result; what is no rotation, or reads its tables elsewhere, is refused."""
import pytest
import torch
import torch.nn.functional as F

B, H, S, D = 2, 3, 5, 16


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]), -1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def chunks(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def unbound(x, cos, sin):
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def deepseek(x, cos, sin):
    x = x.view(B, H, -1, D // 2, 2).transpose(4, 3).reshape(B, H, -1, D)
    return x * cos + rotate_half(x) * sin


def regrouped(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def partial(x, cos, sin):
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, rest), -1)


def partial_interleaved(x, cos, sin):
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    return torch.cat((rotated * cos + rotate_every_two(rotated) * sin, rest), -1)


def complex_product(x, cos, sin):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(3).type_as(x)


# name: (function of x [B, H, S, D] and tables [S, width], columns of the tables, what the report says)
SPELLINGS = {
    "llama": (lambda x, c, s: x * c + rotate_half(x) * s, D, "half-split, 16"),
    "batched tables": (lambda x, c, s: x * c[None, None] + rotate_half(x) * s[None, None], D, "half-split, 16"),
    "wide": (lambda x, c, s: (x.float() * c.float() + rotate_half(x.float()) * s.float()).to(x.dtype), D, "half-split, 16"),
    "chunks": (chunks, D // 2, "half-split, 16"),
    "deepseek": (deepseek, D, "half-split, 16"),
    "partial": (partial, 8, "half-split, 8 of 16"),
    "gpt-j": (lambda x, c, s: x * c.repeat_interleave(2, -1) + rotate_every_two(x) * s.repeat_interleave(2, -1), D // 2, "interleaved, 16"),
    "unbind": (unbound, D // 2, "interleaved, 16"),
    "partial interleaved": (partial_interleaved, 4, "interleaved, 8 of 16"),
    "regrouped": (regrouped, D // 2, "regrouped, 16"),
    "complex": (complex_product, D // 2, "interleaved, 16"),
}


def inputs(columns, dtype=torch.float32):
    angles = torch.randn(S, columns) * 3
    return torch.randn(B, H, S, D).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_op(name, dtype, rewriting):
    fn, columns, detail = SPELLINGS[name]
    report = rewriting.check(fn, *inputs(columns, dtype), count={"rotary": 1})
    assert not report.refusals and next(f.detail for f in report.fusions if f.rewrite == "rotary") == detail


@pytest.mark.parametrize("name", SPELLINGS)
def test_gradients_and_dynamic_lengths(name, rewriting):
    fn, columns, _ = SPELLINGS[name]
    rewriting.check_gradients(fn, *inputs(columns), count={"rotary": 1}, tolerance=1e-6)  # two of them cast to float32
    if name == "complex":
        return  # torch.compile with complex numbers knows static shapes alone
    _, report = rewriting.rewritten(lambda x, c, s: fn(x, c, s)[..., :1, :, :], *inputs(columns), dynamic=False)
    assert report.counts["rotary"] == 1
    x, cos, sin = inputs(columns)
    torch._dynamo.mark_dynamic(x, 2), torch._dynamo.mark_dynamic(cos, 0), torch._dynamo.mark_dynamic(sin, 0)
    rewriting.check(fn, x, cos, sin, count={"rotary": 1})


def test_behind_the_norms_of_q_and_k(rewriting):
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.norm = torch.nn.Linear(32, H * D, bias=False), torch.nn.RMSNorm(D)

        def forward(self, x, cos, sin):
            q = self.norm(self.q(x).view(B, S, H, D)).transpose(1, 2)
            return q * cos + rotate_half(q) * sin

    _, cos, sin = inputs(D)
    report = rewriting.check(Heads(), torch.randn(B, S, 32), cos, sin, count={"rotary": 1})
    assert not [r for r in report.refusals if r.rewrite == "rotary"]


def test_two_rotated_parts_and_layers(rewriting):
    def fn(q, k, cos, sin):
        for _ in range(2):
            q, k = torch.sin(q * cos + rotate_half(q) * sin), torch.sin(k * cos + rotate_half(k) * sin)
        return q, k

    x, cos, sin = inputs(D)
    rewriting.check(fn, x, x[:, :1] + 1, cos, sin, count={"rotary": 4})


def escaping(x, c, s):
    product = x * c
    return product + rotate_half(x) * s, product


REFUSED = {
    "inverse": (lambda x, c, s: x * c - rotate_half(x) * s, D, "rotates backwards"),
    "no minus": (lambda x, c, s: x * c + torch.cat((x[..., D // 2:], x[..., :D // 2]), -1) * s, D, "the signs are"),
    "two cosines": (lambda x, c, s: torch.cat([x[..., :8] * c - x[..., 8:] * s, x[..., 8:] * (c + 1) + x[..., :8] * s], -1), D // 2, "cos is another tensor"),
    "flipped table": (lambda x, c, s: torch.cat([x[..., :8] * c - x[..., 8:] * s, x[..., 8:] * c + x[..., :8] * s.flip(-1)], -1), D // 2, "sin is another tensor"),
    "escape": (escaping, D, "mul is also used outside the rotary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_miss_is_refused_with_its_reason(name, rewriting):
    fn, columns, reason = REFUSED[name]
    rewriting.refused("rotary", fn, *inputs(columns), reason=reason)


@pytest.mark.parametrize("fn", [
    lambda x, c, s: x * c + x.flip(-1) * s,  # a reflection of the columns
    lambda x, c, s: x * c + x.roll(1, -1) * s,
    lambda x, c, s: x * c + torch.sin(x) * s,  # a gate
    lambda x, c, s: F.silu(x) * c + x * s,
    lambda x, c, s: torch.cat([x * c, x * s], -1),
    lambda x, c, s: rotate_half(x) * c + rotate_half(x) * s,
])
def test_what_is_no_rotary_is_passed_over(fn, rewriting):
    rewriting.silent("rotary", fn, *inputs(D))
