"""reassociate: absorbed attention equals what was written, for all spellings, and is chosen only where it is cheaper."""

import copy

import pytest
import torch
from torch.nn import functional as F

import tileweld
from tileweld import models, passes
from tileweld.compiler.backend import rewrite
from tileweld.compiler.options import Options
from tileweld.compiler.report import Report

from .mla_block import Block, inputs

SPELLINGS = {"halves": {}, "neighbours": dict(layout="neighbours"), "q_rank": dict(q_rank=12), "separate": dict(q_rank=12, separate=True), "bias": dict(bias=True), "padded": dict(pad=4), "padded_bias": dict(pad=4, bias=True),
             "split_logits": dict(split=True), "yarn_scale": dict(scale=1.4), "own_products": dict(own_kv_products=True, bias=True), "gate": dict(broken="gate")}


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


def made(report):
    return [f.detail for f in report.fusions if f.rewrite == "reassociate"]


def check(rewriting, block, args, tolerance=1e-10, count=1, **options):
    """The rewrites are counted, float64 agrees to 1e-10 of the largest value, and verification by replay finds nothing."""
    with torch.no_grad():
        exact = block(*args)
    got, report = rewriting.rewritten(block, *args, verify=True, **options)
    assert len(made(report)) == count, [(r.rewrite, r.reason) for r in report.refusals]
    assert error(got, exact) <= tolerance * exact.abs().max()
    return report


@pytest.mark.parametrize("new", [1, 7])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_absorbed_is_equal(spelling, new, rewriting):
    check(rewriting, Block(**SPELLINGS[spelling]).double(), inputs(new, 60))


@pytest.mark.parametrize("spelling", ["halves", "bias", "split_logits"])
def test_absorbed_is_equal_for_171_new_tokens(spelling, rewriting):
    """Sq* is 16 * 15 / (16 - 15) = 240 here."""
    check(rewriting, Block(**SPELLINGS[spelling]).double(), inputs(171, 700, batch=1))


@pytest.mark.parametrize("new", [1, 7, 171])
def test_errors_in_float32_are_at_most_twice_those_of_the_naive_form(new, rewriting):
    block, args = Block(), inputs(new, 700, batch=1, dtype=torch.float32)
    with torch.no_grad():
        exact = copy.deepcopy(block).double()(*(x.double() for x in args))
        naive = block(*args)
    got, report = rewriting.rewritten(block, *args)
    assert made(report) and error(got, exact) <= 2 * error(naive, exact)


def test_two_products_of_the_queries_become_one_matrix_where_that_is_smaller(rewriting):
    """nope 15 > 12 * 16 / 28: W_UQ W_UK is folded; with fold_weights off it would be multiplied at every call."""
    for block in (Block(q_rank=12, separate=True).double(), Block(q_rank=12).double(), Block(q_rank=12, layout="neighbours", split=True).double(), Block().double()):
        args = inputs(1, 60)
        report = check(rewriting, block, args)
        assert "(x [Wq Wk]) c" in made(report)[0]
        assert "[Wq Wk]" not in made(check(rewriting, block, args, fold_weights=False))[0]


@pytest.mark.parametrize("new", [1, 5])
def test_the_part_with_rotary_gets_its_rows_of_the_projection(new, rewriting):
    """One projection of both parts, as DeepSeek has it: nothing multiplies by the whole of it any more, and 4 heads of 4 rows are gathered."""
    report = check(rewriting, Block(q_rank=12).double(), inputs(new, 60))
    widths = sorted(w.meta["val"].shape[0] for n in report.graphs[0].graph.nodes if str(n.target) == "tileweld.linear.default" for w in n.args[1])
    assert 4 * 19 not in widths and 4 * 4 in widths and 4 * 16 in widths, widths  # q_pe, x [Wq Wk]


def test_whoever_reads_the_whole_projection_keeps_it(rewriting):
    """A norm over nope and rope together: the product is computed anyway."""
    class Normed(Block):
        def forward(self, x, latents, keys):
            return super().forward(x, latents, keys) + self.q(F.rms_norm(self.q_a(x), (12,))).square().mean()

    assert "[Wq Wk]" not in made(check(rewriting, Normed(q_rank=12).double(), inputs(1, 60)))[0]


def test_for_the_sizes_of_deepseek_v3_it_is_never_made(rewriting):
    """128 < 1536 * 512 / 2048 = 384, with 8 of its 128 heads: neither for one token nor for many."""
    block = Block(hidden=24, heads=8, latent=512, nope=128, rope=64, v=128, q_rank=1536)
    for new, cached in ((1, 40), (100, 900)):
        args = inputs(new, cached, batch=1, latent=512, rope=64, dtype=torch.float32)
        _, report = rewriting.rewritten(block, *args)
        assert "(x Wq) Wk) c" in made(report)[0] and "[Wq Wk]" not in made(report)[0].split(":")[0]


def test_a_prefill_without_a_prefix_stays_as_it_is(rewriting):
    got, report = rewriting.rewritten(Block(hidden=96, latent=24, nope=8, v=8).double(), *inputs(40, 0, hidden=96, latent=24))
    assert not made(report) and not [r for r in report.refusals if r.rewrite == "reassociate"]
    (kept,) = [f.detail for f in report.kept if f.rewrite == "reassociate"]
    assert kept.startswith("(x Wq) (Wk c); q k; P (c Wv): ") and "FLOPs" in kept


def test_the_report_prints_the_polynomials_the_choice_and_the_crossover(rewriting):
    _, report = rewriting.rewritten(Block().double(), *inputs(1, 60))
    (text,) = made(report)
    assert text.startswith("(x [Wq Wk]) c; q k; (P c) Wv: 288*B*Sq*Tk + 4992*B*Sq FLOPs") and "as written ((x Wq) (Wk c); q k; P (c Wv))" in text and "fewer FLOPs for Sq < 240*Tk/(Tk + 132), 240.0 for many keys" in text


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("broken, options, reason", [
    ("norm", {}, "rms_norm stands between the latent and the keys of every head"), ("rotary", {}, "stands between the latent and the keys of every head"),
    ("returned", {}, "the expanded keys and values are also used by"), ("sink", dict(bias=True), "a bias of the keys adds to the scores of a row, and the sink is a score without a bias"),
    ("finite", dict(bias=True), "a bias of the keys adds to the scores of a row, and masked keys have the score -2000.0"),
    ("sink", dict(bias="v", own_kv_products=True), "a bias of the values counts once for every row, and the weights of a row add up to less than 1"), ("gate", dict(bias=True), "a bias of the keys adds to the scores of a row, and the s"),
])
def test_refused(broken, options, reason, rewriting):
    block, args = Block(broken=broken, **options).double(), inputs(7 if broken == "finite" else 1, 60)  # one token sees all keys: no mask is left
    got, report = rewriting.rewritten(block, *args)
    reasons = [r.reason for r in report.refusals if r.rewrite == "reassociate"]
    assert len(reasons) == 1 and reason in reasons[0] and not made(report)
    with torch.no_grad():
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, block(*args))), strict=True):
            assert error(a, b) <= 1e-10


def test_a_sink_without_a_bias_is_no_obstacle(rewriting):
    check(rewriting, Block(broken="sink").double(), inputs(1, 60))


def test_training_keeps_the_order_and_refuses_nothing_and_frozen_weights_are_moved(rewriting):
    block, args = Block().double(), inputs(1, 60)
    got, report = rewriting.rewritten(block, *args, grad=True)
    (kept,) = [k for k in report.kept if k.rewrite == "reassociate"]
    assert "is cheaper, but" in kept.detail and "is trained" in kept.detail and not made(report) and not report.refusals
    got, report = rewriting.rewritten(block.requires_grad_(False), *args, grad=True)
    assert made(report)


# ---------------------------------------------------------------- sizes that are symbols


def test_a_symbolic_number_of_tokens_compiles_each_side_once():
    """The choice at the first call's size is guarded: up to the crossover one graph, beyond it another, both right."""
    graphs, report, checked = [], Report(), Options.parse({"target": "reference"}, tuple(p.NAME for p in passes.PIPELINE))

    def backend(gm, example_inputs):
        graphs.append(rewrite(gm, example_inputs, checked, report))
        return graphs[-1].forward

    torch._dynamo.reset()
    block, cached = Block(latent=16, nope=8, v=8, hidden=24).double(), 100  # Sq* = 16 * 8 / 8 = 16 for many keys
    block.q.bias = torch.nn.Parameter(torch.randn(4 * 12, dtype=torch.float64))  # else there are four orders for four ranges: x [Wq Wk] moves fewer bytes at some of these small sizes

    def step(x, latents, keys):
        return block(x, latents, keys)

    compiled, (x, latents, keys) = torch.compile(step, backend=backend), inputs(60, cached)
    with torch.no_grad():
        for n in (5, 9, 3, 60, 40, 25, 4):
            part = x[:, :n].contiguous()
            torch._dynamo.mark_dynamic(part, 1)
            torch.testing.assert_close(compiled(part, latents, keys), block(part, latents, keys), rtol=1e-10, atol=1e-10)
    assert len(graphs) == 2 and len(made(report)) == 1 and len(report.kept) == 1
    assert "guarded: " in made(report)[0] and "guarded: " in report.kept[0].detail


def test_a_promised_range_is_not_narrowed_by_a_guard(rewriting):
    """mark_dynamic(x, 1, min=2, max=4096) makes a narrower guard an error: one graph then serves all sizes, with the order that is best at the first."""
    block, args = Block(latent=16, nope=8, v=8).double(), inputs(5, 100)
    torch._dynamo.mark_dynamic(args[0], 1, min=2, max=4096)
    report = check(rewriting, block, args)
    assert "not guarded: mark_dynamic promises a range" in made(report)[0]


def test_the_prefix_and_the_new_tokens_may_both_be_symbols(rewriting):
    """Two symbols: the inequality of the costs is the guard."""
    for new, cached, count in ((3, 100, 1), (60, 20, 0)):
        block, args = Block(latent=16, nope=8, v=8).double(), inputs(new, cached)
        for x in args:
            torch._dynamo.mark_dynamic(x, 1)
        check(rewriting, block, args, count=count)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("label", ["", *models.load("deepseek_mla").VARIANTS])
def test_the_model_with_its_cache(label):
    """A prefill of 12 and single steps through the same cache: the prefill stays naive or not as sizes say, the steps absorb; both are eager's."""
    torch._dynamo.reset()
    module = models.load("deepseek_mla")
    model = module.build(**(module.VARIANTS[label] if label else {}))
    tokens = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    compiled, cache, eager_cache = torch.compile(model, backend="tileweld"), model.new_cache(2, 64), model.new_cache(2, 64)
    with torch.no_grad():
        for start, stop in ((0, 12), (12, 13), (13, 14), (14, 15)):
            positions = torch.arange(start, stop)
            torch.testing.assert_close(compiled(tokens[:, start:stop], cache, positions), model(tokens[:, start:stop], eager_cache, positions), rtol=1e-4, atol=1e-5)
        for a, b in zip(cache, eager_cache):
            torch.testing.assert_close(a[0], b[0])
        report = tileweld.explain(model, tokens[:, 15:], cache, torch.tensor([15]), options={"verify": True})
    assert len(made(report)) == model.config.layers


def test_the_cache_of_a_step_is_written_in_place():
    """Neither the update nor the product of q and k copies the cache: no kernel and no call but index_copy_ has a result of its size."""
    torch._dynamo.reset()
    module = models.load("deepseek_mla")
    model = module.build(layers=1)
    with torch.no_grad():
        report = tileweld.explain(model, torch.ones(1, 1, dtype=torch.long), model.new_cache(1, 512), torch.tensor([3]))
    assert report.fallbacks["index_copy"] + report.fallbacks["index_copy_"] == 2
    assert made(report) and not any("cat" in k.implementation for k in report.kernels)


@pytest.mark.parametrize("mix", ["keys", "queries"])
def test_collaborative_heads_scale_the_queries(mix, rewriting):
    """W_K x times m_h for every head of the cache becomes one shared key and m_h times q; written that way it is left alone."""
    module = models.load("collaborative")
    model = module.build(mix=mix, layers=1).double()
    cache = [(torch.randn(2, 40, 32, dtype=torch.float64), torch.randn(2, 4, 40, 16, dtype=torch.float64))]
    args = (torch.ones(2, 1, dtype=torch.long), cache, torch.tensor([30]))
    with torch.no_grad():
        exact = model(args[0], copy.deepcopy(cache), args[2])
    got, report = rewriting.rewritten(model, args[0], copy.deepcopy(cache), args[2], verify=True)
    assert error(got, exact) <= 1e-10 * exact.abs().max()
    assert [d.split(":")[0] for d in made(report)] == (["((x Wq) Wk) c"] if mix == "keys" else [])


@pytest.mark.parametrize("label", ["", *models.load("mfa").VARIANTS])
def test_queries_of_low_rank_and_one_key_head_are_the_best_order(label, rewriting):
    """MFA has one key head for all, and rotary on both sides: nothing is left to choose."""
    module = models.load("mfa")
    model = module.build(layers=1, **(module.VARIANTS[label] if label else {})).double()
    got, report = rewriting.rewritten(model, *module.example_inputs(), verify=True)
    with torch.no_grad():
        assert error(got, model(*module.example_inputs())) <= 1e-6
    assert not made(report) and report.counts["attention"] == 1
