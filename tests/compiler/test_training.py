"""Training: gradients of compiled modules are eager's, whatever decides which gradients there are: no_grad, detach, autograd
functions, checkpoints, frozen and shared weights, writes to buffers. What the rewrites are for is fused all the same."""
import copy

import pytest
import torch
import torch.nn.functional as F
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from torch import nn
from torch.utils.checkpoint import checkpoint


def compiled(module, dynamic=None, **options):
    """(compiled module, Report). On the ops' definitions, unless options ask for kernels."""
    report = Report()
    torch._dynamo.reset()
    return torch.compile(module, backend=lambda gm, x: tileweld(gm, x, options={"target": "reference", **options}, report=report), dynamic=dynamic, fullgraph=True), report


def state(run, module, *inputs):
    """The output, all gradients (None where there is none), and the buffers after one step."""
    module.zero_grad()
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(3)
    out = run(*inputs)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs), *(p.grad for p in module.parameters()), *module.buffers()]


def same(eager, ours, tolerance=1e-5):
    """fp32, relative to the tensor's largest value; a gradient that is zero but for rounding (a key's bias) against 1e-3 of the largest of all."""
    largest = max(x.abs().max().item() for x in eager if x is not None)
    for a, b in zip(eager, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max().item() <= tolerance * max(a.abs().max().item(), 1e-3 * largest)


def check(module, *inputs, dynamic=None, against=None, **options):
    """One step of a copy, compiled, against eager's (or another backend's: ``against``); returns the report."""
    other = copy.deepcopy(module)
    run, report = compiled(other, dynamic, **options)
    ours = state(run, other, *inputs)
    if against is not None:
        torch._dynamo.reset()
    same(state(torch.compile(module, backend=against) if against else module, module, *inputs), ours)
    return report


class Norm(nn.Module):
    """RMSNorm and a linear layer; ``how`` its variance is kept from gradients."""

    def __init__(self, how=""):
        super().__init__()
        self.weight, self.linear, self.how = nn.Parameter(torch.rand(16) + 0.5), nn.Linear(16, 16), how

    def forward(self, x):
        with torch.set_grad_enabled(self.how != "no_grad"):
            variance = x.pow(2).mean(-1, keepdim=True)
        if self.how == "detach":
            variance = variance.detach()
        return self.linear(self.weight * (x * torch.rsqrt(variance + 1e-6)))


class Attention(nn.Module):
    """Two heads of 8; ``cut``: which of q, k, v, scores, weights is computed under no_grad."""

    def __init__(self, cut="", dropout=0.0):
        super().__init__()
        self.qkv, self.cut, self.dropout = nn.Linear(16, 48), cut, dropout

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k, v = (t.detach() if self.cut == name else t for t, name in ((q, "q"), (k, "k"), (v, "v")))
        with torch.set_grad_enabled(self.cut != "scores"):
            scores = q @ k.mT / 8**0.5
        with torch.set_grad_enabled(self.cut != "weights"):
            weights = scores.softmax(-1)
        return (F.dropout(weights, self.dropout, self.training) @ v).transpose(1, 2).flatten(2) + x


X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- what stops gradients


@pytest.mark.parametrize("how", ["", "no_grad", "detach"])
def test_a_norm_with_a_detached_variance_is_no_norm(how):
    assert check(Norm(how), X).counts["rms_norm"] == (how == "")


@pytest.mark.parametrize("cut", ["", "q", "k", "v", "scores", "weights"])
def test_attention_with_a_detached_part(cut):
    assert check(Attention(cut), X).counts["attention"] == (cut != "weights")  # scores of detached q and k are scores


def test_a_detached_shift_of_the_softmax_is_still_a_shift():
    class Shifted(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT
            weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
            return weights / weights.sum(-1, keepdim=True) @ v

    assert check(Shifted(), X).counts["attention"] == 1


def test_gradients_recorded_inside_no_grad():
    class Nested(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                y = super().forward(x).sin()
                with torch.enable_grad():
                    z = super().forward(x) * y
            return z + y

    check(Nested(16, 16), X)


def test_a_write_under_no_grad_to_a_value_that_has_a_gradient():
    class Written(nn.Linear):
        def forward(self, x):
            y = super().forward(x) * 1.0
            with torch.no_grad():
                z = y.mul_(2)
            return (z + y).sin()

    check(Written(16, 16), X)


def test_a_tensor_that_gets_its_gradient_by_a_write():
    class Filled(nn.Linear):
        def forward(self, x):
            y = torch.zeros_like(x)
            y[:, 1:] = super().forward(x)[:, 1:]
            with torch.no_grad():
                scale = y.sin()
            return scale * y

    check(Filled(16, 16), X)


def test_statistics_under_no_grad():
    class Average(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
            return y - self.mean

    check(Average(), X)


@pytest.mark.parametrize("dynamic", [None, True])
def test_in_place_scores_next_to_a_no_grad_region(dynamic):
    """Falcon: scores /= sqrt(d), and rotary tables computed under no_grad in the same graph."""
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            with torch.no_grad():
                scale = torch.arange(x.shape[1]).float().cos()[:, None]
            scores = (q * scale) @ k.mT
            scores /= 8**0.5
            return scores.softmax(-1) @ v

    report = check(InPlace(), X, dynamic=dynamic)
    assert report.counts["attention"] == 1 and not [r for r in report.refusals if r.rewrite == "attention"]


# ---------------------------------------------------------------- autograd functions, checkpoints, transforms


class Tripled(torch.autograd.Function):
    """tanh(x)*scale with a backward that no rule of autograd gives."""

    @staticmethod
    def forward(ctx, x, scale, weight):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return x.tanh() * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 3 * grad * ctx.scale * weight, None, (grad * x).sum((0, 1))


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out, self.weight = Norm(), nn.Linear(16, 16), nn.Parameter(torch.rand(16))

    def forward(self, x):
        return self.out(Tripled.apply(self.norm(x), 2.0, self.weight)).sin() + Tripled.apply(x, 0.5, self.weight)


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_autograd_function_keeps_its_backward(dynamic):
    assert check(WithFunction(), X, dynamic=dynamic).counts["rms_norm"] == 1


def test_an_autograd_function_without_gradients_is_its_forward():
    module = WithFunction()
    run, report = compiled(module)
    with torch.no_grad():
        torch.testing.assert_close(run(X), module(X))
    assert not [n for n in report.graphs[0].graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]


class Checkpointed(nn.Module):
    def __init__(self, checkpoints=True, dropout=0.0):
        super().__init__()
        self.norm, self.attention, self.checkpoints, self.dropout = Norm(), Attention(), checkpoints, dropout

    def block(self, x):
        return F.dropout(self.attention(self.norm(x)), self.dropout, self.training)

    def forward(self, x):
        run = (lambda y: checkpoint(self.block, y, use_reentrant=False)) if self.checkpoints else self.block
        return run(x).sin() + run(x * 2)


def saved(report):
    """How many values the forward graph hands to the backward graph."""
    return len(next(a for a in report.aot if not a.is_backward).gm.graph.output_node().args[0])


def test_checkpoints_are_fused_and_save_less():
    report, plain = check(Checkpointed(), X), check(Checkpointed(checkpoints=False), X)
    assert report.counts["attention"] == plain.counts["attention"] == 2
    assert saved(report) < saved(plain)


def test_dropout_inside_a_checkpoint_draws_once():
    check(Checkpointed(dropout=0.5), X, against="aot_eager")


def test_an_autograd_function_inside_a_checkpoint():
    class Both(WithFunction):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False).sin()

    check(Both(), X)


def test_cond():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = Norm(), nn.Linear(16, 16)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: self.linear(y).sin(), lambda y: y.cos(), (self.norm(x),))

    module = Branches()
    for sign in (1, -1):
        check(module, sign * X.abs())


def test_a_transform_of_torch_func_is_left_to_aot_with_a_warning():
    class Mapped(nn.Linear):
        def forward(self, x):
            return torch.vmap(lambda y: torch.softmax(nn.Linear.forward(self, y) @ y.T, -1) @ y)(x)

    report = check(Mapped(16, 16), X)
    assert "torch.func transform" in report.warnings[0] and not report.fusions


# ---------------------------------------------------------------- which weights, and how often


def test_a_frozen_base_with_a_trained_adapter():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = Norm().requires_grad_(False), Attention().requires_grad_(False)
            self.adapter = nn.Linear(16, 16)

        def forward(self, x):
            h = self.norm(x)
            return self.attention(h) + self.adapter(h)

    report = check(Adapted(), X)
    assert report.counts["attention"] == report.counts["rms_norm"] == 1


def test_tied_weights_and_a_module_used_twice():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention, self.head = nn.Embedding(32, 16), Attention(), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.attention(self.attention(self.embed(ids))))

    assert check(Tied(), torch.arange(24).view(2, 12) % 32).counts["attention"] == 2


def test_gradients_accumulate_and_a_graph_may_be_retained():
    module = Attention()
    run, _ = compiled(module)
    found = []
    for forward in (module, run):
        module.zero_grad()
        forward(X).square().mean().backward()
        loss = forward(2 * X).sin().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad.clone() for p in module.parameters()])
    same(*found)


def test_a_second_derivative_is_refused_and_not_wrong():
    x = X.clone().requires_grad_()
    for run in (compiled(Attention())[0], lambda x: torch.ops.tileweld.attention(*[x[None]] * 3, [], [], "s", "True", float("-inf"), "", "nan")):
        (grad,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward|no autograd formula"):
            grad.square().sum().backward()


def test_autocast_is_as_near_to_float64_as_eager():
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = Norm(), Attention()

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
                return self.attention(self.norm(x))

    torch.manual_seed(0)
    module, exact = (m := Auto()), copy.deepcopy(m).double()
    run, report = compiled(copied := copy.deepcopy(module))
    ours = state(run, copied, X)
    assert report.counts["attention"] == 1
    for a, b, c in zip(state(module, module, X), ours, state(exact, exact, X.double()), strict=True):
        assert (b - c).abs().max() <= 2 * (a - c).abs().max() + 1e-3 * c.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_types_keep_statistics_in_the_dtype_that_the_backward_reads(dtype):
    """On a CPU torch's layer norm saves its mean in x's dtype; two in a row, so that the second one's parts read what the first one's made."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.LayerNorm(32), nn.LayerNorm(32)).to(dtype)
    exact, other, x = copy.deepcopy(module).double(), copy.deepcopy(module), torch.randn(2, 7, 32, dtype=dtype)
    run, _ = compiled(other, target="auto")
    for a, b, c in zip(state(module, module, x), state(run, other, x), state(exact, exact, x.double()), strict=True):
        assert b.dtype == dtype and (b - c).abs().mean() <= 2 * (a - c).abs().mean() + 1e-4 * c.abs().mean()


def test_dropout_keeps_its_random_stream_and_modes_switch():
    """torch.compile with kernels against eager: the same seed drops the same elements; eval drops none."""
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down, self.drop = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.3)

        def forward(self, x):
            return x + self.drop(self.down(self.drop(F.gelu(self.up(self.norm(x))))))

    module = MLP()
    run, _ = compiled(module, target="auto")
    for training in (False, True, False):
        module.train(training)
        found = []
        for forward in (module, run):
            torch.manual_seed(5)
            found.append(forward(X))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0], module(X)) is not training


@pytest.mark.parametrize("library", [False, True])
def test_dropout_of_attention_weights_is_left_alone(library):
    class Library(Attention):
        def forward(self, x):
            return F.scaled_dot_product_attention(*self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4), dropout_p=0.2)

    report = check(Library() if library else Attention(dropout=0.2), X, against="aot_eager")
    assert report.counts["attention"] == 0


def test_batch_norm_updates_its_statistics():
    module = nn.Sequential(nn.Linear(16, 16), nn.Flatten(0, 1), nn.BatchNorm1d(16), nn.ReLU())
    check(module, X)
