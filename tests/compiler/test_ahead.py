"""Kernels that are compiled before AOT has seen the graph: the guess is what lowering asks for, and nothing of it where it may not be."""
import gc

import pytest
import torch

from tileweld.compiler import ahead, backend
from tileweld.runtime import build


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        q = self.norm(x).view(2, 16, 2, 16).transpose(1, 2)
        x = x + torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(2, 16, 32)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """(guessed, asked for): the units of every compilation, nothing from a cache."""
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "kernels"))
    guessed, asked, guess, asking = [], [], ahead.guessed, build.build
    monkeypatch.setattr(ahead, "guessed", lambda *a: (guessed.append(set(guess(*a))), guess(*a))[1])
    monkeypatch.setattr(build, "build", lambda units: (asked.append(set(units)), asking(units))[1])
    torch._dynamo.reset()
    return guessed, asked


def test_every_fused_op_s_kernel_is_guessed_and_the_result_is_right(seen):
    model, x = Block(), torch.randn(2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="tileweld")(x), model(x), rtol=1e-4, atol=1e-5)
    (early, guessed), asked = seen  # behind the attention pass, and behind the last
    assert {unit.name.rsplit("_", 1)[0] for unit in early} == {"attention"} and early < guessed
    assert {unit.name.rsplit("_", 1)[0] for unit in guessed} == {"attention", "linear"}
    assert guessed <= asked[0]


def test_nothing_is_guessed_for_training_and_unknown_sizes(seen):
    model, x = Block(), torch.randn(2, 16, 32)
    torch.compile(model, backend="tileweld")(x).sum().backward()
    linear = torch.nn.Linear(32, 64)
    with torch.no_grad():
        torch.compile(lambda x: torch.relu(linear(x)), backend="tileweld", dynamic=True)(torch.randn(40, 32))
    assert seen[0] == 4 * [set()] and any(seen[1])


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_it_was_also_after_an_error(was_on):
    before = gc.isenabled()
    try:
        gc.enable() if was_on else gc.disable()
        with pytest.raises(ZeroDivisionError), backend._no_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == was_on
    finally:
        gc.enable() if before else gc.disable()
