"""Executables of int8 graphs from disk: rows and scales are made by the process that has the entry, everything that decides the graph is in its key."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tileweld import convert
from tileweld.compiler import executable_cache, graph_json
from torch import nn

from .test_executable_cache import _own_cache, compiled, entries, twice  # noqa: F401 (a fixture)

SCHEMES = [{"scheme": "weight_only"}, {"scheme": "weight_only", "group": 16}, {"scheme": "dynamic"}, {"scheme": "llm_int8", "threshold": 1.5}]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down, self.lm_head = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 40)

    def forward(self, x):
        return self.lm_head(x + self.down(F.silu(self.up(x))))


@pytest.mark.parametrize("scheme", [{**s, "force": True} for s in SCHEMES] + ["weight_only"], ids=str)
def test_a_scheme_comes_back_with_its_rows_in_the_report(scheme):
    model, x = Block().eval(), torch.randn(3, 32)
    got, after = twice(model, lambda: (x,), options={"int8": scheme})
    with torch.no_grad():
        error = ((got - model(x)).norm() / model(x).norm()).item()
    assert [r.kept for r in after.int8] and all(r.graph < 0 for r in after.int8) and {r.name for r in after.int8} >= {"up", "down"}
    assert not any(r.kept for r in after.int8) or 0 < error < 0.03


def test_rows_are_made_of_this_process_weights_and_made_again_when_one_changes():
    x, options = torch.randn(3, 32), {"int8": {"scheme": "weight_only", "force": True}}
    compiled(Block().eval(), x, options=options)
    other = Block().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-2)
    run = torch.compile(other, backend="tileweld", options=options, dynamic=False)
    torch._dynamo.reset()
    with torch.no_grad():
        before = len(entries())
        torch.testing.assert_close(run(x), other(x), rtol=0.05, atol=0.05)
        assert len(entries()) == before == 1
        other.down.weight.mul_(3)
        torch.testing.assert_close(run(x), other(x), rtol=0.05, atol=0.1)


NEAR = {"no int8": None, "another scheme": {"int8": {"scheme": "dynamic", "force": True}}, "groups": {"int8": {"scheme": "weight_only", "force": True, "group": 16}},
        "a layer left out": {"int8": {"scheme": "weight_only", "force": True, "skip": ["down"]}}, "a float head": {"int8": {"scheme": "weight_only", "force": True, "lm_head": False}},
        "what pays": {"int8": {"scheme": "weight_only"}}, "a threshold": {"int8": {"scheme": "llm_int8", "force": True, "threshold": 5.0}}}


@pytest.mark.parametrize("name", NEAR)
def test_other_options_do_not_find_it(name):
    model, x = Block().eval(), torch.randn(3, 32)
    twice(model, lambda: (x,), options={"int8": {"scheme": "llm_int8" if name == "a threshold" else "weight_only", "force": True}})
    assert not compiled(model, x, options=NEAR[name])[1].restored


def test_another_layout_of_a_weight_or_the_name_of_a_layer_do_not_find_it():
    x, options = torch.randn(3, 32), {"int8": {"scheme": "weight_only", "force": True}}
    compiled(Block().eval(), x, options=options)
    half, turned, tied = Block().eval().bfloat16(), Block().eval(), Block().eval()
    turned.down.weight = nn.Parameter(turned.down.weight.detach().T.contiguous().T)
    assert not compiled(half, x.bfloat16(), options=options)[1].restored
    assert not compiled(turned, x, options=options)[1].restored
    tied.other, tied.down = tied.down, None
    tied.forward = lambda x: tied.lm_head(x + tied.other(F.silu(tied.up(x))))  # a name decides what skip and lm_head mean
    assert not compiled(tied.forward, x, options=options)[1].restored
    assert compiled(Block().eval(), x, options=options)[1].restored


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_converted_model_comes_back(scheme):
    x, models = torch.randn(3, 32), [Block().eval() for _ in range(3)]
    for model in models[:2]:
        convert.quantize_(model, scheme)
    convert.quantize_(models[2], {"scheme": "weight_only", "group": 32})
    (first, before), (second, after), (_, other) = (compiled(model, x) for model in models)
    assert len(after.restored) == 1 and not before.restored and not other.restored
    assert torch.equal(first, second) and [r.reason for r in after.int8] == [r.reason for r in before.int8] != []


def test_other_ops_of_ours_have_no_name_that_lasts():
    assert executable_cache.is_lasting("tileweld.quantize_rows.default") and not executable_cache.is_lasting("tileweld.merge_heads.default") and not executable_cache.is_lasting("tileweld.quantize_rows.other")
    with pytest.raises(ValueError, match="merge_heads"):
        graph_json.read([["tileweld.merge_heads.default", [], {}]])


FRESH = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
with torch.no_grad():
    result = torch.compile(model, backend="tileweld", options={"int8": {"scheme": "weight_only", "force": True}})(torch.ones(2, 32))
print(result.sum().item(), *sorted(name for name in sys.modules if name in ("tileweld.passes", "tileweld.codegen.regions", "tileweld.compiler.lower", "tileweld.compiler.aot", "tileweld.runtime.build")))
"""


def test_a_new_process_starts_from_it_and_imports_no_compiler():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TILEWELD_EXECUTABLES": "1"}
    cold, warm = (subprocess.run([sys.executable, "-c", FRESH], env=environment, cwd=Path.home(), capture_output=True, text=True, check=True, timeout=300).stdout.split() for _ in range(2))
    assert cold[0] == warm[0] and "tileweld.passes" in cold and warm[1:] == []
