"""Keys joined for attention alone are read as two tensors; every other cat stays."""

import pytest
import torch

import tileweld
from tileweld.compiler.ir.attention_parts import attention_parts
from tileweld.compiler.ir.attention import empty_output

B, H, C, L, R, SCALE = 2, 4, 40, 32, 16, 0.1


def attend(q, k, v, scale=SCALE):
    return torch.softmax((q @ k.transpose(2, 3)) * scale, -1) @ v


def inputs(T=1):
    return torch.randn(B, H, T, L + R), torch.randn(B, C, L), torch.randn(B, C, R)


def parts_of(fn, *args, target="cpp"):
    """(head dims of the parts that the attention kernel is given, the report), having compared results; the argument's own changes too."""
    torch._dynamo.reset()
    mine, theirs = ([x.clone() for x in args] for _ in range(2))
    with torch.no_grad():
        expected = fn(*theirs)
        got = torch.compile(fn, backend="tileweld", options={"target": target, "strict": True})(*mine)
        report = tileweld.explain(fn, *[x.clone() for x in args], options={"target": target})
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)
    [source] = {k.source for k in report.sources if k.name.startswith("attention")}
    [line] = [line for line in source.splitlines() if "PART_SIZE[PARTS] =" in line]
    return [int(x) for x in line[line.rindex("{") + 1:line.rindex("}")].split(",")], report


def latent(q, a, b):
    return attend(q, torch.cat([a, b], -1).unsqueeze(1), a.unsqueeze(1))


@pytest.mark.parametrize("T", [1, 12])
def test_a_latent_and_its_rotary_key_are_not_joined(T):
    sizes, report = parts_of(latent, *inputs(T))
    assert sizes == [L, R] and [k.op for k in report.kernels] == ["attention"]


def test_views_between_cat_and_attention():
    def by_position(q, a, b):  # [B, C, 1, D] caches
        return attend(q, torch.cat([a, b], dim=3).permute(0, 2, 1, 3), a.transpose(1, 2))

    def part_of_the_cache(q, a, b):
        return attend(q, torch.cat([a, b], -1)[:, :7].unsqueeze(1), a[:, :7].unsqueeze(1))

    q, a, b = inputs()
    assert parts_of(by_position, q, a.unsqueeze(2), b.unsqueeze(2))[0] == [L, R]
    assert parts_of(part_of_the_cache, q, a, b)[0] == [L, R]


def test_caches_that_are_written_first():
    def step(q, a, b, new_a, new_b, at):
        a.index_copy_(1, at, new_a)
        b.index_copy_(1, at, new_b)
        return latent(q, a, b)

    q, a, b = inputs()
    sizes, report = parts_of(step, q, a, b, torch.randn(B, 1, L), torch.randn(B, 1, R), torch.tensor([5]))
    assert sizes == [L, R] and not any(k.op == "region" for k in report.kernels)


def test_naive_latent_attention_joins_no_expanded_key():
    """k = cat(k_nope [B, C, H, P] of a matmul, one rotary key for all heads)."""
    def naive(q, c, w, b):
        k_nope = (c @ w).view(B, C, H, L)
        k = torch.cat([k_nope, b.unsqueeze(2).expand(-1, -1, H, -1)], -1).transpose(1, 2)
        return attend(q, k, k_nope.transpose(1, 2))

    q, c, b = inputs(12)
    assert parts_of(naive, q, c, torch.randn(L, H * L) / 6, b)[0] == [L, R]


def read_twice(q, a, b):
    k = torch.cat([a, b], -1)
    return attend(q, k.unsqueeze(1), a.unsqueeze(1)), k + 1


def value_too(q, a, b):
    k = torch.cat([a, b], -1).unsqueeze(1)
    return attend(q, k, k)


def along_positions(q, a, b):
    return attend(q[..., :L], torch.cat([a, a], 1).unsqueeze(1), torch.cat([a, a], 1).unsqueeze(1))


def three(q, a, b):
    return attend(q, torch.cat([a, b[..., :4], b[..., 4:]], -1).unsqueeze(1), a.unsqueeze(1))


def computed(q, a, b):
    """Rotary's cat: both halves are made for it."""
    return attend(q, torch.cat([a * b[:, :, :1] + 1, -b * 2], -1).unsqueeze(1), a.unsqueeze(1))


def flattened(q, a, b):
    """Heads out of the joined dim: a head's row lies across both."""
    k = torch.cat([a, b], -1).view(B, C, 2, (L + R) // 2).transpose(1, 2)
    return attend(q[:, :2, :, :(L + R) // 2], k, a.unsqueeze(1))


@pytest.mark.parametrize("fn", [read_twice, value_too, along_positions, three, computed, flattened])
def test_what_stays_joined(fn):
    assert len(parts_of(fn, *inputs(3))[0]) == 1


def test_a_part_that_is_written_after_the_cat_stays_joined():
    """The cat holds the old elements; read later, the part would hold the new ones."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from tileweld.compiler.key_parts import separate_keys

    def late(q, a, b, write):
        k = torch.cat([a, b], -1).unsqueeze(1)
        if write:
            a.add_(1)
        return torch.ops.tileweld.attention(q, k, b.unsqueeze(1), [], [], "s", "True", -float("inf"), "", "nan")

    for write, expected in ((True, torch.ops.tileweld.attention.default), (False, torch.ops.tileweld.attention_parts.default)):
        gm = make_fx(lambda *x: late(*x, write), tracing_mode="fake")(*inputs())
        separate_keys(gm)
        assert [n.target for n in gm.graph.nodes if "tileweld" in str(n.target)] == [expected]
        tensors = inputs()
        torch.testing.assert_close(gm(*[x.clone() for x in tensors]), late(*[x.clone() for x in tensors], write))


def test_the_triton_kernel_reads_parts_too():
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(tileweld.DegradedWarning, match="interpreter"):
        tensors = inputs()
        torch.testing.assert_close(torch.compile(latent, backend="tileweld", options={"target": "triton"})(*tensors), latent(*tensors), atol=2e-5, rtol=2e-5)


def test_the_op():
    q, a, b = inputs(3)
    torch.library.opcheck(attention_parts, (q, [a.unsqueeze(1), b.unsqueeze(1)], a.unsqueeze(1), [], [], "s", "True", -float("inf"), "", "nan"))
    out = attention_parts(q, [torch.randn(B, 2, C, L), torch.randn(B, 4, C, R)], torch.randn(B, 4, C, 8), [], [], "s", "j <= i", -float("inf"), "", "nan")
    assert out.shape == (B, H, 3, 8) and out.stride() == empty_output(q, 8).stride()
    with pytest.raises(RuntimeError, match="head dim 48, the parts of k have 64"):
        torch.compile(lambda *x: attention_parts(*x, torch.randn(B, 4, C, 8), [], [], "s", "True", 0.0, "", "nan"), fullgraph=True)(q, [a.unsqueeze(1), a.unsqueeze(1)])
