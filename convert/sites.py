"""Where the attention modules of a model are, their projections as rows of linear layers, and how to write others in their place.

Found by structure: a module with linear children for query, key, value and output (or one linear layer for the first three, stacked), whose
sizes fit the head counts it or its config states. The names below are the usual ones of those children and counts; no model's name matters.
Whether the module really computes attention from them, and with which rotary embedding, is tried out in probe.py.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from ..compiler.ir.head_merge import Heads

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
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QK_NORM = re.compile(r"(^|_)(q|k|qk|query|key)_?(norm|ln|layernorm|layer_norm)$")


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the linear layer that is the module's child of that name."""

    child: str
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """One attention module: where, its projections, H query heads and Hkv KV heads, head dims of keys and of values."""

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

    @property
    def children(self) -> list[str]:
        """Names of the linear layers, each once."""
        return list(dict.fromkeys([self.q.child, self.k.child, self.v.child, self.output]))

    def kv_bytes(self, kv_heads: int | None = None) -> int:
        """Bytes of cached keys and values a token, in the weights' dtype."""
        return (kv_heads or self.kv_heads) * (self.d + self.dv) * getattr(self.module, self.k.child).weight.element_size()


def find_sites(model: nn.Module, turned: bool = True) -> list[Site]:
    """Every attention module in order of registration. Raises ConversionError where one is found that cannot be converted, or none is.

    turned: heads will be rescaled and turned, which a norm of queries or keys forbids; False: they are only taken out, and there may be no attention at all.
    """
    sites = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        roles = {role: next((n for n in names if n in children), None) for role, names in ROLES.items()}
        stacked = next((n for n in STACKED if n in children), None)
        if roles["q"] and roles["o"] and not (roles["k"] and roles["v"]):
            raise ConversionError(f"it has {roles['q']} and {roles['o']} but no projection of its own for {'keys' if not roles['k'] else 'values'}: shared or latent KV",
                                  where=name, cure="such layers cache no heads of their own that could be merged")
        if roles["o"] and (stacked or roles["q"]):
            sites.append(_site(name, module, children, roles, stacked, turned))
    if not sites and turned:
        raise ConversionError(f"{type(model).__name__} has no attention module: none has children such as {', '.join(n[0] for n in ROLES.values())}",
                              cure="name the projections so, or as in " + ", ".join("/".join(ROLES[r][1] for r in "qkvo").split(", ")))
    check_unshared(model, [(site.name, site.module, site.children) for site in sites])
    return sites


def _site(name: str, module: nn.Module, children: dict, roles: dict, stacked: str | None, turned: bool) -> Site:
    norm = next((n for n in children if _QK_NORM.search(n)), None)
    if norm and turned:
        raise ConversionError(f"{norm} normalises queries or keys: heads cannot be rescaled or turned to fit each other", where=name,
                              cure="QK-norm models are not converted")
    linears = {n: children[n] for n in ([stacked] if stacked else [roles["q"], roles["k"], roles["v"]]) + [roles["o"]]}
    for child, linear in linears.items():
        check_linear(f"{name}.{child}", linear)
    heads = stated(module, HEADS)
    if not heads:
        raise ConversionError(f"neither the module nor its config says how many query heads it has (looked for {', '.join(HEADS)})", where=name)
    kv_heads = stated_kv_heads(module, heads)
    if not kv_heads:
        raise ConversionError(f"neither the module nor its config says how many KV heads it has (looked for {', '.join(KV_HEADS + N_REP)}): its code reads as many as queries",
                              where=name, cure="convert a model whose attention takes fewer KV heads")
    if heads % kv_heads:
        raise ConversionError(f"{heads} query heads are no multiple of {kv_heads} KV heads", where=name)
    sizes = {n: linear.out_features for n, linear in linears.items()}
    dv, rest = divmod(linears[roles["o"]].in_features, heads)
    if stacked:
        d = (sizes[stacked] - kv_heads * dv) // (heads + kv_heads)
        q, k, v = (Rows(stacked, a, b) for a, b in ((0, heads * d), (heads * d, (heads + kv_heads) * d), ((heads + kv_heads) * d, sizes[stacked])))
    else:
        d = sizes[roles["q"]] // heads
        q, k, v = (Rows(roles[r], 0, sizes[roles[r]]) for r in "qkv")
    want = {"query": (q, heads * d), "key": (k, kv_heads * d), "value": (v, kv_heads * dv)}
    wrong = [f"{role} projection {rows.child} has {rows.stop - rows.start} rows, expected {n}" for role, (rows, n) in want.items() if rows.stop - rows.start != n]
    if wrong or rest or len({linears[rows.child].in_features for rows in (q, k, v)}) > 1:
        raise ConversionError("; ".join(wrong) or "query, key and value projections read inputs of different sizes", where=name,
                              cure=f"{heads} query heads and {kv_heads} KV heads are what the module or its config states; cross attention is not converted")
    return Site(name, module, q, k, v, roles["o"], heads, kv_heads, d, dv)


def check_linear(name: str, linear: nn.Module) -> None:
    """Refuse what is no nn.Linear with plain float weights of its size: quantised, sharded (DTensor), without numbers."""
    weight = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear:
        raise ConversionError(f"it is a {type(linear).__name__}, not nn.Linear: quantised, sharded or with an adapter", where=name, cure="dequantise, gather or merge it first")
    for tensor in (weight, linear.bias):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
            raise ConversionError(f"its weight is a {type(tensor.data).__name__}: quantised or sharded", where=name, cure="dequantise or gather it first")
        if tensor.dtype not in _FLOATS:
            raise ConversionError(f"its weight is {tensor.dtype}: quantised", where=name, cure="dequantise it first")
        if tensor.device.type == "meta":
            raise ConversionError("its weight is on the meta device, without numbers", where=name, cure="load the weights first")
    if tuple(weight.shape) != (linear.out_features, linear.in_features):
        raise ConversionError(f"its weight is {[*weight.shape]}, expected {[linear.out_features, linear.in_features]}: sharded", where=name, cure="gather it first")


def check_unshared(model: nn.Module, places: list[tuple[str, nn.Module, list[str]]]) -> None:
    """Refuse modules and weights that stand at two places: changed for the one, they would be wrong for the other. places: (name, module, its linear children)."""
    ours = {id(p): f"{name}.{child}" for name, module, children in places for child in children for p in getattr(module, child).parameters()}
    ours |= {id(m): name for name, module, children in places for m in (module, *(getattr(module, c) for c in children))}
    seen: dict[int, str] = {}
    everything = [*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)]
    for name, thing in everything:
        if id(thing) in ours and seen.setdefault(id(thing), name) != name:
            raise ConversionError(f"it is also {name}: one {'weight' if isinstance(thing, Tensor) else 'module'} in two roles", where=seen[id(thing)],
                                  cure="give each its own copy (copy.deepcopy)")


def stated(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive int, of the module or of its `config`."""
    return next((n for owner in (module, getattr(module, "config", None)) for n in _counts(owner, names)), None)


def stated_kv_heads(module: nn.Module, heads: int) -> int | None:
    """The module before its config, and n_rep too: layers of one config may differ (max_residual skips some)."""
    for owner in (module, getattr(module, "config", None)):
        for n in (*_counts(owner, KV_HEADS), *(heads // n for n in _counts(owner, N_REP) if heads % n == 0)):
            return n
    return None


def _counts(owner: object, names: tuple[str, ...]) -> list[int]:
    return [n for n in (getattr(owner, name, None) for name in names) if type(n) is int and n > 0]


def read(site: Site, module: nn.Module, pairs: Tensor | None = None) -> Heads:
    """The projections of `module` (the site's, or a copy of it), float64."""

    def rows(r: Rows, n: int, d: int) -> Tensor:
        linear = getattr(module, r.child)
        weight = linear.weight.detach()[r.start:r.stop].double()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()[r.start:r.stop].double()
        return torch.cat([weight, bias[:, None]], 1).view(n, d, -1)  # the bias is the column of the constant input 1

    o = getattr(module, site.output).weight.detach().double()
    return Heads(rows(site.q, site.heads, site.d), rows(site.k, site.kv_heads, site.d), rows(site.v, site.kv_heads, site.dv),
                 o.view(len(o), site.heads, site.dv).transpose(0, 1), pairs)


def write(site: Site, module: nn.Module, heads: Heads) -> None:
    """Put `heads` in place of the projections of `module` (the site's, or a copy), in their dtype, and correct the counts it keeps itself."""
    parts: dict[str, list[Tensor]] = {}
    for r, value in sorted(((site.q, heads.q), (site.k, heads.k), (site.v, heads.v)), key=lambda x: x[0].start):
        parts.setdefault(r.child, []).append(value.flatten(0, 1))
    for child, values in parts.items():
        linear, both = getattr(module, child), torch.cat(values)
        set_parameter(linear, "weight", both[:, :-1])
        if linear.bias is not None:
            set_parameter(linear, "bias", both[:, -1])
        linear.out_features = len(both)
    output = getattr(module, site.output)
    set_parameter(output, "weight", heads.o.transpose(0, 1).flatten(1))
    output.in_features = output.weight.shape[1]
    sizes = [len(getattr(heads, n).flatten(0, 1)) for n in "qkv"]
    restate(module, site, len(heads.k), len(heads.q))
    for owner, name, value in list(vars_of(module)):
        if isinstance(value, (list, tuple)) and [*value] == [r.stop - r.start for r in (site.q, site.k, site.v)]:
            setattr(owner, name, type(value)(sizes))  # the sizes a stacked projection is split into


def restate(owner: object, site: Site, kv_heads: int, heads: int | None = None) -> None:
    """Correct the head counts that `owner` (a module or a config) keeps; heads None: as many query heads as before."""
    heads = heads or site.heads
    for names, old, new in ((HEADS, site.heads, heads), (KV_HEADS, site.kv_heads, kv_heads), (N_REP, site.heads // site.kv_heads, heads // kv_heads)):
        restate_count(owner, names, old, new)


def restate_count(owner: object, names: tuple[str, ...], old: int, new: int) -> None:
    """Attributes of these names that say `old` say `new`."""
    for name in names:
        if type(getattr(owner, name, None)) is int and getattr(owner, name) == old:
            setattr(owner, name, new)


def vars_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """(module, name, value) of the plain attributes."""
    return ((module, name, value) for name, value in vars(module).items() if not name.startswith("_"))


def set_parameter(linear: nn.Linear, name: str, value: Tensor) -> None:
    """A new parameter of this value, in the dtype of the old one and trained if that is."""
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))
