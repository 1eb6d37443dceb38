"""Calibration: what linear layers are given when a model runs on sample batches."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from .observe import Inputs, calibration_inputs, evaluating, hooked, run

AFTER = 2.0  # seconds before a progress bar is worth looking at
ROWS = 8  # of a tensor of tokens that run as one batch


def batches(model: nn.Module, calibration) -> list[Inputs]:
    """calibration as calls of the model: tokens [B, T] (in batches of ROWS), the model's keyword arguments, another tensor that it takes, or an iterable of
    those, such as a DataLoader. Raises ConversionError for anything else, and where there is none."""
    if isinstance(calibration, Tensor):
        given = list(calibration.split(ROWS))
    elif isinstance(calibration, Mapping):
        given = [calibration]
    elif isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes)):
        given = list(calibration)
    else:
        raise ConversionError(f"calibration is a {type(calibration).__name__}", cure="pass tokens [B, T] int64, the model's keyword arguments as a dict of tensors, or a list of such batches")
    if not given:
        raise ConversionError("calibration has no batches", cure="pass a few thousand tokens of the text that the model is for")
    return [_call(model, batch) for batch in given]


def _call(model: nn.Module, batch) -> Inputs:
    if isinstance(batch, (list, tuple)) and len(batch) and all(isinstance(x, Tensor) for x in batch):
        return Inputs(tuple(batch))
    if isinstance(batch, Tensor) and batch.is_floating_point():
        return Inputs((batch,))
    return calibration_inputs(model, batch)


def input_maxima(model: nn.Module, modules: Mapping[str, nn.Module], calibration) -> dict[str, Tensor]:
    """name -> float32 [K], the largest magnitude that each column of the module's input took. No gradients, no dropout; a progress bar after two seconds.

    Padding counts too. Raises ConversionError, naming the module, where one did not run or its input was not finite, and where the model fails.
    """
    maxima: dict[str, Tensor] = {}

    def observe(name):
        def hook(module, args):
            found = args[0].detach().abs().flatten(0, -2).amax(0).float()
            maxima[name] = torch.maximum(maxima[name], found) if name in maxima else found

        return hook

    calls = batches(model, calibration)
    with evaluating(model), torch.no_grad(), hooked() as keep, _progress(len(calls)) as advance:
        for name, module in modules.items():
            keep(module.register_forward_pre_hook(observe(name)))
        for call in calls:
            try:
                run(model, call)
            except Exception as error:
                raise ConversionError(f"the model does not run on a batch of the calibration: {error}", cure="pass what model(...) takes: a tensor, or a dict of keyword arguments") from error
            advance()
    for name in modules:
        if name not in maxima:
            raise ConversionError("it did not run on the calibration", where=name, cure="pass batches that reach it, or leave it out")
        if not maxima[name].isfinite().all():
            raise ConversionError("its input on the calibration has inf or NaN", where=name, cure="calibrate in float32, or look for what overflows")
    return maxima


@contextlib.contextmanager
def _progress(total: int) -> Iterator:
    """advance(): one batch is done. The bar shows itself when that takes long."""
    from rich.progress import Progress

    bar, started, done = Progress(transient=True), time.monotonic(), 0
    task = bar.add_task("calibration", total=total)

    def advance():
        nonlocal done
        done += 1
        bar.update(task, completed=done)
        if not bar.live.is_started and time.monotonic() - started > AFTER:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
