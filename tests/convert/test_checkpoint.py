"""Quantised checkpoints: what is written comes back bit for bit; a file that is truncated, foreign or of another model changes nothing."""
import copy
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from tileweld.compiler.ir.int8_scheme import SCHEMES

from .test_quantize import IDS, Model, state


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path):
    """(the quantised model, the path of its checkpoint)"""
    model = Model(tied=True)
    convert.quantize_(model, "weight_only", group=8)
    convert.save_quantized(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_comes_back_bit_for_bit(tmp_path, scheme, tied):
    model, other = Model(tied=tied).bfloat16(), Model(tied=tied).bfloat16()
    convert.quantize_(model, scheme, calibration=IDS if scheme == "llm_int8" else None)
    convert.save_quantized(model, tmp_path / "a")
    assert convert.load_quantized(other, tmp_path / "a") is other
    assert torch.equal(other(IDS), model(IDS)) and other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    gate = other.blocks[0].gate
    assert (gate.activation, gate.threshold, gate.columns is None) == (model.blocks[0].gate.activation, model.blocks[0].gate.threshold, scheme != "llm_int8")
    if tied:
        assert other.table.q is other.lm_head.q if scheme == "weight_only" else other.table.weight is other.lm_head.weight
    convert.load_quantized(other, tmp_path / "a")  # onto a model that is quantised already
    assert torch.equal(other(IDS), model(IDS))
    with torch.device("meta"):
        fresh = Model(tied=tied).bfloat16()
    assert torch.equal(convert.load_quantized(fresh, tmp_path / "a")(IDS), model(IDS))


def test_the_header_is_readable_and_shared_tensors_are_written_once(saved):
    model, path = saved
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tileweld.int8"])
        names = set(file.keys())
    row = header["modules"]["blocks.0.gate"]
    assert header["version"] == 1 and row["group"] == 8 and row["shape"] == [48, 32] and row["activation"] == "float" and row["scale"][0] == model.blocks[0].gate.scale.min().item()
    assert header["shared"] == {"lm_head.q": "table.q", "lm_head.scale": "table.scale"} and "lm_head.q" not in names and "blocks.1.norm.weight" in names
    assert path.stat().st_size < 1.1 * sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if n not in header["shared"]) + 4000


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fails(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        convert.save_quantized(model, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def edited(path, change_header=lambda h: None, change_tensors=lambda t: None):
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["tileweld.int8"]), {name: file.get_tensor(name) for name in file.keys()}
    change_header(header)
    change_tensors(tensors)
    save_file(tensors, path, {"tileweld.int8": json.dumps(header)})


DAMAGE = {
    "there is no such file": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "truncated, or": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "truncated, or no safetensors": lambda path: path.write_bytes(b""),
    "no safetensors file": lambda path: path.write_bytes(pickle.dumps(Bomb(path.with_name("loaded")))),
    "without its header": lambda path: save_file({"a": torch.ones(2)}, path),
    "its header is not": lambda path: edited(path, lambda h: h.update(format="other")),
    "version 2": lambda path: edited(path, lambda h: h.update(version=2)),
    "its header says of 'blocks.0.gate'": lambda path: edited(path, lambda h: h["modules"]["blocks.0.gate"].update(activation="int3")),
    "no module blocks.9.gate": lambda path: edited(path, lambda h: h["modules"].update({"blocks.9.gate": h["modules"]["blocks.0.gate"]})),
    "is said to be 'nothing'": lambda path: edited(path, lambda h: h["shared"].update({"lm_head.q": "nothing"})),
    "it lacks blocks.1.norm.weight": lambda path: edited(path, change_tensors=lambda t: t.pop("blocks.1.norm.weight")),
    "the model has no spare": lambda path: edited(path, change_tensors=lambda t: t.update(spare=torch.ones(1))),
    "rows or scales of blocks.0.up": lambda path: edited(path, change_tensors=lambda t: t.update({"blocks.0.up.scale": t["blocks.0.up.scale"].double()})),
    "blocks.0.up is": lambda path: edited(path, change_tensors=lambda t: t.update({"blocks.0.up.q": t["blocks.0.up.q"][:, :8].contiguous()})),
    "blocks.0.norm.weight is": lambda path: edited(path, change_tensors=lambda t: t.update({"blocks.0.norm.weight": torch.ones(3)})),
    "bias of blocks.0.down": lambda path: edited(path, change_tensors=lambda t: t.pop("blocks.0.down.bias")),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_file_that_does_not_fit_changes_nothing(saved, words):
    _, path = saved
    DAMAGE[words](path)
    model = Model(tied=True)
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(ConversionError, match=words):
        convert.load_quantized(model, path)
    assert dict(model.named_modules()) == modules and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not path.with_name("loaded").exists()


def test_models_that_do_not_fit(saved, tmp_path):
    _, path = saved
    for other, words in ((Model(layers=3), "lacks blocks.2"), (Model(layers=1), "no module blocks.1"), (Model(width=40), "in the model"), (torch.nn.Sequential(torch.nn.Linear(2, 2)), "no module")):
        before = state(other)
        with pytest.raises(ConversionError, match=words):
            convert.load_quantized(other, path)
        assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    with pytest.raises(ConversionError, match="no int8 modules"):
        convert.save_quantized(Model(), tmp_path / "b")


def test_a_model_that_was_copied_or_moved_saves_the_same(saved, tmp_path):
    model, path = saved
    convert.save_quantized(copy.deepcopy(model), tmp_path / "b")
    assert torch.equal(convert.load_quantized(Model(tied=True), tmp_path / "b")(IDS), model(IDS))
