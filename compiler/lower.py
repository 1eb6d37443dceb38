"""Lowering: fused ops of a graph behind AOT become kernel launches; everything else stays an ATen call.

For each fused op a *selector* (a row of `SELECTORS`) chooses an implementation: a generated kernel, a library call where that
is at its limit, or the op's own definition. What was chosen, and why, goes into the report.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping

import torch
from torch.fx import GraphModule, Node

from ..codegen.expand import expand
from ..codegen.regions import find_regions
from ..runtime import launches
from ..runtime.build import CppUnit, compile_cpp
from ..runtime.interpret import interpreted_entry
from ..runtime.launch import CppLauncher
from ..runtime.source_module import load_python_source
from .assemble import assemble
from .backward_pays import blocks_instead
from .backward_pays import slower as slower_backwards
from .constants import fold_constants
from .degrade import degrade
from .errors import BuildError, CompilerNotFound, TileweldError, UnsupportedError
from .folded import Folded, fold_weights
from .int8_brgemm import choose_products
from .int8_choice import replaceable, to_floats, uses
from .ir.graph import is_tensor, source_of, value
from .ir.lowered import Launch
from .key_parts import separate_keys
from .options import Options
from .pays import losers
from .place import CannotPlace, Placer
from .reinplace import reinplace
from .report import FoldedWeight, Fusion, KernelUse, Report
from .row_max import part, slower
from .select import SELECTORS, Choice, region


def lower(gm: GraphModule, options: Options, report: Report, number: int, cuda_graphs: bool = False) -> Callable:
    """Replace fused ops and regions by their implementations, build all kernels of the graph at once, and return its executable."""
    gm, choices, launchers = settle(gm, options, report, number)
    note_folded(gm, report, number)
    placer = Placer(gm)
    for choice in choices:
        name, reason = choice.name, choice.reason
        if choice.kernel is not None:
            if choice.kernel not in report.sources:
                report.sources.append(choice.kernel)
            if choice.kernel.source not in launchers:
                name, reason = "reference", "its kernel could not be built"
            else:
                name = f"{choice.kernel.language}:{choice.kernel.name}"
        refusal = put(placer, choice, launchers)
        if refusal:
            name, reason = "reference", refusal
        if name == "reference" and choice.op != "region" and options.target != "reference" and (choice.kernel is None or refusal):
            error = UnsupportedError(f"{choice.op} runs on its definition: {reason}", cure="another dtype or shape; target 'reference' asks for it")
            if options.strict:
                raise error
            degrade(report, error.what, source_of(choice.node) if choice.node is not None else "", "it is right, and no faster than eager; options={'strict': True} makes it an error")
        report.kernels.append(KernelUse(choice.op, name, reason, number))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return assemble(gm, cuda_graphs, getattr(launchers.get(launches.KERNEL.source), "entry", None))


def settle(gm: GraphModule, options: Options, report: Report, number: int, timed: Collection[str] = ("linear", "int8_linear"), build_all: bool = True) -> tuple[GraphModule, list[Choice], dict[str, Callable]]:
    """(the graph, what runs in it, the kernels by source) once matmuls that do not pay are taken apart, int8 that does not is float, and a backward of attention that does not is blocks of torch operations.

    timed: the ops that may lose. build_all False: only kernels of int8 that may are built, for a report.
    """
    untouched = GraphModule(gm, copy.deepcopy(gm.graph))
    allowed = replaceable(untouched.graph) if options.int8 is not None and not options.int8.force else set()
    choices, launchers, apart, parted, kept = choose(gm, options), {}, {}, {}, {}
    while True:  # at most four times: int8, the float op in its place, its parts; pairs that share row maxima parted
        wanted = {c.kernel.source: c for c in choices if c.kernel is not None and (build_all or c.node is not None and c.node.name in allowed)}
        launchers |= _build({source: c for source, c in wanted.items() if source not in launchers}, options, report)
        choose_products(choices, launchers)
        found = losers([c for c in choices if c.op in timed and (c.op != "int8_linear" or c.node.name in allowed)], launchers, kept) | (slower_backwards(choices, launchers) if build_all else {})
        if not found and not (pairs := slower(choices, launchers)):
            break
        if found:
            apart |= found
        else:  # last, when it is known which products there are
            parted |= pairs
        gm = GraphModule(untouched, copy.deepcopy(untouched.graph))
        choices = choose(gm, options, apart, parted)
    blocks = {c.node.name for c in choices if c.op == "attention_backward"}  # which say it themselves
    report.kernels += [KernelUse("int8_linear", "tileweld:linear", reason, number) if name in allowed else KernelUse("linear", "aten:mm", reason, number) for name, reason in apart.items() if name not in blocks]
    report.kept += [Fusion("row_max", reason, source_of(next(n for n in untouched.graph.nodes if n.name == name)), number) for name, reason in parted.items()]
    report.int8 += uses(untouched.graph, report.int8_errors, apart, kept, number, options.int8 is not None and options.int8.force)
    return gm, choices, launchers


def put(placer: Placer, choice: Choice, launchers: Mapping[str, Callable | None]) -> str:
    """What was chosen into the graph; launchers by source, None for a graph that is only shown. The reason if it cannot be placed."""
    if choice.function is not None:
        choice.function.__name__ = choice.function.__qualname__ = choice.name.replace(":", "_")
        placer.current(choice.node).target = choice.function
    elif choice.kernel is not None and choice.kernel.source in launchers:
        layouts = [(tuple(value(x).shape), tuple(value(x).stride())) for x in choice.inputs] if choice.has_layout else None
        name = f"{choice.kernel.language}_{choice.kernel.name}"
        try:
            placer.put(choice, Launch(name, [value(o) for o in choice.outputs], choice.kernel, launchers[choice.kernel.source], choice.run, layouts, choice.inplace))
        except CannotPlace as error:
            return str(error)
    return ""


def note_folded(gm: GraphModule, report: Report, number: int) -> None:
    """The values that a graph keeps, into the report."""
    kept = [n.target for n in gm.graph.nodes if isinstance(n.target, Folded)]
    report.folded += [FoldedWeight(k.name, k.operations, k.sources, k.bytes, number, k.key) for k in kept]


def choose(gm: GraphModule, options: Options, apart: Collection[str] = (), parted: Collection[str] = ()) -> list[Choice]:
    """The implementation of every fused op and region of the graph; nothing is built.

    Before that, what depends on weights alone is replaced by kept values (in inference), ops that stand for several by their parts (those of the
    nodes named in ``apart`` too; those in ``parted`` find their row maxima themselves), what no input reaches by constants, updates of inputs by updates in place.
    """
    if parted:
        part(gm, parted)
    if apart:
        to_floats(gm, apart)
    if options.fold_weights:
        fold_weights(gm)
    if options.target != "reference":
        expand(gm, frozenset(SELECTORS) - {torch.ops.tileweld.rms_norm.default}, apart)
    fold_constants(gm)
    reinplace(gm)
    if options.target != "reference":
        separate_keys(gm)
    choices = []
    for node in gm.graph.nodes:
        selector = SELECTORS.get(node.target) if node.op == "call_function" else None
        if selector is not None:
            choices.append(choice := blocks_instead(node, apart) or selector(node, target_of(node, options), options))
            choice.node = node
    return choices + [region(found, target) for device, target in _region_targets(options) for found in find_regions(gm, device)]


def _region_targets(options: Options) -> list[tuple[str, str]]:
    """(device, what its regions are generated for)"""
    cpu = [("cpu", "triton" if options.target == "triton" else "cpp")]
    return {"reference": [], "cpp": cpu}.get(options.target, [*cpu, ("cuda", "triton")])


def target_of(node: Node, options: Options) -> str:
    """The target of one op: what options say, or by the device of its first tensor."""
    if options.target != "auto":
        return options.target
    tensor = next((value(a) for a in node.all_input_nodes if is_tensor(a)), None)
    return "triton" if tensor is not None and tensor.device.type == "cuda" else "cpp"


def _build(choices: dict[str, Choice], options: Options, report: Report) -> dict[str, Callable]:
    """source -> launch(tensors, ints, floats); a kernel that fails to build is missing, with a warning in the report."""
    made: dict[str, Callable] = {}
    cpp = [c.kernel for c in choices.values() if c.kernel.language == "cpp"]
    cpp += [launches.KERNEL] * bool(cpp)
    try:
        libraries = compile_cpp([CppUnit.of(k) for k in cpp])
        made |= {k.source: CppLauncher(library, k.entry) for k, library in zip(cpp, libraries)}
    except CompilerNotFound as error:
        _degrade(error, options, report)
    except BuildError:  # one of them does not compile: the others still do
        for k in cpp:
            try:
                made[k.source] = CppLauncher(compile_cpp([CppUnit.of(k)])[0], k.entry)
            except BuildError as error:
                _degrade(error, options, report, DRIVERLESS if k is launches.KERNEL else SLOW)
    for choice in choices.values():
        k = choice.kernel
        if k.language == "triton":
            try:
                if choice.interpreted:
                    degrade(report, "CPU tensors on the triton target run in Triton's interpreter", cure="it is for checking numerics, never for speed")
                    made[k.source] = interpreted_entry(k.name, k.source, k.entry)
                else:
                    made[k.source] = getattr(load_python_source(k.name, k.source), k.entry)
            except Exception as error:  # triton raises many kinds while it reads a source
                _degrade(error, options, report, name=k.name)
    return made


SLOW = "the ops run on their definition in torch, which is slow"
DRIVERLESS = "every kernel is called from Python, which costs a few microseconds each"  # what walks a run's table (runtime/launches.py) is missing, no kernel is


def _degrade(error: Exception, options: Options, report: Report, result: str = SLOW, name: str = "") -> None:
    """A kernel that could not be built: an error under strict, else what, where and cure, with the compiler's first complaint of many lines."""
    if options.strict:
        raise error
    ours = isinstance(error, TileweldError)
    complaint = next((line.strip() for line in getattr(error, "stderr", "").splitlines() if "error" in line), "")
    what = (error.what if ours else f"{name}: {error}") + (f": {complaint}" if complaint else "")
    degrade(report, what, (error.where if ours else None) or "", "; ".join(x for x in (error.cure if ours else None, result, "options={'strict': True} makes it an error") if x))
