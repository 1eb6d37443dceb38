"""The launches of an executable: what kernels are passed, and which of them one call from C launches in a row (a *run*).

A run is a table that `prepare` makes (runtime/launches.py) and the body calls with the addresses of what does not lie in the arena. Between its launches stand lines that only make views, allocate, or look at strides: they come
before it. A cache's update of a few positions is a step too. Any other call ends a run.
"""
from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from ..compiler.errors import UnsupportedError
from ..compiler.ir.graph import is_tensor, value
from ..compiler.ir.lowered import Buffer, Launch, is_launch
from .liveness import is_view
from .spelling import size_text
from .vocabulary import Vocabulary

aten = torch.ops.aten
NOTHING = 'b""'
COPY_DIMS, COPY_MOST = 16, 1 << 16  # an index_copy of more elements is torch's, on all threads


class Launches(Vocabulary):
    def __init__(self, reserved, driver=None):
        super().__init__(reserved)
        self.driver = driver  # what walks a run's table; None: there are no runs
        self.run: list[tuple] = []  # the launches that are not in the body yet
        self.after: list[str] = []  # lines behind them
        self.dead: list[str] = []  # variables that are deleted behind them
        self.versions: list[str] = []  # tensors of others that they write
        self.run_made: set = set()  # memory that they write
        self.run_written: set = set()  # memory of others that they write
        self.targets: dict[Node, str] = {}  # such a tensor -> the name of what is read and written
        self.returned: set[str] = set()  # those names of which a line behind the launches copies what was written back

    def _launch(self, node: Node) -> None:
        launch: Launch = node.target
        ins, ints, floats, _ = node.args
        outs = []
        for k in range(len(launch.buffers)):
            planned = self.live.planned[(node, k)]
            outs.append(self._allocate(planned, planned.node.meta.get("name", planned.node.name) if planned.node is not node else f"unread_{k}"))
        said = self._said(*(self.live.planned[(node, k)] for k in range(len(outs))))
        direct = self._is_step(launch)
        given = [self._laid_out(x) if launch.layouts is not None or direct else self._argument(x) for x in ins]
        tensors = [*outs, *given]
        if not direct:
            function = self._object(launch.__name__, launch.function or launch.launcher)
            given = [f"[{', '.join(outs)}]", *tensors[len(outs):]] if launch.run is not None else [f"[{', '.join(tensors)}]", f"[{', '.join(map(self._argument, ints))}]", f"[{', '.join(map(self._argument, floats))}]"]
            self._line(f"{function}({', '.join(given)}){said}")
            return
        entry = self._object(launch.__name__, getattr(launch.launcher, "entry", None))
        numbers, packed = [], "integers()"
        if launch.layouts is None:
            for buffer in (*launch.buffers, *(Buffer(value(x)) for x in ins)):
                numbers += [*buffer.sizes, *buffer.strides]
            texts = [self._entry_size(e) for e in numbers] + [self._entry_number(x) for x in ints]
            packed = f"integers({', '.join(texts)})" if None not in texts else None
        if packed is None:  # a size that is known on the way only
            texts = [f"*{t}.shape, *{t}.stride()" for t in tensors] + [self._argument(x) for x in ints]
            integers = f"integers({', '.join(texts)})"
        else:
            integers = self._once(f"{launch.__name__}_integers", packed)
        doubles = self._once(f"{launch.__name__}_floats", f"floats({', '.join(map(self._argument, floats))})") if not any(isinstance(x, Node) for x in floats) else f"floats({', '.join(map(self._argument, floats))})"
        where = [self._place(t, self.virtual.get(x)) for t, x in [*((t, None) for t in outs), *zip(given, ins)]]
        if self.driver is not None and not self.symbols and packed is not None and doubles in self.made:
            self._step(entry, where, integers, doubles, said, self.live.bases[node], status=len(outs) - 1 if launch.run is not None else None)
            return
        self._line(self._called(entry, where, integers, doubles, launch.__name__) + said)

    def _is_step(self, launch: Launch) -> bool:
        """Is it launched with packed pointers and numbers: alone, or, if it checks indices, by what walks a run's table?"""
        return is_direct(launch) or self.driver is not None and not self.symbols and is_checked(launch)

    def _called(self, entry: str, where: list[tuple[str, int]], integers: str, doubles: str, name: str) -> str:
        texts = list(map(self._pointer, where))
        pointers = f"{self._packer(len(texts))}({', '.join(texts)})"
        if all(x in self.made for x in texts):
            pointers = self._once(f"{name}_pointers", pointers)
        return f"{entry}({pointers}, {integers}, {doubles})"

    def _entry_size(self, e) -> str | None:
        try:
            return size_text(e, self.symbols)
        except UnsupportedError:
            return None

    def _once(self, name: str, text: str) -> str:
        """A value that prepare makes; the same text is made once."""
        if text in self.pointers:
            return self.pointers[text]
        self.pointers[text] = name = self._name(name)
        self.ahead.append(f"{name} = {text}")
        self.made.append(name)
        return name

    def _place(self, tensor: str, view: Node | None = None) -> tuple[str, int]:
        """Where a tensor's data is, or that of a view of it that has no variable of its own: the tensor, and bytes behind its start."""
        return tensor, int(_offset(view) - _offset(self._behind(view))) * value(view).element_size() if view is not None else 0

    def _pointer(self, where: tuple[str, int]) -> str:
        tensor, offset = where
        pointer = self._once(f"p_{tensor}", f"{tensor}.data_ptr()") if tensor in self.made else f"{tensor}.data_ptr()"
        return f"{pointer} + {offset}" if offset else pointer

    def _is_virtual(self, node: Node) -> bool:
        """A view with static strides that kernels of ours alone read: they are given its address, and no tensor is made for it."""
        return is_view(node) and bool(node.users) and value(node).dtype == value(node.args[0]).dtype and all(isinstance(n, int) for x in (node, node.args[0]) for n in (*value(x).shape, *value(x).stride(), value(x).storage_offset())) \
            and all(self._is_virtual(u) or (is_launch(u) and self._is_step(u.target)) for u in node.users)

    def _behind(self, node: Node) -> Node:
        """What a virtual view is a view of."""
        while node in self.virtual:
            node = node.args[0]
        return node

    def _laid_out(self, node: Node) -> str:
        """The name of a tensor with the strides that its fake value has: one from elsewhere is copied if they should differ."""
        behind = self._behind(node)
        if not is_tensor(behind):
            return self._argument(behind)
        if behind in self.targets:
            return self.targets[behind]
        if self.live.bases[behind] & self.run_written or (behind not in self.known_layout and self.live.bases[behind] & self.run_made):
            self._flush()  # it is read as it is behind the launches so far
        name = self.names[behind]
        buffer = Buffer(value(behind))
        sizes, strides = ([self._entry_size(e) for e in row] for row in (buffer.sizes, buffer.strides))
        if behind in self.known_layout or None in sizes + strides or not sizes:
            return name
        laid_out = f"restride({name}, {_tuple(sizes)}, {_tuple(strides)})"
        if self.live.bases[behind] & self.live.written:  # a copy would not see later writes, and writes to it would be lost
            other = self._name(f"{name}_laid_out")
            self.body.append(f"{other} = {name} if {name}.stride() == {_tuple(strides)} else {laid_out}")
            self.targets[behind] = other
            return other
        self.known_layout.add(behind)
        self.body.append(f"if {name}.stride() != {_tuple(strides)}: {name} = {laid_out}")
        return name

    # ---------------------------------------------------------------- runs

    def _line(self, text: str) -> None:
        """A line that must not come before the launches so far."""
        self._flush()
        self.body.append(text)

    def _step(self, entry: str, where: list[tuple[str, int]], integers: str, doubles: str, said: str, made: Collection, alone: str | None = None, status: int | None = None) -> None:
        """A launch that may join those before and behind it in one call; what it needs besides is in the body already. alone: the line where it does not; status: which of ``where`` says that an index is out of range."""
        self.run.append((entry, where, integers, doubles, said, alone, status))
        self.run_made |= made

    def _copy(self, node: Node) -> bool:
        """An index_copy_ or copy_, a cache's update, as a step of a run; False where that is not known to be right, or long."""
        whole = node.target is aten.copy_.default
        into, dim, index, source = (node.args[0], None, *[node.args[1]] * 2) if whole else node.args
        shapes = [value(x) for x in (into, index, source)] if isinstance(source, Node) and is_tensor(source) else []
        if not shapes or len(node.args) > (2 if whole else 4) or node.kwargs or self.driver is None or self.symbols or not all(x.device.type == "cpu" and x.layout is torch.strided and all(isinstance(n, int) for n in (*x.shape, *x.stride(), x.storage_offset())) for x in shapes):
            return False
        into_value, index_value, source_value = shapes
        if (not 0 < into_value.dim() == source_value.dim() <= COPY_DIMS or not whole and (index_value.dim() > 1 or index_value.dtype != torch.int64) or whole and into_value.shape != source_value.shape or into_value.dtype != source_value.dtype or source_value.numel() > COPY_MOST
                or source_value.is_complex() or self.live.bases[into] & (self.live.bases[source] | self.live.bases[index]) or not self.names.get(into, "").isidentifier()
                or any(x in self.virtual or x in self.inline for x in (into, index, source))):
            return False
        dim = -1 if whole else dim % into_value.dim()
        given = [self._laid_out(x) for x in (index, source)]  # first: where that ends the run, what the run had of the target is given back
        own = self.targets.get(into) or self._laid_out(into)
        numbers = [into_value.dim(), dim, into_value.element_size(), into_value.shape[dim], index_value.stride(0) if index_value.dim() and not whole else 0, *source_value.shape, *into_value.stride(), *source_value.stride()]
        integers, doubles = self._once("index_copy_integers", f"integers({', '.join(map(str, numbers))})"), self._once("index_copy_floats", "floats()")
        self._step('"index_copy"', [(own, 0), *((t, 0) for t in given)], integers, doubles, "", frozenset(), f"{own}.copy_({self._argument(source)})" if whole else f"{own}.index_copy_({dim}, {self._argument(index)}, {self._argument(source)})")
        if own not in (self.names[into], *self.returned):
            self.returned.add(own)
            self.after.append(f"if {own} is not {self.names[into]}: {self.names[into]}.copy_({own})")
        self.names[node] = self.names[into]
        if (version := self.names[into]) not in self.versions:
            self.versions.append(version)
        self.targets |= {into: own, node: own}
        self.run_written |= self.live.bases[into]
        self.kept |= {into, node}
        return True

    def _flush(self) -> None:
        """The launches so far into the body: as one call, if there are several."""
        run, self.run, self.run_made, self.run_written, self.targets, self.returned = self.run, [], set(), set(), {}, set()
        if len(run) == 1 and run[0][-1] is None:
            (entry, where, integers, doubles, said, alone, _), = run
            self.body.append(alone or self._called(entry, where, integers, doubles, entry) + said)
        elif run:
            rows, given, kept = [], {}, None
            for entry, where, integers, doubles, said, _, status in run:
                texts = []
                for tensor, offset in where:
                    if tensor in self.made:
                        texts.append(self._pointer((tensor, offset)))
                        continue
                    if "[" in tensor:  # of the values that the graph keeps
                        kept = tensor.split("[")[0]
                    else:
                        given[tensor] = None
                    texts.append(f'"{tensor} + {offset}"' if offset else f'"{tensor}"')
                rows.append(f"    ({entry}, {_tuple(texts)}, {integers}, {doubles}{'' if status is None else f', {status}'}),{said}")
            name = self._name("run")
            self.ahead += [f"{name} = launches({self._object('driver', self.driver)}, ({''.join(f'{t!r}, ' for t in given)}),", *rows, ")"]
            self.made.append(name)
            if self.versions:  # torch counts its own writes
                self.body.append(f"increment_version(({', '.join(self.versions)},))")
            self.body.append(f"{name}({f'{kept}.addresses' if kept else NOTHING}, {self._packer(len(given))}({', '.join(f'{t}.data_ptr()' for t in given)}))")
        self.versions = []
        self.body += self.after
        self.after, dead, self.dead = [], self.dead, []
        self._delete(dead)

    def _delete(self, names: list[str]) -> None:
        """Variables that nobody reads any more: behind the launches so far."""
        if self.run:
            self.dead += names
        elif names:
            self.body.append(f"del {', '.join(names)}")

def is_direct(launch: Launch) -> bool:
    """Is the kernel called with packed pointers and numbers, without a function in between?"""
    return launch.run is None and launch.kernel is not None and launch.kernel.language == "cpp"


def is_checked(launch: Launch) -> bool:
    """Does the kernel say in its last output whether an index was out of range, and hold all sizes?"""
    return launch.kernel is not None and launch.kernel.language == "cpp" and launch.layouts is not None and getattr(launch.run, "recipe", ("",))[0] == "checked"


def _offset(node: Node) -> int:
    return value(node).storage_offset()


def _tuple(texts: list[str]) -> str:
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
