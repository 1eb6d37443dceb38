"""What compiling leaves behind is given back before Dynamo's guards are made and when it is done, and only for what this backend compiled; quantising needs no copy of a weight."""
import subprocess
import sys

import pytest
import torch
from tileweld.compiler import backend, capture


@pytest.mark.parametrize("times", [1, 2], ids=["found on disk", "compiled here"])
def test_give_back_is_called_around_the_guards_of_our_graphs_alone(monkeypatch, tmp_path, times):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TILEWELD_EXECUTABLES", "1")
    with monkeypatch.context() as earlier:  # who finds executables on disk has no more to give back than Dynamo leaves
        earlier.setattr(backend, "give_back", lambda: None)
        for f in (lambda x: x * 2 + 1, lambda x: x * 3 + 1) if times == 1 else ():
            for n in (3, 4):
                torch._dynamo.reset()
                torch.compile(f, backend="tileweld", dynamic=False)(torch.ones(n))
    calls = []
    monkeypatch.setattr(backend, "give_back", lambda: calls.append(capture.CompileContext.current_compile_id()))
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert calls == []
    ours = torch.compile(lambda x: x * 2 + 1, backend="tileweld", dynamic=False)
    for n in (3, 3, 4):
        ours(torch.ones(n))
    assert len(calls) == 2 * times and not capture._when_compiled
    torch._dynamo.reset()  # forgets whom to call
    torch.compile(lambda x: x * 3 + 1, backend="tileweld")(torch.ones(3))
    assert len(calls) == 3 * times


def test_outside_of_a_compilation_it_is_called_at_once():
    calls = []
    capture.when_compiled(lambda: calls.append(1))
    assert calls == [1] and not capture._when_compiled


PROGRAM = """
import sys, torch
from torch import nn
from tileweld import convert
from tileweld.compiler.ir.heap import give_back

def now(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
convert.quantize_(nn.Sequential(nn.Linear(8, 8)))
give_back()
before = now("VmRSS")
model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(2)))
built = now("VmRSS") - before
convert.quantize_(model)
print("figures", built, now("VmRSS") - before, now("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status, which Linux has")
def test_quantising_gives_the_weights_back_and_has_no_copy_of_one():
    """128 MiB of float32 in layers of 64: 32 MiB of int8 rows, and on the way one layer's rows (16) and a block of AT_ONCE elements (20) more than the floats: 32 to 49 were seen,
    by what the C library's heap has free where; a copy would be 64 more."""
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    built, after, peak = map(float, out.split("figures")[1].split())
    assert built > 120 and after < 0.35 * built and peak < built + 72, (built, after, peak)
