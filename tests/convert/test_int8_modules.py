"""Int8Linear and Int8Embedding where a float layer stood: what reads it finds what it found, what writes to it is refused, nothing is lost in silence."""
import copy
import math
import pickle

import pytest
import torch
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from tileweld.compiler.ir.int8_scheme import SCHEMES
from torch import nn


def layer(n=24, k=16, scheme="weight_only", **settings):
    """(an int8 layer, the float one)"""
    torch.manual_seed(0)
    exact = nn.Linear(k, n)
    model = nn.Sequential(copy.deepcopy(exact))
    convert.quantize_(model, scheme, **settings)
    return model[0], exact


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def assigned(w):
    w.data = torch.zeros(2)


WRITES = {
    "a method": lambda w: w.mul_(0), "an operator": lambda w: w.__iadd__(1), "data": lambda w: w.data.add_(1), "data, assigned": assigned, "an element": lambda w: w.__setitem__((0, 0), 1),
    "a view": lambda w: w[0].view(4, 4).T.zero_(), "detached": lambda w: w.detach().copy_(torch.zeros(24, 16)), "an initialisation": nn.init.zeros_, "out": lambda w: torch.add(w, w, out=w),
    "several": lambda w: torch._foreach_mul_([w], 2.0), "a parameter of it": lambda w: nn.Parameter(w).data.zero_()}


@pytest.mark.parametrize("way", WRITES)
def test_a_weight_that_is_computed_takes_no_writing(way):
    int8, _ = layer()
    before = int8.weight.clone()
    with torch.no_grad(), pytest.raises(ConversionError, match="would be lost.*first, then quantize_"):
        WRITES[way](int8.weight)
    assert torch.equal(int8.weight, before)


def test_a_weight_that_is_computed_can_be_read_in_every_way():
    int8, exact = layer()
    w, x = int8.weight, torch.randn(3, 16)
    assert type(w @ x.T) is type(w.clone()) is type(w.float() * 2) is torch.Tensor and type(w.detach()) is type(w) and w.dtype == torch.float32 and w.shape == (24, 16)
    y = x @ w.T
    y.add_(1).mul_(2)  # what is computed from it belongs to whoever computed it
    torch.zeros(24, 16).add_(w)
    torch.zeros(24, 16).copy_(w)
    w.clone().zero_()
    assert copy.deepcopy(w).sum() == w.sum() and (nn.functional.linear(x, w, int8.bias) - exact(x)).norm() < 0.02 * exact(x).norm() and w.numpy().shape == (24, 16) and repr(w).startswith("tensor(")
    with pytest.raises(ConversionError, match="cannot be set"):
        int8.weight = nn.Parameter(torch.zeros(24, 16))


def test_adapters_of_peft_are_merged_before_or_not_at_all():
    """peft adds to `weight.data`: into a tensor that is gone at the next reading, and the adapter with it."""
    peft = pytest.importorskip("peft", reason="peft is an extra: pip install tileweld[test]")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    x, make = torch.randn(3, 16), lambda: peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False)).eval()
    with torch.no_grad():
        model = make()
        exact = model(x)
        merged = make()
        merged.load_state_dict(model.state_dict())
        merged = merged.merge_and_unload()
        convert.quantize_(merged)
        assert (merged(x) - exact).norm() < 0.02 * exact.norm()
        convert.quantize_(model)
        assert (model(x) - exact).norm() < 0.02 * exact.norm()  # beside int8 rows
        for unload in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ConversionError, match="merge adapters"):
                unload()
        model = make()
        model.merge_adapter()
        convert.quantize_(model)
        with pytest.raises(ConversionError, match="merge adapters"):
            model.unmerge_adapter()
    partly = copy.deepcopy(base)
    convert.quantize_(partly, skip=["2"])
    with pytest.raises(ValueError, match="Int8Linear.*is not supported"):
        peft.get_peft_model(partly, peft.LoraConfig(target_modules=["0"], r=4))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_is_that_of_a_float_layer(scheme):
    int8, exact = layer(scheme=scheme)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(3, 16), torch.randn(3, 16).bfloat16()):
            assert int8(x).dtype == exact(x).dtype == torch.bfloat16 and torch.equal(int8(x), int8(x.bfloat16()))
        assert int8(torch.randn(3, 16).double()).dtype == torch.float64
    assert int8(torch.randn(3, 16)).dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("k", "n", "shape"), [(1, 1, (3,)), (0, 4, (3,)), (4, 0, (2, 3)), (16, 24, ()), (16, 24, (0,)), (16, 24, (2, 0, 3)), (7, 1, (2, 2))])
def test_sizes_at_the_ends(scheme, k, n, shape):
    int8, exact = layer(n, k, scheme)
    x = torch.randn(*shape, k)
    with torch.no_grad():
        found, wanted = int8(x), exact(x)
    assert found.shape == wanted.shape and (found - wanted).norm() <= 0.03 * wanted.norm() and math.isfinite(int8.error)


@pytest.mark.parametrize("x", [torch.randn(4, 8), torch.randn(0, 8), torch.randn(2, 8, 8), torch.zeros(4, 16, dtype=torch.int64)])
def test_what_is_no_row_of_it_is_refused(x):
    with pytest.raises(RuntimeError, match=r"an int8 layer of 16 inputs is given .* expected floats \[..., 16\]"):
        layer()[0](x)


def test_a_table_refuses_the_numbers_that_the_float_table_refuses():
    model = Tied()
    convert.quantize_(model)
    assert isinstance(model.table, convert.Int8Embedding)
    run = torch.compile(model, backend="tileweld")
    with torch.no_grad():
        torch.testing.assert_close(run(torch.arange(10)), model(torch.arange(10)), rtol=1e-5, atol=1e-5)
        for number in (-1, 10):
            for way in (model, run):
                with pytest.raises(IndexError):
                    way(torch.tensor([number, *range(9)]))


def test_gradients_of_gradients_and_forward_mode():
    """As for the dequantised weights: f's second derivative mixes the layer's with that of what is around it. No forward mode, and no zeros in its place."""
    int8, _ = layer(scheme="dynamic")
    w, b, x = int8.weight.clone(), int8.bias, torch.randn(3, 16, requires_grad=True)

    def second(linear):
        (g,) = torch.autograd.grad((linear(x) ** 2).sum() * 0.5, x, create_graph=True)
        return torch.autograd.grad((g * x.sin()).sum(), x)[0]

    rounded = int8(x).detach() - (x.detach() @ w.T + b)  # of activations, which the value has and the gradient does not
    torch.testing.assert_close(second(int8), second(lambda x: x @ w.T + b + rounded), rtol=1e-4, atol=1e-5)
    for is_on in (True, False):
        with torch.set_grad_enabled(is_on), pytest.raises(NotImplementedError, match="no forward-mode"):
            torch.func.jvp(int8, (torch.randn(3, 16),), (torch.randn(3, 16),))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_pickles_dtypes_and_devices(scheme):
    model, x = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), torch.randn(3, 16)
    convert.quantize_(model, scheme, calibration=x if scheme == "llm_int8" else None)
    with torch.no_grad():
        wanted = model(x)
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float(), copy.deepcopy(model).share_memory(), copy.deepcopy(model).train().eval()):
            assert torch.equal(made(x), wanted) and made[0].error == model[0].error
        other = copy.deepcopy(model)
        for module in (other[0], other[2]):
            module.q.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), wanted)
        assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (3, 8)
        exported = torch.export.export(model, (x,)).module()(x)
        assert (exported - wanted).norm() < 0.03 * wanted.norm()
    with pytest.raises(RuntimeError, match="Missing key.*0.q"):
        model.load_state_dict(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_encoders_of_torch_padded_and_not(scheme):
    """Their fused call reads weights itself; the layers' own products are taken instead, padded rows as without int8."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval(), torch.randn(2, 5, 16)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        wanted, masked = model(x), model(x, src_key_padding_mask=padded)
        convert.quantize_(model, scheme)
        found, found_masked = model(x), model(x, src_key_padding_mask=padded)
        assert 0 < (found - wanted).norm() < 0.03 * wanted.norm() and (found_masked - masked)[~padded].norm() < 0.03 * masked[~padded].norm()
        with torch.enable_grad():  # where torch takes its fused call nowhere
            torch.testing.assert_close(model(x.requires_grad_()), found, rtol=1e-4, atol=1e-5)
