"""The memory of an executable: one arena a call in flight, kept between calls, so that a call faults no page in."""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from ..compiler.ir.packing import pack

GROWTH = 8  # a plan that turned out too small is made an eighth larger than needed: a length that grows by one a call is not planned every call


class Workspace:
    """An arena, and what was made in it for one set of sizes: ``tensors`` is what ``make`` returned."""

    __slots__ = ("arena", "key", "tensors", "pool")

    def __init__(self, pool):
        self.arena, self.key, self.tensors, self.pool = None, None, None, pool


class Workspaces:
    """A pool of workspaces.

    sizes(*key) -> bytes of every buffer; lives: first and last line of each; make(place, *key) -> the tensors of a call, where
    place(k, sizes, strides, dtype) is buffer k. key: the values of the shape symbols, () if all is static.
    `take` and `give` may be called from any thread, and from a call within a call: a workspace belongs to one call at a time.
    """

    def __init__(self, sizes: Callable[..., Sequence[int]], lives: Sequence[tuple[int, int]], make: Callable, device: torch.device):
        self._sizes, self._lives, self._make, self._device = sizes, list(lives), make, torch.device(device)
        self._free: dict[object, list[Workspace]] = {}
        self._idle: list[Workspace] = self._free.setdefault(None, [])
        self._lock = threading.Lock()
        self._planned: list[int] = []
        self._offsets: list[int] = []
        self._total = 0
        self.is_cuda = self._device.type == "cuda"

    @property
    def bytes(self) -> int:
        """Bytes of one arena, as planned so far."""
        return self._total

    def take(self, *key) -> Workspace:
        """A workspace laid out for these sizes. One that is not given back is freed with its last reference."""
        idle = self._stream_pool() if self.is_cuda else self._idle
        try:
            workspace = idle.pop()  # atomic, so that the common way needs no lock
        except IndexError:
            workspace = Workspace(idle)
        if workspace.key != key:
            self._lay_out(workspace, key)
        return workspace

    def give(self, workspace: Workspace) -> None:
        """Back into the pool; the caller keeps nothing of it."""
        workspace.pool.append(workspace)

    def _stream_pool(self) -> list[Workspace]:
        """Work on one CUDA stream is in order, so that an arena can be given on before its kernels are done; on two it is not."""
        return self._free.setdefault(torch.cuda.current_stream(self._device).cuda_stream, [])

    def _lay_out(self, workspace: Workspace, key: tuple) -> None:
        sizes = self._sizes(*key)
        with self._lock:
            if not self._planned or any(n > m for n, m in zip(sizes, self._planned)):
                # the second plan on: sizes grow, leave room
                self._planned = [max(m, n + n // GROWTH if n > m else n) for n, m in zip(sizes, self._planned)] if self._planned else list(sizes)
                self._offsets, self._total = pack(self._planned, self._lives)
            offsets, total = self._offsets, self._total
        workspace.key, workspace.tensors = None, None
        with torch.inference_mode(False), torch.no_grad():  # the tensors outlive the mode of this call
            if workspace.arena is None or workspace.arena.numel() < total:
                workspace.arena = None  # before the new one is made: both need not exist at once
                workspace.arena = torch.empty(total, dtype=torch.uint8, device=self._device)
            workspace.tensors = self._make(_Place(workspace.arena, offsets), *key)
        workspace.key = key


class _Place:
    """place(k, sizes, strides, dtype): buffer k in the arena."""

    def __init__(self, arena: torch.Tensor, offsets: Sequence[int]):
        self._arena, self._offsets, self._typed = arena, offsets, {}

    def __call__(self, k: int, sizes: tuple, strides: tuple, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._typed:
            whole = self._arena[: self._arena.numel() // dtype.itemsize * dtype.itemsize]
            self._typed[dtype] = whole.view(dtype)
        return self._typed[dtype].as_strided(sizes, strides, self._offsets[k] // dtype.itemsize)
