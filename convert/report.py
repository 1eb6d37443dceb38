"""What a conversion did, layer by layer. ``str(report)`` is a table."""
from __future__ import annotations

import io
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """One attention module.

    groups:   which of its KV heads became one, in the order of the new heads; singletons where the layer was skipped.
    key_error, value_error: relative error of the scores, and of the output at fixed attention, that merging alone makes.
    residual: relative error of the layer's output on the calibration tokens, the output refit included (in sample); without calibration
              the larger of key_error and value_error.
    kv_bytes_before, kv_bytes_after: bytes cached a token.
    note:     why it was skipped, or what was particular; empty else.
    """

    name: str
    heads: int
    kv_heads_before: int
    kv_heads_after: int
    groups: tuple[tuple[int, ...], ...]
    key_error: float
    value_error: float
    residual: float
    kv_bytes_before: int
    kv_bytes_after: int
    converted: bool
    note: str = ""


@dataclass(frozen=True)
class PrunedLayer:
    """An attention (what "heads": query heads, and KV heads) or an MLP (what "channels") and how many of them stay."""

    name: str
    what: str
    before: int
    after: int
    kv_before: int = 0
    kv_after: int = 0


@dataclass(frozen=True)
class PruneReport:
    """All attentions, then all MLPs; parameters of the whole model; reloads: the config states the new sizes, so that a saved checkpoint loads in
    plain transformers (None: the model has no config that it could be made from), and why not; left_out: linear layers that look like part of an MLP, and what keeps their channels together."""

    layers: list[PrunedLayer]
    parameters_before: int
    parameters_after: int
    structured: bool
    reloads: bool | None
    why_not: str = ""
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = [x for x in self.layers if x.after < x.before]
        lines = [f"{x.name}: {x.before} -> {x.after} {x.what}" + (f", {x.kv_before} -> {x.kv_after} KV heads" if x.kv_before else "") for x in changed]
        lines.append(f"{len(changed)} of {len(self.layers)} layers pruned, {self.parameters_before} -> {self.parameters_after} parameters; exact.")
        if self.reloads is False:
            lines.append("The config cannot state these sizes: the model works in memory, a saved checkpoint does not reload" + ("" if self.structured else " (structured=True keeps all layers alike)") + f": {self.why_not}.")
        lines += [f"left: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class ConversionReport:
    """All layers, the method ("aligned", "data", "mean"), and calibration_tokens (0: none)."""

    layers: list[LayerReport] = field(default_factory=list)
    method: str = "data"
    num_kv_heads: int = 1
    calibration_tokens: int = 0

    @property
    def kv_bytes_before(self) -> int:
        """Bytes of keys and values cached a token, all layers."""
        return sum(layer.kv_bytes_before for layer in self.layers)

    @property
    def kv_bytes_after(self) -> int:
        return sum(layer.kv_bytes_after for layer in self.layers)

    @property
    def skipped(self) -> list[LayerReport]:
        """Layers left as they were, by max_residual."""
        return [layer for layer in self.layers if not layer.converted]

    @property
    def uniform(self) -> bool:
        """Every layer has num_kv_heads now: the config says so, and a saved checkpoint reloads. Else the config is as it was."""
        return all(layer.kv_heads_after == self.num_kv_heads for layer in self.layers)

    def summary(self) -> str:
        """One paragraph: bytes, the worst layer, and that this is lossy."""
        worst = max(self.layers, key=lambda layer: layer.residual * layer.converted, default=None)
        lines = [f"KV cache {self.kv_bytes_before} -> {self.kv_bytes_after} bytes a token ({self.kv_bytes_before / max(self.kv_bytes_after, 1):.1f}x less)."]
        if worst and worst.converted and worst.residual > 1e-6:
            lines.append(f"Lossy: the model computes something else now, layer outputs are off by up to {worst.residual:.1%} ({worst.name}). "
                         "Measure perplexity, and train it on before use (examples/heal_gqa.py).")
        if not self.uniform:
            lines.append(f"{len(self.skipped)} of {len(self.layers)} layers were skipped, so the layers differ: the config still states the old KV heads, and a saved "
                         "checkpoint does not reload.")
        return "\n".join(lines)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        based = f"{self.calibration_tokens} calibration tokens" if self.calibration_tokens else "no calibration: weights alone"
        table = Table(title=f"MHA to GQA, {self.num_kv_heads} KV head{'s' * (self.num_kv_heads > 1)}, method {self.method}, {based}", box=box.SIMPLE_HEAD, title_justify="left")
        for heading in ("layer", "heads", "KV heads", "groups"):
            table.add_column(heading)
        for heading in ("keys", "values", "residual", "KV bytes/token"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for x in self.layers:
            table.add_row(x.name, str(x.heads), f"{x.kv_heads_before} -> {x.kv_heads_after}", " ".join("".join(("(", " ".join(map(str, g)), ")")) for g in x.groups),
                          f"{x.key_error:.1%}", f"{x.value_error:.1%}", f"{x.residual:.1%}", f"{x.kv_bytes_before} -> {x.kv_bytes_after}", x.note)
        text = io.StringIO()
        console = Console(file=text, width=170)
        console.print(table)
        console.print(self.summary(), highlight=False, soft_wrap=True)
        return text.getvalue()
