"""What a device can do at best: a table of GPUs from their data sheets, and this machine's CPU, measured once.

    named("h200")   named("cpu")   named("flops=2e11,bandwidth=2e10")
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping

import torch

from .errors import OptionError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks of a device. matmul: dtype name -> FLOP/s of dense matrix products; vector: FLOP/s of everything else, in float32; bandwidth: bytes/s of its memory."""

    name: str
    matmul: Mapping[str, float]
    vector: float
    bandwidth: float
    source: str = ""

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in a dtype; that of float32 for dtypes without an entry."""
        return self.matmul.get(str(dtype).removeprefix("torch."), self.matmul["float32"])

    def seconds(self, cost) -> float | None:
        """The roofline time of one kernel: its operations, products first and the rest after them, or its bytes, whichever takes longer. None where a size is not known."""
        parts = cost.matmul / self.peak(cost.dtype) + cost.vector / self.vector, cost.bytes / self.bandwidth
        return max(map(float, parts)) if not any(p.free_symbols for p in parts) else None


# Dense rates, without sparsity; float16 and bfloat16 with float32 accumulation. float32 is that of the vector units: TF32 is off by default in torch.
TABLE = {
    # NVIDIA H200 datasheet (SXM, 141 GB): 1979 TFLOP/s bfloat16 with sparsity, so 989.5 dense; 67 float32, 67 float64 tensor core; 4.8 TB/s HBM3e
    "h200": Device("h200", {"bfloat16": 989.5e12, "float16": 989.5e12, "float32": 67e12, "float64": 67e12}, 67e12, 4.8e12, "NVIDIA H200 datasheet, SXM"),
    # NVIDIA A100 datasheet (SXM, 80 GB): 312 TFLOP/s bfloat16, 19.5 float32, 19.5 float64 tensor core; 2039 GB/s HBM2e
    "a100": Device("a100", {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "float64": 19.5e12}, 19.5e12, 2.039e12, "NVIDIA A100 datasheet, 80 GB SXM"),
    # NVIDIA Ada architecture whitepaper, appendix A, GeForce RTX 4090: 165.2 TFLOP/s float16 tensor with float32 accumulation, 82.6 float32, 1/64 of it float64; 1008 GB/s GDDR6X
    "4090": Device("4090", {"bfloat16": 165.2e12, "float16": 165.2e12, "float32": 82.6e12, "float64": 1.29e12}, 82.6e12, 1.008e12, "NVIDIA Ada whitepaper, GeForce RTX 4090"),
}
NAMES = (*TABLE, "cpu")


def named(text: str) -> Device:
    """The device of a name, or one of given numbers: "flops=2e11,bandwidth=2e10" (FLOP/s, bytes/s). Raises OptionError for anything else."""
    if text in TABLE:
        return TABLE[text]
    if text == "cpu":
        return cpu()
    if "=" not in text:
        raise OptionError.unknown("device", text, [*NAMES, "flops=2e11,bandwidth=2e10"], where="--device")
    given = dict(part.strip().partition("=")[::2] for part in text.split(","))
    try:
        flops, bandwidth = float(given.pop("flops")), float(given.pop("bandwidth"))
    except (KeyError, ValueError):
        flops = bandwidth = 0.0
    if given or not 0 < flops < float("inf") or not 0 < bandwidth < float("inf"):
        raise OptionError(f"device {text!r}", where="--device", cure="write flops=2e11,bandwidth=2e10: FLOP/s and bytes/s, both above 0")
    return Device("given", {"float32": flops}, flops, bandwidth, "given")


def guess(device: torch.device) -> str:
    """The name for a torch device: "cpu", or the GPU of the table whose name the driver gives. Raises OptionError for a GPU that is not in it."""
    if device.type == "cpu":
        return "cpu"
    found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for name in TABLE:
        if name in found.lower():
            return name
    raise OptionError(f"{found!r} is not in the table of devices", where="--device", cure="give its numbers: --device flops=6e13,bandwidth=1e12")


# ---------------------------------------------------------------- this machine's CPU


def cpu() -> Device:
    """This machine with torch's number of threads, measured in about two seconds and kept beside the kernel cache.

    matmul: what one thread reaches, times the threads: two threads that wait for each other on a busy machine say nothing about its cores.
    """
    from ..runtime.cache import machine, put_text, root

    about = {**{k: str(v) for k, v in machine().items()}, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    path = root() / f"device-cpu-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"
    device = _read(path)
    if device is None:
        threads, bandwidth = torch.get_num_threads(), _bandwidth()
        torch.set_num_threads(1)
        try:
            matmul = {name: threads * _matmul_rate(dtype) for name, dtype in DTYPES.items()}
            bandwidth = max(bandwidth, _bandwidth())
        finally:
            torch.set_num_threads(threads)
        device = Device("cpu", matmul, matmul["float32"], bandwidth, f"measured, {threads} threads")
        put_text(path, json.dumps(dataclasses.asdict(device)))
    return device


def _read(path) -> Device | None:
    try:
        made = Device(**json.loads(path.read_text()))
        return made if min(*made.matmul.values(), made.vector, made.bandwidth) > 0 and set(made.matmul) == set(DTYPES) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _matmul_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the best product within the time: 256 wide first, 768 wide where that does not take too long (float16 without support runs at 1/50)."""
    best = 0.0
    for width in (256, 768):
        a, b = (torch.ones(width, width, dtype=dtype) for _ in range(2))
        work = 2 * width**3
        if best and work / best > seconds * 4:
            break
        best = max(best, work / _best(lambda: a @ b, seconds))
    return best


def _bandwidth(megabytes: int = 256, seconds: float = 0.5) -> float:
    """Bytes/s of reading: the sum of a tensor far larger than the caches."""
    x = torch.ones(megabytes * 2**20 // 4)
    return x.numel() * 4 / _best(x.sum, seconds)


def _best(call, seconds: float) -> float:
    """The shortest of the runs that fit into the time; three at least."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
