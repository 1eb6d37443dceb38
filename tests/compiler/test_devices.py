"""Devices: the table's figures, names, given numbers, and the CPU that is measured once."""

import json

import pytest
import torch

from tileweld.compiler import devices
from tileweld.compiler.errors import OptionError


@pytest.mark.parametrize("name", devices.TABLE)
def test_the_table_is_consistent(name):
    d = devices.named(name)
    assert d.name == name and d.source and set(d.matmul) == set(devices.DTYPES)
    assert d.peak(torch.bfloat16) > d.peak(torch.float32) >= d.vector > d.bandwidth > 1e11
    assert d.peak(torch.int8) == d.peak(torch.float32)


def test_numbers_can_be_given():
    d = devices.named("flops=2e11, bandwidth=2e10")
    assert (d.peak(torch.bfloat16), d.vector, d.bandwidth) == (2e11, 2e11, 2e10)


@pytest.mark.parametrize("text", ["b200", "flops=x,bandwidth=1", "bandwidth=1", "flops=inf,bandwidth=1", ""])
def test_anything_else_is_an_option_error(text):
    with pytest.raises(OptionError, match="flops=2e11,bandwidth=2e10"):
        devices.named(text)


def test_the_cpu_is_measured_once_and_a_broken_file_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path))
    calls = []
    monkeypatch.setattr(devices, "_matmul_rate", lambda dtype: calls.append(dtype) or 1e9)
    monkeypatch.setattr(devices, "_bandwidth", lambda: 1e10)
    threads = torch.get_num_threads()
    first = devices.named("cpu")
    assert first.matmul == dict.fromkeys(devices.DTYPES, threads * 1e9) and len(calls) == 4 and torch.get_num_threads() == threads
    assert devices.named("cpu") == first and len(calls) == 4
    (kept,) = tmp_path.glob("device-cpu-*.json")
    for text in ("{", json.dumps({"name": "cpu"}), json.dumps({"name": "cpu", "matmul": {"float32": 0}, "vector": 1, "bandwidth": 1})):
        kept.write_text(text)
        assert devices.named("cpu") == first
    assert len(calls) == 16


def test_what_is_measured_is_plausible():
    rate, moved = devices._matmul_rate(torch.float32, 0.02), devices._bandwidth(16, 0.02)
    assert 1e8 < rate < 1e14 and 1e8 < moved < 1e13


def test_a_device_is_guessed_from_the_tensors(monkeypatch):
    assert devices.guess(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H200")
    assert devices.guess(torch.device("cuda")) == "h200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA T4")
    with pytest.raises(OptionError, match="'NVIDIA T4' is not in the table"):
        devices.guess(torch.device("cuda"))
