"""A region's loop nests as a Triton module (compiler/ir/region.py says what a nest computes; region_text.py writes the nests).

All nests are one launch, told apart by ranges of program ids; sums that several programs share take a second launch, which adds the
shares in order: no atomics, the same result every time. Static sizes and strides are part of the source; symbolic ones are arguments.
"""
from __future__ import annotations

import hashlib

import sympy
import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.region import Body
from ..cpp.region import describe
from ..spelling import size_text
from .attention import POINTERS as _POINTERS
from .region_text import NestText, helpers
from .source import fill, used

POINTERS = {dtype: "*i1" if dtype == torch.bool else text for dtype, text in _POINTERS.items() if dtype != torch.float64}

MODULE = '''
"""tileweld region of $ops ops

$detail
"""
import functools

import torch
import triton
import triton.language as tl

from tileweld.codegen.triton.region_plan import Flat, Rows, plan, processors
from tileweld.compiler.ir.lowered import restride


$functions


@triton.jit(do_not_specialize=[$loose])
def region_kernel($parameters):
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    $casts
    $calls


$combine_kernel


@functools.lru_cache(1024)
def planned(number$sizes):
    """What to launch for these sizes on a device of ``number`` processors."""
    return plan([$nests], [$extents], number)


def region(tensors, ints, floats):
    """tensors: $tensors; ints: $ints; no floats. Fills the outputs."""
    if tensors[0].device.type == "cpu" and any(t.dtype == torch.bfloat16 for t in tensors):  # the interpreter computes bf16 on raw bits
        wide = [torch.empty_like(t, dtype=torch.float32) if n < $outputs and t.dtype == torch.bfloat16 else t.float() if t.dtype == torch.bfloat16 else t for n, t in enumerate(tensors)]
        region(wide, ints, floats)
        for out, result in zip(tensors[:$outputs], wide):
            if out is not result:
                out.copy_(result)
        return
    $unpack
    $restride
    made = planned(processors(out0.device)$sizes)
    if not sum(made.programs):
        return
    of = made.constants
    $options
    $partials
    region_kernel[(sum(made.programs),)]($arguments, num_warps=made.num_warps, enable_fp_fusion=True$extra)
    $combine


# For compilation without a GPU: as the host function launches it on 132 processors$examples
AOT = []
made = planned(132$example)
for backend in ("cuda", "ampere", "hip"):
    AOT.append(dict(
        kernel="region_kernel", backend=backend, config=(*(n for name, n in made.constants.items() if name.startswith(("ROWS", "BLOCK"))), made.num_warps, 3),
        signature=$signature,
        divisible_by_16=$divisible,
        constants={name: made.constants[name] for name in $constants}))
    $combine_aot
'''

COMBINE = '''
@triton.jit(do_not_specialize=[$loose])
def combine_kernel($parameters):
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    $casts
    $calls
'''

COMBINE_AOT = '''
if any(made.combine):
    AOT.append(dict(kernel="combine_kernel", backend=backend, config=(4, 3), signature=$signature, divisible_by_16=$divisible, constants={name: made.constants[name] for name in $constants}))
'''


def emit(body: Body) -> Kernel:
    """The kernel of a region. Tensors of a call: [outputs.., inputs..]; integers: body.sizes; no floats.

    Strides are those of the body; inputs with symbolic sizes that have others are copied first. An index read from data that is out of
    range is a device-side assertion, as ATen's is. Raises UnsupportedError for float64.
    """
    for t in (*body.inputs, *body.outputs):
        if t.dtype not in POINTERS:
            raise UnsupportedError(f"no Triton region kernel for {t.dtype}", cure="the ops run as ATen calls")
    nests = [NestText(body, nest, k) for k, nest in enumerate(body.nests)]
    functions = {k: n.functions() for k, n in enumerate(nests)}
    text = "\n\n".join(made for parts in functions.values() for made, _ in parts.values())
    names = {s: str(s) for s in body.sizes}
    spell = lambda e: size_text(sympy.sympify(e), names)  # noqa: E731
    split = [k for k, n in enumerate(nests) if n.is_splittable]
    module = _Module(body, functions, split)
    sizes = "".join(f", {s}" for s in body.sizes)
    extents = list(dict.fromkeys(e for n in nests for e in n.flat.extents()))
    unpacked = [*(f"out{k}" for k in range(len(body.outputs))), *(f"c{k}" for k in range(len(body.inputs)))]
    source = fill(
        MODULE, ops=body.ops, detail=_cut(describe(body)), functions="\n\n".join(filter(None, [helpers(nests, text), text])), **module.kernel("region_kernel"),
        combine_kernel=fill(COMBINE, **module.kernel("combine_kernel")) if split else "", sizes=sizes, nests=", ".join(n.plan(spell) for n in nests), extents=", ".join(_spelled(extents, spell)),
        tensors=", ".join(unpacked), ints=", ".join(map(str, body.sizes)) or "none", outputs=len(body.outputs),
        unpack=[f"{', '.join(unpacked)}{',' if len(unpacked) == 1 else ''} = tensors", *([f"{', '.join(map(str, body.sizes))}{',' if len(body.sizes) == 1 else ''} = ints"] if body.sizes else [])],
        restride=_restrides(body, spell), options=['checked = {"debug": True, "sanitize_overflow": False} if out0.is_cuda else {}  # assertions act in debug mode alone'] if body.checks else [],
        extra=", **checked" if body.checks else "", partials=module.partials(nests, spell), arguments=module.arguments("region_kernel"),
        combine=["if any(made.combine):", f"    combine_kernel[(sum(made.combine),)]({module.arguments('combine_kernel')}, num_warps=4, enable_fp_fusion=True)"] if split else [],
        examples=", every symbolic size 1024" if body.sizes else "", example=", 1024" * len(body.sizes), combine_aot=fill(COMBINE_AOT, **module.aot("combine_kernel")) if split else [], **module.aot("region_kernel"))
    source = source.replace("\n\n\n\n", "\n")
    return Kernel("region_" + hashlib.sha256(source.encode()).hexdigest()[:8], "triton", source, "region", rewrite="region", detail=describe(body))


def _cut(text: str) -> str:
    """For a docstring: a line of at most 400 characters."""
    return "\n".join(line if len(line) <= 400 else line[:400] + " ..." for line in text.split("\n"))


def _spelled(extents, spell) -> list[str]:
    largest = max((e for e in extents if e.is_Integer), default=None)
    return [spell(e) for e in extents if not e.is_Integer] + ([spell(largest)] if largest is not None else [])


def _restrides(body: Body, spell) -> list[str]:
    """Inputs of symbolic sizes are held to the strides that the kernel was made for; others are held to theirs by their caller."""
    def row(entries):
        return f"({', '.join(map(spell, entries))}{',' if len(entries) == 1 else ''})"

    if not body.sizes:
        return []
    return [f"if c{k}.stride() != {row(t.strides)}:\n    c{k} = restride(c{k}, {row(t.sizes)}, {row(t.strides)})" for k, t in enumerate(body.inputs) if t.sizes]


class _Module:
    """The two kernels of a module: parameters, calls of the nests, arguments of a launch, ahead-of-time signature."""

    def __init__(self, body: Body, functions: dict, split: list[int]):
        self.body, self.functions, self.split = body, functions, split
        self.texts = {"region_kernel": self._calls(), "combine_kernel": self._share_calls()}

    def _calls(self) -> list[str]:
        lines = []
        for k, parts in self.functions.items():
            offset = "program" if k == 0 else f"program - last{k - 1}"
            calls = [self._call(name, parts[name][1], k, offset) for name in (f"nest{k}_long", f"nest{k}") if name in parts]
            call = calls if len(calls) == 1 else [f"if LOOP{k}:", "    " + calls[0], "else:", "    " + calls[1]]
            lines += self._branch(k, len(self.functions), f"program < last{k}", call)
        return lines

    def _share_calls(self) -> list[str]:
        lines = []
        for n, k in enumerate(self.split):
            offset = "program" if n == 0 else f"program - last{self.split[n - 1]}"
            lines += self._branch(n, len(self.split), f"program < last{k}", [self._call(f"nest{k}_shares", self.functions[k][f"nest{k}_shares"][1], k, offset)])
        return lines

    @staticmethod
    def _branch(n, count, condition, call):
        if count == 1:
            return call
        head = f"if {condition}:" if n == 0 else f"elif {condition}:" if n < count - 1 else "else:"
        return [head, *("    " + x for x in call)]

    @staticmethod
    def _call(name, parameters, k, program) -> str:
        own = {"program": program, "partial_ptr": f"partial{k}_ptr", "splits": f"splits{k}"} | {c: f"{c}{k}" for c in ("ROWS", "BLOCK", "SPLIT", "LANES", "SHARES")}
        return f"{name}({', '.join(own.get(p, p) for p in parameters)})"

    def parameters(self, kernel: str) -> tuple[list[str], list[str]]:
        """(arguments, constants) of a kernel, those in use."""
        nests, text = range(len(self.functions)), "\n".join(self.texts[kernel])
        names = [*(f"out{k}_ptr" for k in range(len(self.body.outputs))), *(f"c{k}_ptr" for k in range(len(self.body.inputs))), *(f"partial{k}_ptr" for k in self.split),
                 *map(str, self.body.sizes), *(f"last{k}" for k in nests), *(f"splits{k}" for k in self.split)]
        return used(text, names), ["WIDE", *used(text, [f"{c}{k}" for k in nests for c in ("ROWS", "BLOCK", "LOOP", "SPLIT", "LANES", "SHARES")])]

    def kernel(self, kernel: str) -> dict:
        arguments, constants = self.parameters(kernel)
        loose = ", ".join(f'"{a}"' for a in arguments if a.startswith(("last", "splits")))
        casts = [f"{s} = tl.cast({s}, INDEX)" for s in map(str, self.body.sizes) if s in arguments]
        return dict(loose=loose, parameters=", ".join([*arguments, *(f"{c}: tl.constexpr" for c in constants)]), casts=casts, calls=self.texts[kernel])

    def arguments(self, kernel: str) -> str:
        programs = "programs" if kernel == "region_kernel" else "combine"

        def argument(name):
            if name.startswith("last"):
                return f"sum(made.{programs}[:{int(name[4:]) + 1}])"
            return f"made.splits[{name[6:]}]" if name.startswith("splits") else name.removesuffix("_ptr")

        arguments, constants = self.parameters(kernel)
        return ", ".join([*map(argument, arguments), *(f'{c}=of["{c}"]' for c in constants)])

    def partials(self, nests, spell) -> list[str]:
        """Memory for the shares of split nests, [reduction, split, row]."""
        lines = []
        for k in self.split:
            count = f"{len(nests[k].nest.reductions)}, made.splits[{k}], {spell(nests[k].flat.total)}"
            lines.append(f"partial{k} = torch.empty(({count}), dtype=torch.float32, device=out0.device) if made.splits[{k}] > 1 else out0  # not touched without splits")
        return lines

    def aot(self, kernel: str) -> dict:
        arguments, constants = self.parameters(kernel)

        def kind(name):
            if name.startswith("partial"):
                return "*fp32"
            if name.endswith("_ptr"):
                tensor = self.body.outputs[int(name[3:-4])] if name.startswith("out") else self.body.inputs[int(name[1:-4])]
                return POINTERS[tensor.dtype]
            return "i32"

        signature = {a: kind(a) for a in arguments} | dict.fromkeys(constants, "constexpr")
        divisible = [a for a in arguments if not a.startswith(("last", "splits"))]
        return dict(signature=repr(signature), divisible=repr(divisible), constants=repr(constants))
