"""What the tests of mha_to_gqa share: the decoder of tests/convert with rotary in real numbers, and a graph rewritten with options gqa."""
import importlib.util
import sys
from pathlib import Path

import torch

from tileweld.compiler.backend import rewrite
from tileweld.compiler.options import Options
from tileweld.compiler.report import Report
from tileweld.passes import PIPELINE

_spec = importlib.util.spec_from_file_location("attention_model", Path(__file__).parent.parent / "convert" / "attention_model.py")
_shared = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # Dynamo looks a module up by its name
_spec.loader.exec_module(_shared)
Model, scramble, tokens = _shared.Model, _shared.scramble, _shared.tokens


class Attention(_shared.Attention):
    """With rotary in real numbers; tests/passes/test_complex_product.py has it in complex ones."""

    def tables(self, x):
        d, t = x.shape[-1], x.shape[-2]
        angle = torch.outer(torch.arange(t, dtype=x.dtype, device=x.device), 10.0 ** -torch.arange(0, 2, 4 / d, dtype=x.dtype, device=x.device))
        return angle.cos(), angle.sin()

    def turn(self, x):
        if self.rotary is None:
            return x
        cos, sin = self.tables(x)
        if self.rotary == "half":
            half = x.shape[-1] // 2
            return x * torch.cat([cos, cos], -1) + torch.cat([-x[..., half:], x[..., :half]], -1) * torch.cat([sin, sin], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def model_of(attention=Attention, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Model(attention=attention, **kwargs)


def rewritten(fn, *inputs, gqa=2, dynamic=None, grad=False, **options):
    """(result of the rewritten graph, Report); ops run on their definitions."""
    report, checked = Report(), Options.parse({"target": "reference", "gqa": gqa, **options}, tuple(p.NAME for p in PIPELINE))
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        return torch.compile(fn, backend=lambda gm, x: rewrite(gm, x, checked, report).forward, dynamic=dynamic)(*inputs), report


def far(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
