"""Where the attention modules of a model are, their projections as rows of linear layers, and how to write others in their place.

Found by structure: a module with linear children for query, key, value and output (or one linear layer for the first three, stacked), whose
sizes fit the head counts it or its config states. The names below are the usual ones of those children and counts; no model's name matters. And found by what was seen while the model
ran (flow.py), whatever the names, and in however many modules. Whether the module really computes attention from them, and with which rotary embedding, is tried out in probe.py.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from ..compiler.ir.head_merge import Heads
from .linears import augmented, check_linear, check_unshared, matrix, replace_weight, sizes_of

if TYPE_CHECKING:
    from .flow import Flow

ROLES = {
    "q": ("q_proj", "wq", "query", "q", "q_lin"),
    "k": ("k_proj", "wk", "key", "k", "k_lin"),
    "v": ("v_proj", "wv", "value", "v", "v_lin"),
    "o": ("o_proj", "wo", "out_proj", "dense", "o", "out_lin", "proj"),
}
STACKED = ("qkv_proj", "Wqkv", "qkv", "query_key_value", "qkv_lin")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads")
N_REP = ("num_key_value_groups", "n_rep")
WIDTHS = ("all_head_size", "split_size", "inner_dim", "q_size", "attn_dim")  # of all heads together, as some modules keep it
_QK_NORM = re.compile(r"(^|_)(q|k|qk|query|key)_?(norm|ln|layernorm|layer_norm)$")


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the linear layer that has that name below the module."""

    child: str
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """One attention module: where, its projections, H query heads and Hkv KV heads, head dims of keys and of values. packed: one linear layer makes all three, and of every KV head its
    query heads', its key's and its value's rows stand together; else q, k and v say which rows."""

    name: str
    module: nn.Module
    q: Rows
    k: Rows
    v: Rows
    output: str
    heads: int
    kv_heads: int
    d: int
    dv: int
    packed: bool = False

    @property
    def children(self) -> list[str]:
        """Names of the linear layers, each once."""
        return list(dict.fromkeys([self.q.child, self.k.child, self.v.child, self.output]))

    def kv_bytes(self, kv_heads: int | None = None) -> int:
        """Bytes of cached keys and values a token, in the weights' dtype."""
        return (kv_heads or self.kv_heads) * (self.d + self.dv) * self.linear(self.k.child).weight.element_size()

    def linear(self, child: str, module: nn.Module | None = None) -> nn.Module:
        """The linear layer of that name, of a copy of the module if one is given."""
        return (module or self.module).get_submodule(child)

    @property
    def dtype(self) -> torch.dtype:
        return self.linear(self.output).weight.dtype


def find_sites(model: nn.Module, turned: bool = True, watch: Callable[[], Flow] | None = None) -> list[Site]:
    """Every attention module in order of registration. Raises ConversionError where one is found that cannot be converted, or none is.

    turned: heads will be rescaled and turned, which a norm of queries or keys forbids; False: they are only taken out, and there may be no attention at all.
    watch: runs the model (flow.py); what is found so is added, behind those that are known by their names.
    """
    sites = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        roles = {role: next((n for n in names if n in children), None) for role, names in ROLES.items()}
        stacked = next((n for n in STACKED if n in children), None)
        if roles["q"] and roles["o"] and not (roles["k"] and roles["v"]):
            if not turned:
                continue
            raise ConversionError(f"it has {roles['q']} and {roles['o']} but no projection of its own for {'keys' if not roles['k'] else 'values'}: shared or latent KV",
                                  where=name, cure="such layers cache no heads of their own that could be merged")
        if roles["o"] and (stacked or roles["q"]):
            sites.append(_site(name, module, roles, stacked, turned))
    if watch is not None:
        sites += _seen(model, watch(), {f"{s.name}.{s.output}".lstrip(".") for s in sites}, turned)
    if not sites and turned:
        raise ConversionError(f"{type(model).__name__} has no attention module: none has children such as {', '.join(n[0] for n in ROLES.values())}"
                              + (", and in no other place do linear layers make queries, keys, values and the output of an attention" if watch is not None else ""),
                              cure="name the projections so, or as in " + ", ".join("/".join(ROLES[r][1] for r in "qkvo").split(", ")))
    check_unshared(model, [(site.name, site.module, site.children) for site in sites])
    return sites


def _seen(model: nn.Module, flow: Flow, known: set[str], turned: bool) -> list[Site]:
    found = []
    for a in flow.attentions:
        if a.output in known:
            continue
        name = flow.owner([*a.q, *a.k, *a.v, a.output])
        several = next((f"its {role} come from {len(names)} linear layers, {', '.join(names)}" if names else f"its {role} come from no linear layer" for role, names in (("queries", a.q), ("keys", a.k), ("values", a.v)) if len(names) != 1), None)
        shared = "one linear layer makes two of its queries, keys and values: shared KV" if several is None and len({a.q, a.k, a.v}) == 2 else None
        if several or shared:
            if turned:
                raise ConversionError(several or shared, where=name, cure="heads are merged where one linear layer each, or one for all three, makes queries, keys and values")
            continue
        below = {role: full[len(name):].lstrip(".") for role, full in zip("qkvo", (*a.q, *a.k, *a.v, a.output))}
        found.append(_site(name, model.get_submodule(name), below, below["q"] if a.q == a.k else None, turned))
    return found


def _site(name: str, module: nn.Module, roles: dict, stacked: str | None, turned: bool) -> Site:
    names = [*([stacked] if stacked else [roles["q"], roles["k"], roles["v"]]), roles["o"]]
    around = owners(module, names)
    norm = next((n for m in around for n, _ in m.named_children() if _QK_NORM.search(n)), None)
    if norm and turned:
        raise ConversionError(f"{norm} normalises queries or keys: heads cannot be rescaled or turned to fit each other", where=name,
                              cure="QK-norm models are not converted")
    for child in names:
        check_linear(f"{name}.{child}".lstrip("."), module.get_submodule(child))
    sizes = {child: sizes_of(module.get_submodule(child)) for child in names}
    heads = stated(around, HEADS)
    if not heads:
        raise ConversionError(f"neither the module nor its config says how many query heads it has (looked for {', '.join(HEADS)})", where=name)
    kv_heads = stated_kv_heads(around, heads)
    if not kv_heads and not turned and (sizes[stacked][0] == 3 * sizes[roles["o"]][1] if stacked else sizes[roles["q"]][0] == sizes[roles["k"]][0]):
        kv_heads = heads
    if not kv_heads:
        raise ConversionError(f"its code gives every query head a KV head of its own: neither the module nor its config says how many KV heads there are (looked for {', '.join(KV_HEADS + N_REP)}), so "
                              "fewer could not be stated", where=name, cure="options={'gqa': G} merges the heads of such a model when it is compiled; to change the model itself, its attention must take fewer KV heads")
    if heads % kv_heads:
        raise ConversionError(f"{heads} query heads are no multiple of {kv_heads} KV heads", where=name)
    dv, rest = divmod(sizes[roles["o"]][1], heads)
    if stacked:
        total = sizes[stacked][0]
        d = (total - kv_heads * dv) // (heads + kv_heads)
        q, k, v = (Rows(stacked, a, b) for a, b in ((0, heads * d), (heads * d, (heads + kv_heads) * d), ((heads + kv_heads) * d, total)))
    else:
        d = sizes[roles["q"]][0] // heads
        q, k, v = (Rows(roles[r], 0, sizes[roles[r]][0]) for r in "qkv")
    want = {"query": (q, heads * d), "key": (k, kv_heads * d), "value": (v, kv_heads * dv)}
    wrong = [f"{role} projection {rows.child} has {rows.stop - rows.start} rows, expected {n}" for role, (rows, n) in want.items() if rows.stop - rows.start != n]
    if wrong or rest or len({sizes[rows.child][1] for rows in (q, k, v)}) > 1:
        raise ConversionError("; ".join(wrong) or "query, key and value projections read inputs of different sizes", where=name,
                              cure=f"{heads} query heads and {kv_heads} KV heads are what the module or its config states; cross attention is not converted")
    return Site(name, module, q, k, v, roles["o"], heads, kv_heads, d, dv)


def owners(module: nn.Module, children: Iterable[str]) -> list[nn.Module]:
    """The module and what lies between it and the linear layers of these names below it, each once: all that may keep a count of heads or channels."""
    prefixes = dict.fromkeys(".".join(parts[:n]) for child in children for parts in [child.split(".")] for n in range(len(parts)))
    return [module.get_submodule(prefix) for prefix in prefixes]


def stated(around: list[nn.Module], names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive int, of the modules or of their `config`."""
    return next((n for owner in (*around, *(getattr(m, "config", None) for m in around)) for n in _counts(owner, names)), None)


def stated_kv_heads(around: list[nn.Module], heads: int) -> int | None:
    """The modules before their configs, and n_rep too: layers of one config may differ (max_residual skips some)."""
    for owner in (*around, *(getattr(m, "config", None) for m in around)):
        for n in (*_counts(owner, KV_HEADS), *(heads // n for n in _counts(owner, N_REP) if heads % n == 0)):
            return n
    return None


def _counts(owner: object, names: tuple[str, ...]) -> list[int]:
    return [n for n in (getattr(owner, name, None) for name in names) if type(n) is int and n > 0]


def read(site: Site, module: nn.Module, pairs: Tensor | None = None) -> Heads:
    """The projections of `module` (the site's, or a copy of it), float64."""

    n_rep = site.heads // site.kv_heads

    def rows(r: Rows) -> Tensor:
        return augmented(site.linear(r.child, module))[r.start:r.stop].double()

    if site.packed:
        whole = augmented(site.linear(site.q.child, module)).double().unflatten(0, (site.kv_heads, -1))
        q, k, v = (x.flatten(0, 1) for x in whole.split([n_rep * site.d, site.d, site.dv], 1))
    else:
        q, k, v = map(rows, (site.q, site.k, site.v))
    q, k, v = (x.unflatten(0, (n, -1)) for x, n in ((q, site.heads), (k, site.kv_heads), (v, site.kv_heads)))  # [heads, d, E]
    o = matrix(site.linear(site.output, module)).double()
    return Heads(q, k, v, o.view(len(o), site.heads, site.dv).transpose(0, 1), pairs)


def value_rows(site: Site) -> slice | Tensor:
    """Which rows of its linear layer are the values', KV head by KV head."""
    if not site.packed:
        return slice(site.v.start, site.v.stop)
    rows = torch.arange(sizes_of(site.linear(site.v.child))[0], device=site.linear(site.v.child).weight.device)
    return rows.view(site.kv_heads, -1)[:, -site.dv:].flatten()


def write(site: Site, module: nn.Module, heads: Heads) -> None:
    """Put `heads` in place of the projections of `module` (the site's, or a copy), in their dtype, and correct the counts it keeps itself."""
    parts: dict[str, list[Tensor]] = {}
    if site.packed:
        parts[site.q.child] = [torch.cat([heads.of_kv(heads.q).flatten(1, 2), heads.k, heads.v], 1).flatten(0, 1)]
    for r, value in () if site.packed else sorted(((site.q, heads.q), (site.k, heads.k), (site.v, heads.v)), key=lambda x: x[0].start):
        parts.setdefault(r.child, []).append(value.flatten(0, 1))
    for child, values in parts.items():
        linear, both = site.linear(child, module), torch.cat(values)
        replace_weight(linear, both[:, :-1], None if linear.bias is None else both[:, -1])
    replace_weight(site.linear(site.output, module), heads.o.transpose(0, 1).flatten(1))
    sizes = [len(getattr(heads, n).flatten(0, 1)) for n in "qkv"]
    for owner in owners(module, site.children):
        restate(owner, site, len(heads.k), len(heads.q))
        restate_count(owner, WIDTHS, site.heads * site.dv, len(heads.q) * site.dv)
        for name, value in [*vars(owner).items()]:
            if isinstance(value, (list, tuple)) and [*value] == [r.stop - r.start for r in (site.q, site.k, site.v)]:
                setattr(owner, name, type(value)(sizes))  # the sizes a stacked projection is split into


def restate(owner: object, site: Site, kv_heads: int, heads: int | None = None) -> None:
    """Correct the head counts that `owner` (a module or a config) keeps; heads None: as many query heads as before."""
    heads = heads or site.heads
    for names, old, new in ((HEADS, site.heads, heads), (KV_HEADS, site.kv_heads, kv_heads), (N_REP, site.heads // site.kv_heads, heads // kv_heads)):
        restate_count(owner, names, old, new)


def restate_configs(site: Site, module: nn.Module, kv_heads: int, heads: int | None = None) -> None:
    """`restate` of every config that `module` (a copy of the site's) and what it is made of hold."""
    for config in {id(c): c for m in owners(module, site.children) if (c := getattr(m, "config", None)) is not None}.values():
        restate(config, site, kv_heads, heads)


def restate_count(owner: object, names: tuple[str, ...], old: int, new: int) -> None:
    """Attributes of these names that say `old` say `new`."""
    for name in names:
        if type(getattr(owner, name, None)) is int and getattr(owner, name) == old:
            setattr(owner, name, new)
