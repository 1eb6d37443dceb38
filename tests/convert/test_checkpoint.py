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


def of_gate(field, lie):
    return lambda header: header["modules"]["blocks.0.gate"].update({field: lie})


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
    "blocks.0.down bias True, and its tensors False": lambda path: edited(path, change_tensors=lambda t: t.pop("blocks.0.down.bias")),
    "bias of blocks.0.down": lambda path: edited(path, change_tensors=lambda t: t.update({"blocks.0.down.bias": t["blocks.0.down.bias"].double()})),
    r"blocks.0.up scale .*tensors \[nan": lambda path: edited(path, change_tensors=lambda t: t["blocks.0.up.scale"][3].fill_(torch.nan)),
    r"blocks.0.up scale .*its tensors \[-": lambda path: edited(path, change_tensors=lambda t: t["blocks.0.up.scale"].neg_()),
    "expected finite ones of at least 0": lambda path: edited(path, of_gate("scale", [-1.0, 1.0]), lambda t: t.update({"blocks.0.gate.scale": torch.linspace(-1, 1, 48 * 4).view(48, 4)})),
    "blocks.0.gate group 8, and its tensors 16": lambda path: edited(path, change_tensors=lambda t: t.update({"blocks.0.gate.scale": torch.ones(48, 2)})),
    "blocks.0.gate group 3, and its tensors 8": lambda path: edited(path, of_gate("group", 3)),
    r"blocks.0.gate shape \[1, 2\]": lambda path: edited(path, of_gate("shape", [1, 2])),
    "blocks.0.gate columns True": lambda path: edited(path, of_gate("columns", True)),
    "columns of blocks.0.gate": lambda path: edited(path, of_gate("columns", True), lambda t: t.update({"blocks.0.gate.columns": torch.ones(32, dtype=torch.bool)})),
    "activations of int8 with groups": lambda path: edited(path, of_gate("activation", "int8")),
    "bfloat16 in it, float32 in the model": lambda path: edited(path, of_gate("dtype", "bfloat16")),
    "header says of 'blocks.0.gate'.*'threshold': True": lambda path: edited(path, of_gate("threshold", True)),
    "header says of 'blocks.0.gate'.*'threshold': -1": lambda path: edited(path, of_gate("threshold", -1)),
    "header says of 'blocks.0.gate'.*'threshold': 1000": lambda path: edited(path, of_gate("threshold", 10**400)),
    r"header says of 'blocks.0.gate'.*'dtype': \[": lambda path: edited(path, of_gate("dtype", ["float32"])),
    "header says of 'blocks.0.gate'.*'kind': 'table'": lambda path: edited(path, of_gate("kind", "table")),
    "header says of 'table'.*'padding_idx': 'x'": lambda path: edited(path, lambda h: h["modules"]["table"].update(padding_idx="x")),
    "blocks.0.gate is a Linear, no embedding": lambda path: edited(path, lambda h: h["modules"].update({"blocks.0.gate": h["modules"]["table"]})),
    "table is a Embedding, no linear": lambda path: edited(path, lambda h: h["modules"].update(table=h["modules"]["blocks.0.gate"])),
    "header is not what it should be": lambda path: edited(path, lambda h: h["shared"].update({"lm_head.q": ["table.q"]})),
    "is in it, and said to be": lambda path: edited(path, lambda h: h["shared"].update({"blocks.0.norm.weight": "blocks.1.norm.weight"})),
    "blocks.0.norm.weight is torch.float64 in it": lambda path: edited(path, change_tensors=lambda t: t.update({"blocks.0.norm.weight": torch.ones(32, dtype=torch.float64)})),
    "version True": lambda path: edited(path, lambda h: h.update(version=True)),
    "recursion": lambda path: save_file({"a": torch.ones(2)}, path, {"tileweld.int8": "[" * 100_000}),
    "header too large": lambda path: path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:]),
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


def test_flipped_bits_of_the_header_change_nothing_unseen(saved):
    """Any byte of the header, any bit: refused, or the same model."""
    model, path = saved
    good, other = path.read_bytes(), Model(tied=True)
    end = 8 + int.from_bytes(good[:8], "little")
    wanted, fresh, refused = model(IDS), copy.deepcopy(other), 0
    for n in range(0, end, 37):
        damaged = bytearray(good)
        damaged[n] ^= 1 << n % 8
        path.write_bytes(damaged)
        try:
            convert.load_quantized(other, path)
        except ConversionError:
            refused += 1
            continue
        assert torch.equal(other(IDS), wanted), good[n - 40:n + 10]
        other = copy.deepcopy(fresh)
    assert refused > 0.9 * len(range(0, end, 37))


def test_what_the_file_cannot_fill_is_refused(saved):
    _, path = saved
    with torch.device("meta"):
        model = Model(tied=True)
        model.blocks[1].register_buffer("positions", torch.zeros(3), persistent=False)
    with pytest.raises(ConversionError, match=r"'positions' is on the meta device.*\(blocks.1\)"):
        convert.load_quantized(model, path)
    assert model.table.weight.is_meta and not isinstance(model.blocks[0].gate, convert.Int8Linear)
    model.blocks[1].positions = torch.zeros(3)
    assert not convert.load_quantized(model, path).table.q.is_meta
    for register in ("register_forward_hook", "register_full_backward_pre_hook"):
        hooked = Model(tied=True)
        getattr(hooked.blocks[0].gate, register)(lambda *a: None)
        with pytest.raises(ConversionError, match=r"has hooks.*\(blocks.0.gate\)"):
            convert.load_quantized(hooked, path)
    with pytest.raises(ConversionError, match="bfloat16 in the model"):
        convert.load_quantized(Model(tied=True).bfloat16(), path)


def test_names_and_rights_of_files(saved):
    """Names that shells stumble over and of the greatest length; a new file has the rights that the user's mask leaves, an old one keeps its own."""
    model, path = saved
    for name in (" a\n%s", "-ü", "n" * 255):
        convert.save_quantized(model, path.with_name(name))
        assert torch.equal(convert.load_quantized(Model(tied=True), os.fsencode(path.with_name(name)))(IDS), model(IDS))
    mask = os.umask(0o027)
    try:
        convert.save_quantized(model, path.with_name("new"))
        path.chmod(0o604)
        convert.save_quantized(model, path)
    finally:
        os.umask(mask)
    assert [path.with_name("new").stat().st_mode & 0o777, path.stat().st_mode & 0o777] == [0o640, 0o604]


def test_errors_of_the_weights_come_back(saved):
    model, path = saved
    assert convert.load_quantized(Model(tied=True), path).blocks[0].gate.error == model.blocks[0].gate.error > 0
