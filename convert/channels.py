"""The MLPs of a model, and which of their channels do nothing.

An MLP is what flow.py finds: linear layers (the ups) whose results meet element by element, and with nothing else, before linear layers (the downs) read them: down(act(gate(x)) * up(x)),
down(act(up(x))), gate and up stacked in one layer, and others, in one module or several. A channel is dead, for every input, where

    its column of every down is zero; or a row and its bias in one of the ups are zero, and the channel is zero whatever the other ups give

The second depends on what lies between (sigmoid(0) is not 0), so the model is asked: it runs with random numbers, of both signs, in place of what the ups give, and zeros for such rows.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .flow import Flow, Source
from .linears import augmented, check_linear, matrix, replace_weight
from .observe import Inputs, hooked, run
from .sites import owners, restate_count

WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim")
TRIALS = 2  # of 24 random rows: a relu of what is not dead is zero on all of them with a chance of 4e-15


@dataclass(frozen=True)
class Mlp:
    """One MLP: the module all of it is in, the rows that make channel c (start + step c of a layer), the layers that read the channels, by names below that module."""

    name: str
    module: nn.Module
    sources: tuple[Source, ...]
    downs: tuple[str, ...]
    width: int

    @property
    def ups(self) -> list[str]:
        return list(dict.fromkeys(s.linear for s in self.sources))

    @property
    def children(self) -> list[str]:
        return [*self.ups, *self.downs]

    @property
    def key(self) -> str:
        """Its first down, by its whole name: no other MLP has it."""
        return f"{self.name}.{self.downs[0]}".lstrip(".")

    def linear(self, child: str) -> nn.Module:
        return self.module.get_submodule(child)

    def numbers(self, source: Source, device=None) -> Tensor:
        """[width], the rows of that source."""
        return source.start + source.step * torch.arange(self.width, device=device)


def find_mlps(model: nn.Module, flow: Flow) -> list[Mlp]:
    """Every MLP in order of execution. Raises ConversionError for weights that are not plain floats."""
    found = []
    for sources, downs in flow.channels.items():
        names = [*dict.fromkeys(s.linear for s in sources), *downs]
        for name in names:
            check_linear(name, model.get_submodule(name))
        owner = flow.owner(names)
        below = lambda name: name[len(owner):].lstrip(".")
        ordered = sorted((Source(below(s.linear), s.start, s.step) for s in sources), key=lambda s: (s.linear, s.start))
        found.append(Mlp(owner, model.get_submodule(owner), tuple(ordered), tuple(map(below, downs)), flow.widths[sources]))
    return found


def watched(model: nn.Module, mlps: list[Mlp], inputs: Inputs) -> dict[str, Tensor]:
    """name of an MLP -> [width] bool: was the channel zero wherever the MLP ran, with random numbers for every row that is not zero? MLPs that did not run (an expert nobody chose) are left out."""
    silent: dict[str, Tensor] = {}
    chance = torch.Generator().manual_seed(0)

    def scatter(module, args, output):
        live = ((augmented(module) != 0).any(1)).to(output.dtype)
        return 3 * torch.randn(output.shape, generator=chance).to(output) * live

    with hooked() as keep:
        for mlp in mlps:
            def before(module, given, mlp=mlp):
                if given[0].numel():
                    zero = (given[0].flatten(0, -2) == 0).all(0)
                    silent[mlp.key] = zero & silent[mlp.key] if mlp.key in silent else zero

            for child in mlp.ups:
                keep(mlp.linear(child).register_forward_hook(scatter))
            keep(mlp.linear(mlp.downs[0]).register_forward_pre_hook(before))
        for _ in range(TRIALS):
            run(model, inputs)
    return silent


def dead_channels(mlp: Mlp, silent: Tensor | None) -> Tensor:
    """[width] bool. Weights that are not finite are none that do nothing."""
    columns = torch.cat([matrix(mlp.linear(child)) for child in mlp.downs])
    dead, finite = (columns == 0).all(0), columns.isfinite().all(0)
    for source in mlp.sources:
        rows = augmented(mlp.linear(source.linear))[mlp.numbers(source, columns.device)]
        finite = finite & rows.isfinite().all(1)
        dead = dead | ((rows == 0).all(1) & silent if silent is not None else False)
    return dead & finite


def keep_channels(mlp: Mlp, kept: Tensor) -> None:
    """Leave only the channels of these numbers, in place, and correct the width that the modules keep."""
    for child in mlp.ups:
        linear = mlp.linear(child)
        rows = torch.cat([mlp.numbers(s, kept.device)[kept] for s in mlp.sources if s.linear == child]).sort().values
        replace_weight(linear, matrix(linear)[rows], None if linear.bias is None else linear.bias.detach()[rows])
    for child in mlp.downs:
        replace_weight(mlp.linear(child), matrix(mlp.linear(child))[:, kept])
    for module in owners(mlp.module, mlp.children):
        restate_width(module, mlp.width, len(kept))


def restate_width(owner: object, old: int, new: int) -> None:
    """Correct the width that `owner` (a module or a config) states; one that says None leaves it to a default (GPT-2: four times the hidden size), which the new one is not."""
    restate_count(owner, WIDTHS, old, new)
    if new != old and not any(getattr(owner, name, None) == new for name in WIDTHS):
        for name in WIDTHS:
            if name in vars(owner) and getattr(owner, name) is None:
                setattr(owner, name, new)
