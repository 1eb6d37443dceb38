"""The configuration of a generated Triton kernel: timed once per device and shape bucket, among those that do not spill."""

from __future__ import annotations

import functools
import math
import statistics

import torch

from ..compiler import log

_chosen: dict[tuple, tuple] = {}
REPEATS = 5


def bucket(size: int) -> int:
    """Sizes up to the same power of two share their configuration."""
    return 0 if size < 1 else (size - 1).bit_length()


def backend_of(device: torch.device) -> str:
    """"cuda" (Hopper and later), "ampere" (before Hopper: no wgmma, operands pass through registers), "hip" or "cpu" (the interpreter)."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return "hip"
    return "cuda" if torch.cuda.get_device_capability(device)[0] >= 9 else "ampere"


def pick(kernel, configs: dict[str, tuple], sizes: tuple[int, ...], device: torch.device, launch) -> tuple:
    """One of configs[backend]: the fastest of `launch(config)` for sizes like these; the first where nothing can be timed.

    launch may be called several times, and must give the same result every time. It returns Triton's compiled kernel.
    """
    candidates = configs[backend_of(device)]
    if len(candidates) == 1 or device.type == "cpu":
        return candidates[0]
    key = (kernel, device, *map(bucket, sizes))
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():  # events cannot be read inside a graph capture
            return candidates[0]
        _chosen[key] = _fastest(candidates, launch)
    return _chosen[key]


def _fastest(candidates, launch):
    timed = []
    for config in candidates:
        try:
            compiled = launch(config)
            spilled = getattr(compiled, "n_spills", 0) > 0
            timed.append((spilled, _milliseconds(lambda config=config: launch(config)), config))
        except Exception as error:  # too much shared memory or too many registers for this GPU
            if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                raise
            log.get("runtime").debug("%s: %s", config, error)
    return min(timed)[-1] if timed else candidates[0]


def _milliseconds(run) -> float:
    samples = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    return statistics.median(samples)


@functools.lru_cache(4096)
def split_count(programs: int, tiles: int, device: torch.device) -> int:
    """Over how many programs the key tiles of each of `programs` are split, so that the GPU's processors are busy in whole waves.

    The rule of FlashAttention's heuristics.h: none where 80% of the processors have work or keys are few; else the smallest
    count whose last wave is within 85% of the best count's.
    """
    processors = 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    if programs >= 0.8 * processors or tiles <= 4:
        return 1

    def efficiency(splits):
        waves = programs * splits / processors
        return waves / math.ceil(waves)

    counts = [n for n in range(1, min(tiles, 128, processors) + 1) if n == 1 or -(-tiles // n) != -(-tiles // (n - 1))]
    best = max(map(efficiency, counts))
    return next(n for n in counts if efficiency(n) >= 0.85 * best)
