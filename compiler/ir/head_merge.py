"""The algebra of MHA -> GQA: several KV heads become one, queries and output columns take up the difference.

Notation, for one layer; E = D + 1 (input and a constant 1, so that a bias is one more column of its projection):
    q [H, d, E], k [Hkv, d, E], v [Hkv, dv, E], o [H, Dout, dv]; query head h reads KV head h // (H / Hkv).
    S [E, E] = mean of x x^T over calibration tokens, the identity without; L L^T = S.

What leaves attention unchanged (the gauge): v <- A v with o <- o A^-1; without rotary embedding k <- A k with q <- A^-T q, both for any
invertible A; with it, one complex number c a rotary pair: k <- c k, q <- q / conj(c). Everything here is the same for every gauge, except
method "mean", which is the baseline of Ainslie et al., GQA, arXiv 2305.13245: the mean of the matrices as they are.

Conjugates are computed (conj_physical): inside a custom op whose first call AOTAutograd watches through a dispatch mode, torch leaves out what makes
the lazy .conj() one, and products are of the number itself (torch 2.13; tests/passes/test_mha_to_gqa.py held it).
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

METHODS = ("aligned", "data", "mean")
_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_ROUNDS = 12  # of generalised Procrustes; it changes in the third digit after 5 and is at rest after 12 on SmolLM2's heads


@dataclass(frozen=True)
class Heads:
    """The four projections by head, float64, on one device; shapes as above. `pairs` [P, 2]: rotary pairs of head dimensions, None without rotary."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    pairs: Tensor | None = None

    @property
    def n_rep(self) -> int:
        """Query heads a KV head."""
        return self.q.shape[0] // self.k.shape[0]

    def of_kv(self, x: Tensor) -> Tensor:
        """[H, ...] -> [Hkv, n_rep, ...]."""
        return x.unflatten(0, (self.k.shape[0], self.n_rep))


def root(second_moment: Tensor) -> Tensor:
    """L with L L^T = S [E, E]. Any positive definite weight keeps an exact merge exact, so S is lifted by 1e-9 of its mean eigenvalue:
    fewer tokens than dimensions make it singular."""
    lift = second_moment.diagonal().mean().clamp_min(1e-30) * 1e-9
    return torch.linalg.cholesky(second_moment + lift * torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device))


def as_pairs(rows: Tensor, pairs: Tensor) -> Tensor:
    """[n, d, E] -> complex [n, P, E]: dimension pairs[p, 0] is the real part, pairs[p, 1] the imaginary one."""
    return torch.complex(rows[:, pairs[:, 0]], rows[:, pairs[:, 1]])


def from_pairs(z: Tensor, pairs: Tensor) -> Tensor:
    """Inverse of `as_pairs`."""
    rows = torch.empty(z.shape[0], pairs.numel(), z.shape[2], dtype=z.real.dtype, device=z.device)
    rows[:, pairs[:, 0]], rows[:, pairs[:, 1]] = z.real, z.imag
    return rows


def value_metric(heads: Heads) -> Tensor:
    """[Hkv, dv, dv]: sum of o^T o over the query heads of a KV head; how much the layer's output feels each direction of v."""
    return torch.einsum("jnda,jndb->jab", heads.of_kv(heads.o), heads.of_kv(heads.o))


def query_metric(heads: Heads, l: Tensor) -> Tensor:
    """[Hkv, d, d]: sum of E[q q^T] over the query heads of a KV head; how much the scores feel each direction of k."""
    q = heads.of_kv(heads.q @ l)
    return torch.einsum("jnae,jnbe->jab", q, q)


def query_power(heads: Heads, l: Tensor) -> Tensor:
    """[Hkv, P]: sum of E|q|^2 over the query heads of a KV head, by rotary pair."""
    return as_pairs(heads.q @ l, heads.pairs).abs().square().sum(-1).unflatten(0, (-1, heads.n_rep)).sum(1)


def sqrt_psd(a: Tensor) -> Tensor:
    """C [..., d, d] with C^T C = a, for symmetric positive semidefinite a: singular ones too, where Cholesky stops."""
    values, vectors = torch.linalg.eigh(a)
    return values.clamp_min(0).sqrt()[..., None] * vectors.mT


def merge_rows(w: Tensor, metric: Tensor, l: Tensor, method: str) -> tuple[Tensor, Tensor, float]:
    """m heads [m, d, E] to one: (shared [d, E], maps [m, d, d] with w_j ~ maps_j shared, relative error in the metric).

    "data" is the best there is (Eckart-Young) for sum_j |C_j (w_j - maps_j shared) L|^2, C_j^T C_j = metric_j; exact iff the stack has rank d.
    """
    d, c = w.shape[1], sqrt_psd(metric)
    if method == "mean":
        shared, maps = w.mean(0), torch.eye(d, dtype=w.dtype, device=w.device).expand(len(w), d, d)
    elif method == "aligned":
        y = w @ l
        center = y[0]
        for _ in range(_ROUNDS):  # orthogonal Procrustes onto the mean of the others' last alignment
            u, _, vh = torch.linalg.svd(center @ y.mT)
            turn = u @ vh
            center = (turn @ y).mean(0)
        shared, maps = (turn @ w).mean(0), turn.mT
    else:
        stack = (c @ w).flatten(0, 1)
        u, s, vh = torch.linalg.svd(stack @ l, full_matrices=False)
        u, s, vh = u[:, :d], s[:d], vh[:d]
        inverse = torch.where(s > s[0] * 1e-12, 1 / s.clamp_min(1e-300), 0)  # L^-1 is never formed: V_d^T L^-1 = s^-1 U^T stack
        shared, maps = inverse[:, None] * (u.mT @ stack), w @ l @ vh.mT
        if len(shared) < d:  # more dimensions than inputs: rows that nobody reads
            shared, maps = torch.nn.functional.pad(shared, (0, 0, 0, d - len(shared))), torch.nn.functional.pad(maps, (0, d - maps.shape[2]))
        scale = size(w @ l) / size(shared @ l)  # numbers as large as before, so that a bf16 or int8 cache serves as well
        shared, maps = shared * scale, maps / scale
    return shared, maps, ratio(c @ (w - maps @ shared) @ l, c @ w @ l)


def merge_pairs(w: Tensor, power: Tensor, l: Tensor, method: str) -> tuple[Tensor, Tensor, float]:
    """m heads of rotary pairs, complex [m, P, E], to one: (shared [P, E], maps [m, P] with w_j ~ maps_j shared, relative error in the scores).

    "data": the top eigenvector of D E[z z^H] D for every pair, D = sqrt(power); exact iff every pair's m rows have complex rank 1.
    """
    z = w @ l.to(w.dtype)  # second moments of the pairs' values are z z^H
    if method == "mean":
        shared, maps = w.mean(0), torch.ones_like(w[..., 0])
    elif method == "aligned":
        center = z[0]
        for _ in range(_ROUNDS):
            overlap = (center * z.conj_physical()).sum(-1)
            turn = torch.where(overlap.abs() > 0, overlap / overlap.abs().clamp_min(1e-300), 1)
            center = (turn[..., None] * z).mean(0)
        shared, maps = (turn[..., None] * w).mean(0), turn.conj_physical()
    else:
        d = power.sqrt()
        d = torch.maximum(d, d.amax(0) * 1e-6).clamp_min(1e-30)  # a pair no query looks at still needs a finite map
        gram = torch.einsum("ipe,jpe->pij", d[..., None] * z, (d[..., None] * z).conj_physical())
        top = torch.linalg.eigh(gram).eigenvectors[..., -1].T  # [m, P]
        shared, maps = (top.conj_physical() * d).unsqueeze(-1).mul(w).sum(0), top / d
        scale = (z.abs().square().sum(-1).mean(0) / (shared @ l.to(w.dtype)).abs().square().sum(-1).clamp_min(1e-300)).sqrt()
        scale = scale.clamp_min(1e-30)
        shared, maps = shared * scale[:, None], maps / scale
    felt = power.sqrt()[..., None]
    return shared, maps, ratio(felt * (z - maps[..., None] * (shared @ l.to(w.dtype))), felt * z)


def merge_layer(heads: Heads, second_moment: Tensor, groups: list[list[int]], method: str) -> tuple[Heads, float, float]:
    """(heads with one KV head a group, error of the keys, error of the values); `groups` partitions range(Hkv), all of one size.

    The errors are relative, in the scores and in the layer's output at fixed attention; 0: the rewrite is exact. Query heads are
    reordered to stand with their group, the output's columns with them.
    """
    l = root(second_moment)
    values, felt = heads.of_kv(heads.o), value_metric(heads)
    felt_keys = query_power(heads, l) if heads.pairs is not None else query_metric(heads, l)
    q, k, v, o, errors = [], [], [], [], []
    for group in groups:
        old_q = heads.of_kv(heads.q)[group]  # [m, n_rep, d, E]
        shared_v, maps_v, error_v = merge_rows(heads.v[group], felt[group], l, method)
        if heads.pairs is not None:
            shared_k, maps_k, error_k = merge_pairs(as_pairs(heads.k[group], heads.pairs), felt_keys[group], l, method)
            new_q = [from_pairs(as_pairs(x, heads.pairs) * maps_k[j].conj_physical()[None, :, None], heads.pairs) for j, x in enumerate(old_q)]  # q conj(z_j) = q conj(map) conj(k)
            shared_k = from_pairs(shared_k[None], heads.pairs)[0]
        else:
            shared_k, maps_k, error_k = merge_rows(heads.k[group], felt_keys[group], l, method)
            new_q = [maps_k[j].mT @ x for j, x in enumerate(old_q)]
        q += new_q
        o += [values[j] @ maps_v[n] for n, j in enumerate(group)]
        k.append(shared_k)
        v.append(shared_v)
        errors.append((error_k, error_v))
    error_k, error_v = (sum(e[i] ** 2 for e in errors) / len(errors) for i in (0, 1))
    return replace(heads, q=torch.cat(q), k=torch.stack(k), v=torch.stack(v), o=torch.cat(o)), error_k**0.5, error_v**0.5


def similarity(heads: Heads, second_moment: Tensor) -> Tensor:
    """[Hkv, Hkv] in 0..2: how well two KV heads can share keys (0..1) plus values (0..1); 2 for heads that are one up to the gauge.

    Values: nuclear norm of Y_i Y_j^T over |Y_i| |Y_j|, Y = C v L; keys with rotary: sum_p |E z_ip conj(z_jp)|, over the norms, z weighted by its queries.
    """
    l = root(second_moment)

    def nuclear(w: Tensor, metric: Tensor) -> Tensor:
        y = sqrt_psd(metric) @ w @ l
        norm = size(y, each=True)
        return torch.stack([torch.linalg.matrix_norm(y @ x.mT, "nuc") / (norm * n).clamp_min(1e-300) for x, n in zip(y, norm)])

    total = nuclear(heads.v, value_metric(heads))
    if heads.pairs is None:
        return total + nuclear(heads.k, query_metric(heads, l))
    z = query_power(heads, l).sqrt()[..., None] * (as_pairs(heads.k, heads.pairs) @ l.to(torch.complex128))
    norm = size(z, each=True)
    return total + torch.einsum("ipe,jpe->ijp", z, z.conj_physical()).abs().sum(-1) / (norm[:, None] * norm).clamp_min(1e-300)


def refit_output(context: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """(W [Dout, F], strength): ridge towards the merged weight, minimising |context W^T - target|^2 + strength mean(context^2) N |W - weight|^2.

    An exact merge stays as it is. The strength is the one of _STRENGTHS that, fitted to one half of the tokens, serves the other half best;
    infinity, the weight as it was, where none does. context [N, F], target [N, Dout], same float dtype; rows in the order of the text.
    """
    half, errors = len(context) // 2, [0.0] * len(_STRENGTHS)
    halves = [(context[:half], target[:half]), (context[half:], target[half:])]
    left = float((target - context @ weight.mT).square().sum())
    for (x, y), (other_x, other_y) in (halves, halves[::-1]):
        for i, change in enumerate(_ridge(x, y - x @ weight.mT, _STRENGTHS)):
            errors[i] += float((other_y - other_x @ (weight + change).mT).square().sum())
    best = min(range(len(_STRENGTHS)), key=errors.__getitem__)
    if not errors[best] < left:
        return weight, float("inf")
    return weight + next(_ridge(context, target - context @ weight.mT, _STRENGTHS[best:best + 1])), _STRENGTHS[best]


def _ridge(x: Tensor, y: Tensor, strengths: tuple[float, ...]) -> Iterator[Tensor]:
    """For every strength the [Dout, F] that minimises |x W^T - y|^2 + strength mean(diag(x^T x)) |W|^2."""
    values, vectors = torch.linalg.eigh(x.mT @ x)
    turned = vectors.mT @ (x.mT @ y)
    lift = values.clamp_min(0).mean().clamp_min(1e-30)
    for strength in strengths:
        yield (vectors @ (turned / (values.clamp_min(0) + strength * lift)[:, None])).mT


def size(x: Tensor, each: bool = False) -> Tensor:
    """Frobenius norm; `each`: of every x[i]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim))) if each else torch.linalg.vector_norm(x).clamp_min(1e-300)


def ratio(error: Tensor, whole: Tensor) -> float:
    return float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(whole).clamp_min(1e-300))
