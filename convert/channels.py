"""Where the MLPs of a model are, and which of their channels do nothing.

A channel j of down(act(gate(x)) * up(x)) or down(act(up(x))) is dead, for every input, where
    column j of down is zero; or row j of gate, or of up, and its bias are zero and what reaches down is zero then
The second depends on the activation (sigmoid(0) is not 0), so the model is asked: with the row zero the channel is one number for every
input where the other factor is none, and it is dead if down was given nothing but zeros there.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .observe import hooked, Inputs, run
from .sites import check_linear, restate_count, set_parameter, vars_of

DOWN = ("down_proj", "w2", "fc2", "c_proj", "wo", "dense_4h_to_h", "lin2")
UP = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "wi", "wi_0", "wi_1", "dense_h_to_4h", "lin1")
WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim")


@dataclass(frozen=True)
class Mlp:
    """One MLP: the linear children that make its channels (one may make gate and up, stacked), and the one that reads them."""

    name: str
    module: nn.Module
    ups: tuple[str, ...]
    down: str
    width: int

    @property
    def children(self) -> list[str]:
        return [*self.ups, self.down]


def find_mlps(model: nn.Module) -> list[Mlp]:
    """Every MLP in order of registration, by the names of its children and their sizes. Raises ConversionError for weights that are not plain floats."""
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        down = next((n for n in DOWN if n in children), None)
        ups = tuple(n for n in UP if n in children and n != down)
        if down is None or not ups or "wq" in children or "q_proj" in children:
            continue
        for child in (*ups, down):
            check_linear(f"{name}.{child}", children[child])
        width = children[down].in_features
        if all(children[n].out_features in (width, 2 * width) for n in ups) and len({children[n].in_features for n in ups}) == 1:
            found.append(Mlp(name, module, ups, down, width))
    return found


def watched(model: nn.Module, mlps: list[Mlp], inputs: Inputs) -> dict[str, Tensor]:
    """name -> [width] bool: was the channel zero wherever the MLP ran? MLPs that did not run (an expert nobody chose) are left out."""
    silent: dict[str, Tensor] = {}

    with hooked() as keep:
        for mlp in mlps:
            def before(module, given, name=mlp.name):
                zero = (given[0].flatten(0, -2) == 0).all(0) if given[0].numel() else None
                if zero is not None:
                    silent[name] = zero & silent[name] if name in silent else zero

            keep(getattr(mlp.module, mlp.down).register_forward_pre_hook(before))
        run(model, inputs)
    return silent


def dead_channels(mlp: Mlp, silent: Tensor | None) -> Tensor:
    """[width] bool. Weights that are not finite are none that do nothing."""
    down = getattr(mlp.module, mlp.down).weight
    dead, finite = (down == 0).all(0), down.isfinite().all(0)
    for child in mlp.ups:
        linear = getattr(mlp.module, child)
        rows = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
        zero = (rows == 0).all(1).unflatten(0, (-1, mlp.width)).any(0)
        finite = finite & rows.isfinite().all(1).unflatten(0, (-1, mlp.width)).all(0)
        dead = dead | (zero & silent if silent is not None else False)
    return dead & finite


def keep_channels(mlp: Mlp, kept: Tensor) -> None:
    """Leave only the channels of these numbers, in place, and correct the width that the module keeps."""
    for child in mlp.ups:
        linear = getattr(mlp.module, child)
        rows = torch.cat([kept + start for start in range(0, linear.out_features, mlp.width)])
        for name in ("weight", "bias"):
            if getattr(linear, name) is not None:
                set_parameter(linear, name, getattr(linear, name).detach()[rows])
        linear.out_features = len(rows)
    down = getattr(mlp.module, mlp.down)
    set_parameter(down, "weight", down.weight.detach()[:, kept])
    down.in_features = len(kept)
    for owner, name, value in list(vars_of(mlp.module)):
        if name in WIDTHS and value == mlp.width:
            restate_count(owner, (name,), mlp.width, len(kept))
