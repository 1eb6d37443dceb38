"""Places for buffers in one arena: offsets such that no two buffers that live at the same time overlap."""
from __future__ import annotations

from collections.abc import Sequence

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def pack(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """(offset of every buffer, bytes of the arena).

    sizes: bytes of each buffer; lives: its first and last line, both included. Greedy by size with the best fitting gap (Pisarchyk and Lee,
    2001.03288); tried in three orders, of which the smallest arena wins. At least `peak`, and equal to it on the models of models/.
    """
    rounded = [-(-n // ALIGNMENT) * ALIGNMENT for n in sizes]
    numbers = range(len(sizes))
    orders = (sorted(numbers, key=lambda k: (-rounded[k], lives[k])), sorted(numbers, key=lambda k: lives[k]),
              sorted(numbers, key=lambda k: (lives[k][0] - lives[k][1], -rounded[k])))
    least = peak(sizes, lives)
    best: tuple[list[int], int] | None = None
    for order in orders:
        made = _greedy(rounded, lives, order)
        if best is None or made[1] < best[1]:
            best = made
        if best[1] == least:
            break
    return best


def peak(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> int:
    """The most bytes that live at once, each rounded up to the alignment: what freeing every buffer behind its last reader needs."""
    change: dict[int, int] = {}
    for n, (first, last) in zip(sizes, lives):
        rounded = -(-n // ALIGNMENT) * ALIGNMENT
        change[first] = change.get(first, 0) + rounded
        change[last + 1] = change.get(last + 1, 0) - rounded
    top = now = 0
    for line in sorted(change):
        now += change[line]
        top = max(top, now)
    return top


def _greedy(sizes: Sequence[int], lives: Sequence[tuple[int, int]], order: Sequence[int]) -> tuple[list[int], int]:
    offsets, placed = [0] * len(sizes), []  # placed: (offset, end, number), by offset
    total = 0
    for k in order:
        if not sizes[k]:
            continue
        first, last = lives[k]
        at, best_gap, start = None, None, 0
        for offset, end, other in placed:
            if lives[other][0] > last or lives[other][1] < first:
                continue
            gap = offset - start
            if gap >= sizes[k] and (best_gap is None or gap < best_gap):
                at, best_gap = start, gap
            start = max(start, end)
        offsets[k] = start if at is None else at
        placed.append((offsets[k], offsets[k] + sizes[k], k))
        placed.sort()
        total = max(total, offsets[k] + sizes[k])
    return offsets, total
