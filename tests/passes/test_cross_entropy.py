"""Every way to write a language model's loss becomes one op with eager's loss and gradient; what differs is refused, with the reason."""
import pytest
import torch
import torch.nn.functional as F

COUNT = {"cross_entropy": 1}


def labels(*shape, classes=11):
    t = torch.randint(0, classes, shape)
    t.view(-1)[::4] = -100
    return t


def hugging_face(logits, targets):
    logits, targets = logits.float(), F.pad(targets, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-100, reduction="mean")


def shifted(logits, targets):
    logits, targets = logits[..., :-1, :].contiguous(), targets[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def gemma(logits, targets):
    logits = torch.tanh(logits / 30.0) * 30.0
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))


SPELLINGS = {
    "hugging face": hugging_face,
    "shifted copies": shifted,
    "softcap": gemma,
    "a sum over items": lambda x, t: F.cross_entropy(x.view(-1, 11).float(), t.view(-1), reduction="sum") / 7,
    "none": lambda x, t: F.cross_entropy(x.view(-1, 11), t.view(-1), reduction="none"),
    "classes in the middle": lambda x, t: F.cross_entropy(x.transpose(1, 2), t, reduction="none"),
    "smoothing": lambda x, t: F.cross_entropy(x.transpose(1, 2), t, label_smoothing=0.1),
    "nll": lambda x, t: F.nll_loss(F.log_softmax(x.view(-1, 11), -1), t.view(-1)),
    "wide nll": lambda x, t: F.nll_loss(F.log_softmax(x.view(-1, 11), -1, dtype=torch.float32), t.view(-1), reduction="sum"),
    "module": lambda x, t: torch.nn.CrossEntropyLoss(ignore_index=3)(x.flatten(0, 1), t.flatten().abs() % 11),
    "log-probabilities": lambda x, t: x.log_softmax(-1).gather(-1, t.abs().remainder(11)[..., None]).squeeze(-1),
    "log-probabilities, wide": lambda x, t: -torch.gather(x.float().log_softmax(-1), 2, t.abs().remainder(11).unsqueeze(2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_one_op(spelling, dtype, rewriting):
    report = rewriting.check(SPELLINGS[spelling], (torch.randn(2, 5, 11) * 4).to(dtype), labels(2, 5), count=COUNT)
    assert not report.refusals


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gradients_and_dynamic_shapes(spelling, rewriting):
    inputs = torch.randn(2, 5, 11) * 4, labels(2, 5)
    rewriting.check_gradients(SPELLINGS[spelling], *inputs, count=COUNT, tolerance=1e-6)  # some spellings are float32 throughout
    rewriting.check(SPELLINGS[spelling], *inputs, count=COUNT, dynamic=True)


def call(report):
    return next(n for n in report.graphs[0].graph.nodes if n.target is torch.ops.tileweld.cross_entropy.default)


@pytest.mark.parametrize("spelling", ["hugging face", "shifted copies", "softcap"])
def test_the_op_reads_the_narrow_logits_without_a_copy(spelling, rewriting):
    _, report = rewriting.rewritten(SPELLINGS[spelling], torch.randn(2, 5, 11).bfloat16(), labels(2, 5))
    targets = {n.target for n in report.graphs[0].graph.nodes}
    assert call(report).args[0].meta["val"].dtype == torch.bfloat16 and call(report).args[0].meta["val"].dim() == 3
    assert torch.ops.aten.tanh.default not in targets and not any(n.target is torch.ops.aten.contiguous.default and n.meta["val"].dim() == 3 for n in report.graphs[0].graph.nodes)
    assert call(report).args[3] == (30.0 if spelling == "softcap" else 0.0)


def test_the_half_gradient_is_within_twice_eagers_error():
    def loss(f, x, t):
        return torch.autograd.grad(f(x, t), x)[0].double()

    x, t = torch.randn(2, 5, 11) * 4, labels(2, 5)
    half = x.bfloat16()
    exact = loss(lambda x, t: hugging_face(x, t).double(), half.double().requires_grad_(), t)
    compiled = torch.compile(hugging_face, backend="tileweld", options={"target": "reference"})
    ours, eager = (loss(f, half.clone().requires_grad_(), t) for f in (compiled, hugging_face))
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_a_cap_that_is_read_elsewhere_stays_outside(rewriting):
    def fn(x, t):
        capped = torch.tanh(x / 30.0) * 30.0
        return F.cross_entropy(capped.view(-1, 11), t.view(-1)), capped

    report = rewriting.check(fn, torch.randn(2, 5, 11), labels(2, 5), count=COUNT)
    assert call(report).args[3] == 0.0


def test_another_constant_is_no_cap(rewriting):
    report = rewriting.check(lambda x, t: F.cross_entropy((torch.tanh(x / 30.0) * 20.0).view(-1, 11), t.view(-1)), torch.randn(2, 5, 11), labels(2, 5), count=COUNT)
    assert call(report).args[3] == 0.0


def test_all_ignored_is_eagers_nan(rewriting):
    got, report = rewriting.rewritten(hugging_face, torch.randn(2, 5, 11), torch.full((2, 5), -100))
    assert report.counts["cross_entropy"] == 1 and got.isnan()


def test_a_target_out_of_bounds_raises(rewriting):
    with pytest.raises(IndexError, match="Target 11 is out of bounds"):
        rewriting.rewritten(hugging_face, torch.randn(2, 5, 11), torch.full((2, 5), 11))


def escaping(x, t):
    log_p = F.log_softmax(x, -1)
    return F.nll_loss(log_p, t), log_p.exp()


REFUSED = {
    "class weights": (lambda x, t: F.cross_entropy(x, t, x[0].abs()), "the classes have weights"),
    "probabilities": (lambda x, t: F.cross_entropy(x, x.softmax(-1)), "the targets are float32"),
    "the log-softmax escapes": (escaping, "the log-softmax is also used outside the loss, by exp"),
    "a softmax over rows": (lambda x, t: F.nll_loss(F.log_softmax(x, 0), t), "the log-softmax runs over dim 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_miss_is_refused_with_its_reason(name, rewriting):
    fn, reason = REFUSED[name]
    rewriting.refused("cross_entropy", fn, torch.randn(10, 11), torch.randint(0, 11, (10,)), reason=reason)


@pytest.mark.parametrize("fn", [
    lambda x, t: F.log_softmax(x, -1),
    lambda x, t: F.log_softmax(x, -1).gather(-1, t[:, None].expand(10, 3)),  # three classes a row
    lambda x, t: F.binary_cross_entropy_with_logits(x, x.sigmoid()),
    lambda x, t: F.nll_loss(x, t),
])
def test_what_is_no_cross_entropy_is_passed_over(fn, rewriting):
    rewriting.silent("cross_entropy", fn, torch.randn(10, 11), torch.randint(0, 11, (10,)))
