"""A lowered graph as one straight-line Python function, with its buffers planned.

    def prepare(place):                                             # once a workspace: tensors, views of them, and what kernels are passed
        rms_norm = place(0, (1, 64), (64, 1), torch.float32)        # lines 3 to 9
        ...
    def graph(arguments):
        x, weight, = arguments
        workspace = take()
        rms_norm, p_rms_norm, = workspace.tensors
        rms_norm_1a2b(pointers_3(p_rms_norm, x.data_ptr(), weight.data_ptr()), integers_1, floats_1)
        torch.mm(rms_norm, weight_1.t(), out=mm)
        give(workspace)
        return (result,)

A kernel of ours is called with packed pointers, sizes and strides; everything but the pointers of inputs is packed by `prepare`. Shape
symbols are arguments of ``take``; a workspace made for the same ones is used as it is. The text holds names and numbers alone:
a constant that has no text of its own is passed in by name.
"""
from __future__ import annotations

import operator
import re
from collections.abc import Callable

import sympy
import torch
from torch.fx import GraphModule, Node

from ..compiler.errors import UnsupportedError
from ..compiler.ir.graph import is_tensor, size, value
from ..compiler.ir.lowered import Buffer, Launch, is_getitem, is_launch
from ..compiler.ir.packing import pack, peak
from ..compiler.ir.text import Text
from .launches import Launches, _tuple, is_direct
from .liveness import Liveness, Planned, is_inplace, is_view, symbols_of
from .spelling import COPY, METHOD, OUT, identifier, literal, size_text

RESERVED = ("arguments", "workspace", "place", "prepare", "sizes", "graph", "take", "give", "torch", "restride", "empty_strided", "integers", "floats", "pointers", "launches", "increment_version", "float", "max", "min", "None", "True", "False")


def write(gm: GraphModule, driver=None) -> Text:
    """The text of a lowered graph; driver: what walks the tables of launches (runtime/launches.py), None for a call a launch. Raises UnsupportedError for calls of modules or methods, which AOT's graphs do not have."""
    return _Writer(gm, driver).write()


class _Writer(Launches):
    def __init__(self, gm: GraphModule, driver=None):
        super().__init__(RESERVED, driver)
        self.gm, self.graph = gm, gm.graph
        self.live = Liveness(gm.graph)
        self.names: dict[Node, str] = {}
        self.symbols: dict[sympy.Symbol, str] = {}  # names of the shape symbols known at entry
        self.body: list[str] = []
        self.ahead: list[str] = []  # of prepare
        self.made: list[str] = []  # names that prepare returns
        self.known_layout: set[Node] = set()
        self.pointers: dict[str, str] = {}  # tensor of the arena -> name of its pointer
        self.prepared: set[Node] = set()
        self.inline: set[Node] = set()
        self.virtual: dict[Node, Node] = {}
        self.kept: set[Node] = set()  # variables that are not deleted
        self.together: set[Node] = set()  # calls whose results are read as name[k]
        self.inner: dict[sympy.Symbol, str] = {}  # names of those that become known on the way
        entry = symbols_of(self.graph)
        self.inherited = {id(p.home) for p in self.live.planned.values() if p.storage is not None}
        planned = [p for p in self.live.planned.values() if p.storage is None and p.last is not None and p.buffer.symbols <= entry]
        self.device = planned[0].buffer.device if planned else None
        self.arena = {id(p): k for k, p in enumerate(p for p in planned if p.buffer.device == self.device)}
        self.lives = [(p.first, p.last) for p in planned if p.buffer.device == self.device]
        self.sizes = [p.buffer for p in planned if p.buffer.device == self.device]

    # ---------------------------------------------------------------- the parts

    def write(self) -> Text:
        self._enter()
        entry = len(self.body)
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._call(node)
                self._forget(node)
            elif node.op == "get_attr":
                self.names[node] = self._object(node.name, operator.attrgetter(node.target)(self.gm))
            elif node.op == "output":
                self._leave(node)
            elif node.op != "placeholder":
                raise UnsupportedError(f"{node.op} of {node.target} has no place in an executable")
        return self._assemble(entry)

    def _enter(self) -> None:
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            self.names[node] = self._name(node.name)
        if inputs:
            self.body += [f"{', '.join(self.names[n] for n in inputs)}, = arguments", "arguments.clear()"]
        for node in inputs:
            known = value(node)
            if isinstance(known, torch.SymInt) and size(known).is_Symbol:
                self.symbols.setdefault(size(known), self.names[node])
        for node in inputs:
            if is_tensor(node) and value(node).layout is torch.strided:
                for method, row in (("shape[{}]", value(node).shape), ("stride({})", value(node).stride())):
                    for d, n in enumerate(row):
                        if isinstance(n, torch.SymInt) and size(n).is_Symbol and size(n) not in self.symbols:
                            self.symbols[size(n)] = name = self._name(str(size(n)))
                            self.body.append(f"{name} = {self.names[node]}.{method.format(d)}")

    def _assemble(self, entry: int) -> Text:
        read = set(re.findall(r"\w+", "\n".join(self.body)))
        self.made = [name for name in self.made if name in read]  # the rest is read by runs alone
        names = list(self.symbols.values())
        used, lines = ", ".join(names), []
        known = [int(_bytes(b)) if _bytes(b).is_Integer else None for b in self.sizes]
        arena, naive = (pack(known, self.lives)[1], peak(known, self.lives)) if known and None not in known else (None, None)
        if self.made:
            said = f"an arena of {arena} bytes for {len(known)} buffers of {sum(known)}" if arena is not None else f"an arena for {len(known)} buffers"
            lines += [f"# {said}", f"def sizes({used}):", f"    return ({''.join(size_text(_bytes(b), self.symbols) + ', ' for b in self.sizes)})", ""]
            lines += [f"def prepare(place{', ' if used else ''}{used}):", *("    " + x for x in self.ahead), f"    return ({', '.join(self.made)},)", ""]
            self.body[entry:entry] = [f"workspace = take({used})", f"{', '.join(self.made)}, = workspace.tensors"]
        return Text("\n".join([*lines, "def graph(arguments):", *("    " + x for x in self.body), ""]), self.objects, self.lives if self.made else None, self.device, arena, naive)

    def _leave(self, node: Node) -> None:
        self._flush()
        if self.made:
            self.body.append("give(workspace)")
        results = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
        self.body.append(f"return ({''.join(self._argument(x) + ', ' for x in results)})")

    def _forget(self, node: Node) -> None:
        """Tensors of no arena are freed behind their last reader."""
        line = self.live.lines[node]
        read, stack = {node}, [*node.all_input_nodes]
        while stack:
            x = stack.pop()
            read.add(x)
            stack += x.all_input_nodes if x in self.inline or x in self.virtual else ()
        dead = [n for n in read if self.live.last_use[n] == line and n in self.names and not (n in self.prepared or n in self.inline or n in self.kept) and n.op != "get_attr" and self._may_hold_memory(n)]
        if dead:
            self._delete(sorted(self.names[n] for n in dead))

    @staticmethod
    def _may_hold_memory(node: Node) -> bool:
        return not isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) and not (is_launch(node))

    # ---------------------------------------------------------------- calls

    def _call(self, node: Node) -> None:
        if is_launch(node):
            self._launch(node)
        elif is_getitem(node) and is_launch(node.args[0]):
            planned = self.live.planned[(node.args[0], node.args[1])]
            if planned.node is not node:  # the same output read twice
                self.names[node] = self.names[planned.node]
                self.kept |= {node, planned.node}
                if planned.node in self.prepared:
                    self.prepared.add(node)
        elif is_getitem(node) and node.args[0] in self.together:
            self.names[node] = f"{self.names[node.args[0]]}[{node.args[1]}]"
            self.known_layout.add(node)
            self.kept.add(node)
        elif (node, 0) in self.live.planned and self._is_provided(self.live.planned[(node, 0)]):
            self._call_into(node, self.live.planned[(node, 0)])
        elif is_view(node) and isinstance(node.args[0], Node) and node.args[0] in self.prepared and self._is_fixed(node):
            self.names[node] = self._once(node.name, self._plain(node, self._ahead_argument))
            self.prepared.add(node)
            self.known_layout.add(node)
        elif self._is_virtual(node):
            self.virtual[node] = node
            self._read_in_place_of(node)
        elif self._is_inline(node):
            self.names[node] = self._plain(node, self._argument)
            self.inline.add(node)
            self._read_in_place_of(node)
        elif node.target not in (torch.ops.aten.index_copy_.default, torch.ops.aten.copy_.default) or not self._copy(node):
            text = self._plain(node, self._argument)
            if node.users or not is_inplace(node):
                self.names[node] = self._name(node.name)
                text = f"{self.names[node]} = {text}"
                made_by = node.args[0].target if is_getitem(node) else node.target
                if getattr(made_by, "has_known_layout", False) and is_tensor(node):
                    self.known_layout.add(node)
                if hasattr(node.target, "members"):  # the values are held anyway, as the weights are: no variable each, and none to delete
                    self.together.add(node)
                    self.kept |= {node, *node.args}
                    text += f"  # {', '.join(folded.__name__ for folded, _ in node.target.members)}"
                if isinstance(value(node), torch.SymInt) and size(value(node)).is_Symbol:
                    self.inner.setdefault(size(value(node)), self.names[node])
            if self._may_come_early(node):
                self.body.append(text)
            else:
                self._line(text)

    def _may_come_early(self, node: Node) -> bool:
        """Views, numbers, and what reads no tensor: nothing that launches write is looked at."""
        return (is_view(node) and not self.live.bases[node] & self.run_written) or is_getitem(node) and not is_launch(node.args[0]) and is_tensor(node) or not any(map(is_tensor, node.all_input_nodes)) and not is_inplace(node)

    def _read_in_place_of(self, node: Node) -> None:
        """What a view without a variable is a view of is read where the view is."""
        x, last = node, max(self.live.lines[u] for u in node.users)
        while x in self.inline or x in self.virtual:
            x = x.args[0]
            self.live.last_use[x] = max(self.live.last_use[x], last)

    def _is_inline(self, node: Node) -> bool:
        """A view that one call reads is written where it is read."""
        if node.target not in METHOD or not is_view(node) or len(node.users) != 1:
            return False
        (user,) = node.users
        return user.op == "call_function" and not is_launch(user) and not self._is_virtual(user) and user.target not in COPY and sum(a is node for a in torch.utils._pytree.tree_leaves((user.args, user.kwargs))) == 1

    def _is_provided(self, planned: Planned) -> bool:
        """Do we give the call its buffer? Not where the result leaves the graph: then the call may as well make it."""
        return id(planned.home) in self.arena or planned.storage is not None or id(planned) in self.inherited

    def _call_into(self, node: Node, planned: Planned) -> None:
        self._allocate(planned, node.name)
        name = self.names[node]
        if node.target in COPY:
            self._line(f"{name}.copy_({self._argument(node.args[0])})")
            return
        given = [self._argument(a) for a in node.args] + [f"{k}={self._argument(v)}" for k, v in node.kwargs.items()]
        self._line(f"{OUT[node.target]}({', '.join([*given, f'out={name}'])})" + self._said(planned))

    def _plain(self, node: Node, argument: Callable) -> str:
        given = [argument(a) for a in node.args]
        named = [f"{k}={argument(v)}" for k, v in node.kwargs.items()]
        if node.target in METHOD and not node.kwargs and isinstance(node.args[0], Node):
            return f"{given[0]}.{'reshape' if self._may_be_laid_out_otherwise(node) else METHOD[node.target]}({', '.join(given[1:])})"
        if is_getitem(node):
            return f"{given[0]}[{given[1]}]"
        return f"{self._function(node.target)}({', '.join(given + named)})"

    def _may_be_laid_out_otherwise(self, node: Node) -> bool:
        """A view of what a call made, whose strides may differ from those that its fake says; a view refuses then, a reshape copies. Nobody writes through it."""
        source = node
        while is_view(source):
            source = source.args[0]
        return METHOD[node.target] == "view" and source.op == "call_function" and source not in self.known_layout and not self.live.bases[node] & self.live.written

    def _function(self, target) -> str:
        if isinstance(target, torch._ops.OpOverload) and all(x.isidentifier() for x in str(target).split(".")):
            name = identifier(str(target).replace(".", "_"))
            return name if self.objects.get(name) is target else self._object(name, target)
        return self._object(getattr(target, "__name__", "function"), target)

    def _is_fixed(self, node: Node) -> bool:
        """Are all arguments numbers that are known at entry?"""
        found: list[Node] = []
        torch.fx.node.map_arg((node.args[1:], node.kwargs), found.append)
        return all(self._entry_number(n) is not None for n in found)

    def _entry_number(self, x) -> str | None:
        known = value(x) if isinstance(x, Node) else x
        if isinstance(known, torch.SymInt):
            try:
                return size_text(size(known), self.symbols)
            except UnsupportedError:
                return None
        return repr(known) if isinstance(known, (int, float)) and not isinstance(x, Node) else None

    # ---------------------------------------------------------------- buffers and names

    def _allocate(self, planned: Planned, name: str) -> str:
        """The buffer of a result under a name of its own."""
        self.names[planned.node if not is_launch(planned.node) else planned] = name = self._name(name)
        home, buffer = planned.home, planned.buffer
        sizes, strides = (_tuple([self._size(e) for e in row]) for row in (buffer.sizes, buffer.strides))
        if id(home) in self.arena:
            note = f"  # lines {home.first} to {home.last}" if home is planned else f"  # over {self.names.get(home.node, home.node.name)}"
            self.ahead.append(f"{name} = place({self.arena[id(home)]}, {sizes}, {strides}, {buffer.dtype}){note}")
            self.made.append(name)
            self.prepared.add(planned.node)
        elif home is not planned:
            source = self.names[home.node]
            same = (home.buffer.sizes, home.buffer.strides) == (buffer.sizes, buffer.strides)
            self.body.append(f"{name} = {source}" if same else f"{name} = {source}.as_strided({sizes}, {strides})")
        else:
            self.body.append(f"{name} = empty_strided({sizes}, {strides}, dtype={buffer.dtype}, device={literal(buffer.device)})")
        if id(planned) in self.inherited:
            self.kept.add(planned.node)  # its variable stays, for the result that takes it over
        self.known_layout.add(planned.node)
        return name

    def _said(self, *planned: Planned) -> str:
        over = [f"{self.names.get(p.node, p.node.name)} over {self.names.get(p.home.node, p.home.node.name)}" for p in planned if p.storage is not None]
        return f"  # in place: {', '.join(over)}" if over else ""

    def _size(self, e: sympy.Expr) -> str:
        return size_text(e, self.inner | self.symbols)

    def _argument(self, x) -> str:
        return self._written(x, lambda n: self.names[n])

    def _ahead_argument(self, x) -> str:
        return self._written(x, lambda n: self.names[n] if is_tensor(n) else self._entry_number(n))


def _bytes(buffer: Buffer) -> sympy.Expr:
    """From the first to behind the last element; 0 if there are none."""
    if any(n == 0 for n in buffer.sizes):
        return sympy.Integer(0)
    whole = 1 + sum(((n - 1) * stride for n, stride in zip(buffer.sizes, buffer.strides)), sympy.Integer(0))
    return sympy.Max(0, sympy.expand(whole * buffer.dtype.itemsize)) if whole.free_symbols else sympy.Integer(whole * buffer.dtype.itemsize)
