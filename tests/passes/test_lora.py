"""Adapters beside a linear become part of its weight, however they are written and scaled; where that would change anything they stay."""
import copy

import pytest
import tileweld
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

K, N = 24, 40


class LoRA(nn.Module):
    """A linear with adapters: what the variants below change is a method."""

    def __init__(self, ranks=(4,), dtype=torch.float32, bias=True, adapter_bias=False, adapter_dtype=None, k=K, n=N):
        super().__init__()
        self.base = nn.Linear(k, n, bias, dtype=dtype)
        self.down = nn.ModuleList(nn.Linear(k, r, adapter_bias, dtype=adapter_dtype or dtype) for r in ranks)
        self.up = nn.ModuleList(nn.Linear(r, n, adapter_bias, dtype=adapter_dtype or dtype) for r in ranks)
        self.dropout = nn.Dropout(0.3)
        self.eval()

    def scale(self, k, y):
        return y * (0.5 + k)

    def forward(self, x):
        y = self.base(x)
        for k, (down, up) in enumerate(zip(self.down, self.up)):
            y = y + self.scale(k, up(down(self.dropout(x.to(down.weight.dtype)))))
        return y.to(x.dtype)


@pytest.mark.parametrize("ranks", [(1,), (4,), (4, 7, 3)])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K)])
def test_any_number_of_adapters(rewriting, ranks, shape):
    report = rewriting.check(LoRA(ranks, adapter_bias=True), torch.randn(shape), count={"lora": 1})
    assert report.fusions[0].detail == f"[{N}, {K}] + rank {', '.join(map(str, ranks))}"


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)])
def test_half_types_are_no_worse_than_eager(rewriting, dtypes):
    rewriting.check(LoRA((4, 3), *dtypes[:1], adapter_dtype=dtypes[1]), torch.randn(5, K).to(dtypes[0]), count={"lora": 1})


def _by_hand(x, w, a, b):
    return x @ w.T + (x @ a.T) @ b.T * 2 - 3 * ((x @ a.T) @ b.T)


def _packed(x, w, a, b):
    return F.linear(x, w) - F.linear(F.linear(x, a) / 4, b)


def _negative(x, w, a, b):
    return -F.linear(F.linear(x, a), b) + torch.add(F.linear(x, w), F.linear(x, w), alpha=0.5)


def _flattened(x, w, a, b):
    return F.linear(x, w) + torch.mm(torch.mm(x.reshape(-1, K), a.T), b.T).reshape(2, 5, N)


class Held(nn.Module):
    def __init__(self, fn, *weights):
        super().__init__()
        self.fn, self.weights = fn, nn.ParameterList(weights)

    def forward(self, *x):
        return self.fn(*x, *iter(self.weights))


@pytest.mark.parametrize("fn", [_by_hand, _packed, _negative, _flattened])
@pytest.mark.parametrize("dynamic", [False, True])
def test_written_by_hand(rewriting, fn, dynamic):
    m = Held(fn, torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4))
    got, report = rewriting.rewritten(m, x := torch.randn(2, 5, K), dynamic=dynamic, verify=True)
    with torch.no_grad():
        torch.testing.assert_close(got, m(x), rtol=1e-4, atol=1e-4)
    assert report.counts["lora"] == 1


def _dora(x, w, bias, a, b, magnitude):
    """m / |W + s B A| (W + s B A), as peft computes it: the norm and the row scale depend on weights alone."""
    norm = torch.linalg.norm(w + 2.0 * (b @ a), dim=1)
    scale = (magnitude / norm).view(1, -1)
    result = F.linear(x, w, bias)
    return result + ((scale - 1) * (result - bias) + scale * F.linear(F.linear(x, a), b) * 2.0)


def test_dora_is_exact(rewriting):
    m = Held(_dora, *(torch.randn(s, dtype=torch.float64) for s in ((N, K), (N,), (4, K), (N, 4), (N,))))
    rewriting.check(m, torch.randn(3, K, dtype=torch.float64), count={"lora": 1}, tolerance=1e-10)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.1}, {"dtype": torch.bfloat16}])
def test_modules_of_peft(rewriting, config):
    peft = pytest.importorskip("peft", reason="peft is an extra: pip install tileweld[test]")
    config = dict(config)
    dtype = config.pop("dtype", torch.float32)
    m = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).to(dtype)
    for name in ("one", "two"):
        m = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False, **config), m, adapter_name=name)
    for layer in (m[0], m[2]):
        layer.set_adapter(["one", "two"])
    report = rewriting.check(m.eval(), torch.randn(2, 3, K).to(dtype), count={"lora": 2})
    assert report.fusions[0].detail.endswith("rank 4, 4") and report.counts["linear"] + report.counts["linear_epilogue"] == 2
    if dtype == torch.float32:
        if config.get("lora_dropout"):
            with torch.no_grad():
                _, report = rewriting.rewritten(m.train(), torch.randn(3, K))
            assert not report.counts["lora"] and {r.reason for r in report.refusals if r.rewrite == "lora"} == {"dropout is active on the way to an adapter"}
        else:
            stays_apart(rewriting, m[0].train(), torch.randn(3, K), "is trained: a gradient is wanted of it")


# ---------------------------------------------------------------- refused


def stays_apart(rewriting, model, x, reason):
    """Nothing to act on for who trains: kept as it is, and strict does not raise."""
    got, report = rewriting.rewritten(model, x, grad=True, strict=True)
    details = [k.detail for k in report.kept if k.rewrite == "lora"]
    assert not report.counts["lora"] and len(details) == 1 and reason in details[0], details
    torch.testing.assert_close(got, model(x))


def test_trained_adapters_stay_apart(rewriting):
    stays_apart(rewriting, LoRA(), torch.randn(3, K), "is trained: a gradient is wanted of it")
    frozen = LoRA().requires_grad_(False)
    rewriting.check(copy.deepcopy(frozen), torch.randn(3, K), count={"lora": 1}, grad=True)
    stays_apart(rewriting, frozen, torch.randn(3, K, requires_grad=True), "the graph is trained")


def test_gradients_of_what_stays_apart(rewriting):
    rewriting.check_gradients(LoRA((3, 2), adapter_bias=True), torch.randn(3, K), count={"lora": 0})


def test_active_dropout(rewriting):
    _, report = rewriting.rewritten(LoRA().train(), torch.randn(3, K))
    assert not report.counts["lora"] and [r.reason for r in report.refusals if r.rewrite == "lora"] == ["dropout is active on the way to an adapter"]


def test_a_part_that_is_read_elsewhere(rewriting):
    m = Held(lambda x, w, a, b: (F.linear(x, w) + F.linear(h := F.linear(x, a), b), h), torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4))
    rewriting.refused("lora", m, torch.randn(3, K), reason="a part of the sum is also read elsewhere")


def test_a_sum_of_another_dtype(rewriting):
    class Wide(LoRA):
        def forward(self, x):
            return self.base(x) + self.up[0](self.down[0](x.float()))

    rewriting.refused("lora", Wide(dtype=torch.bfloat16, adapter_dtype=torch.float32), torch.randn(3, K).bfloat16(), reason="the sum is torch.float32, the weight torch.bfloat16")


@pytest.mark.parametrize("fn", [
    lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a).relu(), b),  # an adapter with a function inside is no matrix
    lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x + 1, a), b),  # of another x
    lambda x, w, a, b: F.linear(x, w) * F.linear(F.linear(x, a), b),
    lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * x.mean(),  # a scale that depends on x
    lambda x, w, a, b: F.linear(x, w) + F.linear(x, w).relu() + x.sum(),
])
def test_something_else(rewriting, fn):
    rewriting.silent("lora", Held(fn, torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4)), torch.randn(3, K))


def test_weights_that_are_inputs_stay_apart(rewriting):
    rewriting.silent("lora", lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b), torch.randn(3, K), torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4))


def test_not_where_nothing_is_kept(rewriting):
    rewriting.silent("lora", LoRA(), torch.randn(3, K), fold_weights=False)


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("rank", [14, 15, 16, 40])
def test_a_pair_is_multiplied_out_where_its_product_is_smaller(rewriting, rank):
    """N K / (N + K) = 15: at 15 they are equal."""
    m = nn.Sequential(nn.Linear(K, rank), nn.Linear(rank, N))
    rewriting.check(m, torch.randn(3, K), count={"lora": int(rank > 15)})


class Regrouped(nn.Module):
    """A pair whose rows are grouped anew between or behind the two: [4, 8] -> [2, 16]."""

    def __init__(self, behind):
        super().__init__()
        self.first, self.second, self.behind = nn.Linear(16, 16), nn.Linear(16, 16), behind

    def forward(self, x):
        between = self.first(x) if self.behind else self.first(x).reshape(2, 2 * x.shape[1], 16)
        return x.reshape(2, 2 * x.shape[1], 16) + self.second(between).reshape(2, 2 * x.shape[1], 16)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_that_are_grouped_anew(rewriting, behind, dynamic):
    report = rewriting.check(Regrouped(behind).eval(), torch.randn(4, 8, 16), count={"lora": 1}, dynamic=dynamic)
    assert not report.refusals


def test_a_pair_with_a_reader_in_between(rewriting):
    rewriting.silent("lora", Held(lambda x, a, b: (F.linear(h := F.linear(x, a), b), h), torch.randn(30, K), torch.randn(N, 30)), torch.randn(3, K))


# ---------------------------------------------------------------- properties, and the whole way through


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_merged_is_unmerged(data):
    """float64, 1e-10: any dims, ranks, scales, biases, signs, numbers of adapters."""
    n, k, rows = (data.draw(st.integers(1, 9)) for _ in range(3))
    weights, plan = [torch.randn(n, k, dtype=torch.float64)], []
    for _ in range(data.draw(st.integers(1, 3))):
        r = data.draw(st.integers(1, 6))
        scale = data.draw(st.one_of(st.floats(-4, 4), st.sampled_from(["row", "scalar"])))
        biased = data.draw(st.booleans())
        plan.append((scale, biased, data.draw(st.booleans())))
        extra = {"row": [(n,)], "scalar": [()]}.get(scale, [])
        weights += [torch.randn(s, dtype=torch.float64) for s in [(r, k), (n, r), *([(r,), (n,)] if biased else []), *extra]]

    def fn(x, *weights):
        w = iter(weights)
        y = F.linear(x, next(w))
        for scale, biased, minus in plan:
            a, b = next(w), next(w)
            ba, bb = (next(w), next(w)) if biased else (None, None)
            z = F.linear(F.linear(x, a, ba), b, bb)
            z = z * (next(w) if isinstance(scale, str) else scale)
            y = y - z if minus else y + z
        return y

    m, x = Held(fn, *weights), torch.randn(rows, k, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        report = tileweld.explain(m, x, options={"target": "reference"})
        assert report.counts["lora"] == 1
        got, expected = torch.compile(m, backend="tileweld", options={"target": "reference"})(x), m(x)
    assert (got - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


def test_kept_watched_and_unmerged_bit_for_bit():
    m, x = LoRA((8,), k=128, n=192), torch.randn(2, 128)
    before = {name: p.clone() for name, p in m.named_parameters()}
    with torch.no_grad():
        report = tileweld.explain(m, x)
        assert [f.bytes for f in report.folded] == [4 * 128 * 192] and len(report.kernels) == 1
        run = torch.compile(m, backend="tileweld")
        torch.testing.assert_close(run(x), m(x), rtol=1e-4, atol=1e-4)
        m.up[0].weight.zero_()  # the adapter is switched off
        torch.testing.assert_close(run(x), m.base(x), rtol=1e-4, atol=1e-4)
        m.up[0].weight.copy_(before["up.0.weight"])
        torch.testing.assert_close(run(x), m(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], p) for name, p in m.named_parameters())
