"""Every spelling of a layer norm becomes aten.layer_norm with eager's result; whatever differs is refused, with the reason."""
import pytest
import torch
import torch.nn.functional as F

EPS = 1e-5


def mean(x):
    return x.mean(-1, keepdim=True)


def wide(x, w, b, core):
    return (core(x.float()) * w.float() + b.float()).to(x.dtype)


def centred_square(x):
    c = x - mean(x)
    return c / torch.sqrt((c**2).mean(-1, keepdim=True) + EPS)


def biased_var(x):
    return (x - mean(x)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


SPELLINGS = {
    "centred": lambda x, w, b: w * centred_square(x) + b,
    "var": lambda x, w, b: b + biased_var(x) * w,
    "var correction": lambda x, w, b: (x - mean(x)) / (torch.var(x, -1, correction=0, keepdim=True) + EPS) ** 0.5 * w + b,
    "var_mean by hand": lambda x, w, b: (x - mean(x)) / torch.sqrt(((x - mean(x)) ** 2).sum(-1, keepdim=True) / x.shape[-1] + EPS) * w + b,
    "wide": lambda x, w, b: wide(x, w, b, centred_square),
    "wide var": lambda x, w, b: wide(x, w, b, biased_var),
    "cohere": lambda x, w, b: (w.float() * ((x.float() - mean(x.float())) * torch.rsqrt((x.float() - mean(x.float())).pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype),
    "no weight": lambda x, w, b: centred_square(x),
    "weight alone": lambda x, w, b: biased_var(x) * w,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_the_library_norm(spelling, dtype, rewriting):
    inputs = torch.randn(2, 5, 48).to(dtype), torch.randn(48).to(dtype), torch.randn(48).to(dtype)
    report = rewriting.check(SPELLINGS[spelling], *inputs, count={"layer_norm": 1, "rms_norm": 0})
    assert not report.refusals
    assert [n for n in report.graphs[0].graph.nodes if n.target is torch.ops.aten.layer_norm.default]


@pytest.mark.parametrize("spelling", ["centred", "wide var", "weight alone"])
def test_dynamic_shapes_and_gradients(spelling, rewriting):
    inputs = torch.randn(2, 5, 48), torch.randn(48), torch.randn(48)
    rewriting.check(SPELLINGS[spelling], *inputs, count={"layer_norm": 1}, dynamic=True)
    rewriting.check_gradients(SPELLINGS["centred" if "wide" in spelling else spelling], *inputs, count={"layer_norm": 1})


def test_half_with_a_float_weight_rounds_once(rewriting):
    rewriting.check(SPELLINGS["wide"], torch.randn(3, 48).half(), torch.randn(48), torch.randn(48), count={"layer_norm": 1})


def test_the_library_norm_stays(rewriting):
    rewriting.silent("layer_norm", lambda x, w: F.layer_norm(x, (48,), w), torch.randn(3, 48), torch.randn(48))


def annotated(x, w, b):
    return w * (x - mean(x)) / (x.std(-1, keepdim=True) + 1e-6) + b


def escaping(x, w, b):
    c = x - mean(x)
    y = c * torch.rsqrt((c * c).mean(-1, keepdim=True) + EPS)
    return y * w + b, c


REFUSED = {
    "annotated transformer": (annotated, "std divides by D - 1"),
    "unbiased variance": (lambda x, w, b: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + EPS) * w + b, "var divides by D - 1"),
    "eps on the deviation": (lambda x, w, b: (x - mean(x)) / (x.std(-1, keepdim=True, unbiased=False) + EPS) * w + b, "eps is added to the deviation"),
    "escape": (escaping, "sub is also used outside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_miss_is_refused_with_its_reason(name, rewriting):
    fn, reason = REFUSED[name]
    rewriting.refused("layer_norm", fn, torch.randn(3, 48), torch.randn(48), torch.randn(48), reason=reason)


def test_float16_squares_are_refused(rewriting):
    rewriting.refused("layer_norm", SPELLINGS["centred"], torch.randn(3, 48).half(), torch.randn(48).half(), torch.randn(48).half(), reason="overflow")


@pytest.mark.parametrize("fn", [
    lambda x, w, b: (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + EPS) * w + b,  # a batch norm
    lambda x, w, b: x - mean(x),
    lambda x, w, b: (x - mean(x)).abs() * w,
    lambda x, w, b: F.group_norm(x[..., None], 4, w, b),
])
def test_what_is_no_layer_norm_is_passed_over(fn, rewriting):
    rewriting.silent("layer_norm", fn, torch.randn(3, 48), torch.randn(48), torch.randn(48))
