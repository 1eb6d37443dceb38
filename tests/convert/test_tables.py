"""Tables of embeddings as int8 rows: which are taken, what they compute, in checkpoints and compiled."""
import functools
import json

import pytest
import safetensors
import torch
from tileweld import convert
from tileweld.compiler.backend import tileweld
from tileweld.compiler.report import Report
from tileweld.convert import tables
from torch import nn

IDS = torch.tensor([[3, 1, 4, 1], [5, 39, 2, 0]])


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.positions = nn.Embedding(40, 32, padding_idx=padding_idx), nn.Embedding(4, 32)
        self.norm, self.up, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 40)
        self.to(dtype).eval()

    def forward(self, ids):
        return self.lm_head(torch.nn.functional.gelu(self.up(self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1]))))))


@pytest.fixture
def small(monkeypatch):
    """Tables of 40 rows are large."""
    monkeypatch.setattr(tables, "LARGE", 40 * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 8])
def test_rows_are_those_of_the_table_rounded(small, dtype, group):
    model, exact = Model(dtype, padding_idx=1), Model(dtype, padding_idx=1)
    report = convert.quantize_(model, "weight_only", group=group)
    w = exact.words.weight.detach().double()
    scale = w.reshape(40, -1, group or 32).abs().amax(-1) / 127
    expected = ((w.reshape(40, -1, group or 32) / scale.clamp_min(1e-30)[..., None]).round() * scale[..., None]).reshape(40, 32)
    assert isinstance(model.words, convert.Int8Embedding) and model.words.padding_idx == 1 and isinstance(model.positions, nn.Embedding)
    torch.testing.assert_close(model.words(IDS).double(), expected[IDS], rtol=2 * torch.finfo(dtype).eps, atol=float(scale.max()) * 1e-3 if dtype is torch.float32 else float(scale.max()))
    assert model.words(IDS).dtype == dtype and not model.words(torch.tensor([1])).any()
    (row,) = [r for r in report.layers if r.name == "words"]
    assert row.shape == (40, 32) and row.bytes_after == 40 * 32 + 4 * scale.numel() and row.error == pytest.approx(float((w - expected).norm() / w.norm()), rel=1e-2)
    assert "saves little" in report.left_out["positions"]
    with pytest.raises(IndexError):
        model.words(torch.tensor([-1]))


def test_a_model_compiles_to_what_it_is_eagerly(small):
    model, exact = Model(), Model()
    convert.quantize_(model)
    report = Report()
    with torch.no_grad():
        got = torch.compile(model, backend=functools.partial(tileweld, report=report))(IDS)
    torch.testing.assert_close(got, model(IDS), rtol=1e-5, atol=1e-5)
    assert 0 < (got - exact(IDS)).norm() < 0.02 * exact(IDS).norm() and not report.warnings
    assert [u.reason for u in report.kernels if u.op == "region"] == ["5 ops in one kernel"] and not report.library_calls  # rows, scales, their product, and the positions' kept rows


@pytest.mark.parametrize("scheme", ["dynamic", "llm_int8"])
def test_other_schemes_take_tables_when_asked(small, scheme):
    model = Model()
    report = convert.quantize_(model, scheme)
    assert isinstance(model.words, nn.Embedding) and "embedding=True" in report.left_out["words"]
    model = Model()
    convert.quantize_(model, scheme, embedding=True, skip=["positions"])
    assert isinstance(model.words, convert.Int8Embedding) and isinstance(model.positions, nn.Embedding)


def test_what_stays(small):
    def left(change=lambda model: None, **arguments):
        model = Model()
        change(model)
        report = convert.quantize_(model, **arguments)
        assert not isinstance(model.words, convert.Int8Embedding) and "words" not in [r.name for r in report.layers]
        assert "words" in str(report)
        return report.left_out["words"]

    assert "embedding=False" in left(embedding=False)
    assert "skip" in left(skip=["words"], embedding=True)
    assert "asks it" in left(filter_fn=lambda module, name: module.in_features > 1)
    assert "filter_fn" in left(filter_fn=lambda module, name: isinstance(module, nn.Linear), embedding=True)
    assert "max_norm" in left(lambda model: setattr(model.words, "max_norm", 1.0))
    assert "hooks" in left(lambda model: model.words.register_forward_hook(lambda *a: None))
    assert "inf or NaN" in left(lambda model: model.words.weight.data.fill_(torch.inf))
    assert "float64" in left(lambda model: model.words.double())
    assert "groups of 24" in left(lambda model: (setattr(model, "up", nn.Linear(48, 48)), setattr(model, "lm_head", nn.Linear(48, 48))), group=24)

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    assert "Scaled" in left(lambda model: setattr(model, "words", Scaled(40, 32)))
    assert "lm_head, which stays float" in left(lambda model: (setattr(model, "lm_head", nn.Linear(32, 40)), setattr(model.lm_head, "weight", model.words.weight)), skip=["lm_head"], embedding=True)


@pytest.mark.parametrize("arguments, word", [({"skip": ["words"]}, "skip='words'"), ({"embedding": False}, "embedding=False")])
def test_a_tied_table_stays_where_it_is_asked_for(arguments, word):
    model = Model()
    model.lm_head = nn.Linear(32, 40, bias=False)
    model.lm_head.weight = model.words.weight
    before = model.words(IDS)
    report = convert.quantize_(model, embedding=arguments.pop("embedding", None), **arguments)
    assert isinstance(model.lm_head, convert.Int8Linear) and type(model.words) is nn.Embedding and torch.equal(model.words(IDS), before) and word in str(report)


def test_two_tables_of_one_weight_share_their_rows(small):
    model = Model()
    model.decoder_words = nn.Embedding(40, 32)
    model.decoder_words.weight = model.words.weight
    report = convert.quantize_(model)
    assert model.decoder_words.q is model.words.q and [r.bytes_before for r in report.layers if "words" in r.name] == [40 * 32 * 4, 0]


def test_by_size():
    model = nn.ModuleDict({"words": nn.Embedding(4096, 256), "fewer": nn.Embedding(4095, 256), "up": nn.Linear(256, 8)})
    report = convert.quantize_(model)
    assert isinstance(model.words, convert.Int8Embedding) and isinstance(model.fewer, nn.Embedding) and report.bytes_after < 0.66 * report.bytes_before


def test_checkpoints(small, tmp_path):
    model, other = Model(padding_idx=1), Model(padding_idx=1)
    convert.quantize_(model)
    path = tmp_path / "model.safetensors"
    convert.save_quantized(model, path)
    with safetensors.safe_open(path, "pt") as file:
        row = json.loads(file.metadata()["tileweld.int8"])["modules"]["words"]
    assert row["kind"] == "embedding" and row["error"] == model.words.error > 0
    convert.load_quantized(other, path)
    assert torch.equal(other(IDS), model(IDS)) and other.words.padding_idx == 1 and other.words.error == model.words.error


def test_a_loaded_table_stays_in_the_file(small, tmp_path, monkeypatch):
    """Of which only what is looked up becomes resident; the rows of layers move to large pages, those of a tied table with them."""
    moved = []
    monkeypatch.setattr(convert.checkpoint, "settled", lambda x: moved.append(tuple(x.shape)) or x)
    for tied in (False, True):
        model, other = Model(), Model()
        for m in (model, other) if tied else ():
            m.lm_head.weight = m.words.weight = nn.Parameter(torch.randn(40, 64))
            m.words.embedding_dim = 64
        convert.quantize_(model, skip=["up"])
        convert.save_quantized(model, tmp_path / "model.safetensors")
        convert.load_quantized(other, tmp_path / "model.safetensors")
        assert torch.equal(other.words(IDS), model.words(IDS)) and moved == [(40, 64)]
        moved.clear()
