"""C++ source to loaded libraries: units that are not in the cache are compiled in parallel.

    gemv, softmax = compile_cpp([CppUnit("gemv", gemv_source), CppUnit("softmax", softmax_source)])
    gemv.run(ctypes.c_void_p(x.data_ptr()), ...)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..compiler import log
from ..compiler.errors import BuildError, CompilerNotFound, OptionError
from ..compiler.ir.kernel import Kernel
from . import cache, openmp
from .launch import load_library

_log = log.get("runtime")

# -fno-math-errno and -fno-trapping-math let loops with sqrt, min and compares vectorise and change no result.
# -ffast-math would: it lets the compiler assume that no NaN and no infinity occurs, and a masked score is -inf.
COMPILE_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
                 "-ffp-contract=fast")
LINK_FLAGS = ("-shared", "-pthread", "-Wl,--no-undefined")  # a missing symbol fails here, not in the middle of a model
FORBIDDEN_FLAGS = frozenset({"-ffast-math", "-Ofast", "-ffinite-math-only", "-funsafe-math-optimizations",
                             "-fassociative-math", "-ffp-model=fast"})
_TIMEOUT = 600  # seconds; a generated kernel takes about one


@dataclass(frozen=True)
class CppUnit:
    """One C++ source file that becomes one shared library.

    name: a C identifier, for file names and messages.
    link_torch: link libtorch_cpu and libc10 (`at::native::cpublas::brgemm`, `sgemm_`).
    extra_flags: for the compiler, after the standard ones.
    parts: sources of translation units that it is linked with; units that share one have it compiled once.
    """

    name: str
    source: str
    link_torch: bool = False
    extra_flags: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, kernel: Kernel, extra_flags: tuple[str, ...] = ()) -> CppUnit:
        return cls(kernel.name, kernel.source, kernel.link_torch, extra_flags, kernel.parts)

    def __post_init__(self):
        object.__setattr__(self, "extra_flags", tuple(self.extra_flags))
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.name):
            raise OptionError(f"{self.name!r} is no name for a C++ unit", cure="use a C identifier")
        forbidden = FORBIDDEN_FLAGS.intersection(self.extra_flags)
        if forbidden:
            raise OptionError(f"{', '.join(sorted(forbidden))} would let the compiler drop NaN and -inf", where=self.name,
                              cure="leave it out")


def compile_cpp(sources: Sequence[CppUnit]) -> list[ctypes.CDLL]:
    """Build what the cache lacks, in parallel, and load every unit; in the order given.

    Raises CompilerNotFound, BuildError (the source does not compile, link or load), CacheError (the disk is full).
    """
    units = list(sources)
    paths = build(units)
    return [_load(path, unit) for path, unit in zip(paths, units)]


def build(units: Sequence[CppUnit]) -> list[Path]:
    """The shared library of each unit, from the cache or compiled now; nothing is loaded. Errors as compile_cpp."""
    compiler = find_compiler()
    distinct = list(dict.fromkeys(units))
    if not distinct:
        return []
    running, begun = _Running(), _ahead.get()
    futures = begun.taken(distinct) if begun is not None else {}
    workers = min(len(distinct), len(os.sched_getaffinity(0)))
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="tileweld-build") as pool:
        futures |= _begun(pool, [unit for unit in distinct if unit not in futures], compiler, running)
        try:
            for future in futures.values():
                future.result()
        except BaseException:
            # Ctrl-C, or one unit failed: leaving the `with` waits for the rest, so end it now.
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise
    return [futures[unit].result() for unit in units]


def _begun(pool: concurrent.futures.Executor, units: list[CppUnit], compiler: Compiler, running: _Running) -> dict[CppUnit, concurrent.futures.Future]:
    """The longest source first: one that takes twice the others' time would else be waited for alone. Before the first of those that share a part, the part."""
    futures, parts = {}, set()
    for unit in sorted(units, key=lambda u: -len(u.source)):
        for part in unit.parts:
            if part not in parts:
                pool.submit(_build_part, part, unit, compiler, running)  # an error is told by the units, which ask for it again
                parts.add(part)
        futures[unit] = pool.submit(_build_one, unit, compiler, running)
    return futures


@contextlib.contextmanager
def building_ahead() -> Iterator[Callable[[Iterable[CppUnit]], None]]:
    """Yields a function: units that are given to it will probably be asked for, and are compiled by the cores that Python leaves idle.

    The first build inside takes what is done or under way; nothing else is begun after that, and what nobody took is stopped at the end.
    An error is told to the build that asks for its unit, and else to nobody. Raises CompilerNotFound.
    """
    workers, compiler = len(os.sched_getaffinity(0)) - 1, find_compiler()
    if workers < 1:
        yield lambda units: None
        return
    ahead = _Ahead(compiler, workers)
    token = _ahead.set(ahead)
    try:
        yield ahead.begin
    finally:
        _ahead.reset(token)
        ahead.end()


class _Ahead:
    def __init__(self, compiler: Compiler, workers: int):
        self._compiler, self._running = compiler, _Running()
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="tileweld-ahead")
        self._futures: dict[CppUnit, concurrent.futures.Future] = {}

    def begin(self, units: Iterable[CppUnit]) -> None:
        self._futures |= _begun(self._pool, [unit for unit in dict.fromkeys(units) if unit not in self._futures], self._compiler, self._running)

    def taken(self, units: list[CppUnit]) -> dict[CppUnit, concurrent.futures.Future]:
        self._futures = {unit: future for unit, future in self._futures.items() if not future.cancel()}
        return {unit: self._futures[unit] for unit in units if unit in self._futures}

    def end(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._running.stop()


_ahead: contextvars.ContextVar[_Ahead | None] = contextvars.ContextVar("tileweld_ahead", default=None)


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C++, as an argument list, and what its --version prints (part of every key)."""

    command: tuple[str, ...]
    version: str

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version


def find_compiler() -> Compiler:
    """$CXX where it is set (it may carry arguments: "ccache g++"), else g++, else clang++. Raises CompilerNotFound."""
    chosen = os.environ.get("CXX", "").strip()
    return _find_compiler(chosen, os.environ.get("PATH", os.defpath))


@functools.lru_cache(maxsize=8)
def _find_compiler(chosen: str, path: str) -> Compiler:
    for words in [shlex.split(chosen)] if chosen else [["g++"], ["clang++"]]:
        program = shutil.which(words[0], path=path)
        if program is None:
            continue
        command = (program, *words[1:])
        try:
            answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerNotFound(f"{shlex.join(command)} --version fails: {error}", where="CXX" if chosen else None,
                                   cure="install a working g++ or set CXX") from error
        return Compiler(command, answer.stdout)
    if chosen:
        raise CompilerNotFound(f"{chosen!r} is not on PATH", where="CXX", cure="correct or unset CXX")
    raise CompilerNotFound("neither g++ nor clang++ is on PATH",
                           cure='install g++, set CXX, or pass options={"target": "reference"}')


@functools.lru_cache(maxsize=8)
def _linker(command: tuple[str, ...], path: str) -> tuple[str, ...]:
    """gold where it is installed: GNU ld takes 55 ms for a kernel, most of them for libstdc++'s symbols, gold 20."""
    chosen = any(word.startswith(("-fuse-ld", "-B", "--ld-path")) for word in command)
    return ("-fuse-ld=gold",) if not chosen and shutil.which("ld.gold", path=path) else ()


def _build_one(unit: CppUnit, compiler: Compiler, running: _Running) -> Path:
    compile_flags = _compile_flags(unit)
    link_flags = [*LINK_FLAGS, *_linker(compiler.command, os.environ.get("PATH", os.defpath)), *_libraries(unit, compiler)]
    key = cache.entry_key("cpp", unit.source, name=unit.name, compiler=compiler.command, version=compiler.version,
                          compile_flags=compile_flags, link_flags=link_flags, parts=unit.parts)

    def produce(scratch: Path) -> Path:
        compiled, linked = _compiled(unit, unit.source, key, scratch, compile_flags, compiler, running), scratch / f"{unit.name}.so"
        parts = [_build_part(part, unit, compiler, running) for part in unit.parts]
        # Linked apart, without -fopenmp: that flag would add the compiler's own libgomp to the libraries.
        running.run([*compiler.command, *map(str, [compiled, *parts]), "-o", str(linked), *link_flags], unit, scratch.parent / f"{key}.cpp")
        return linked

    return cache.fetch(key, ".so", produce, name=unit.name, compiler=list(compiler.command),
                       compile_flags=compile_flags, link_flags=link_flags)


def _build_part(part: str, unit: CppUnit, compiler: Compiler, running: _Running) -> Path:
    """The object file of a part. Two units that want it at once: one compiles, the other waits for the cache's lock."""
    flags = _compile_flags(unit)
    key = cache.entry_key("cpp part", part, compiler=compiler.command, version=compiler.version, compile_flags=flags)
    return cache.fetch(key, ".o", lambda scratch: _compiled(unit, part, key, scratch, flags, compiler, running), name=f"{unit.name}, part", compiler=list(compiler.command), compile_flags=flags)


def _compile_flags(unit: CppUnit) -> list[str]:
    abi = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"] if unit.link_torch else []
    return [*COMPILE_FLAGS, *unit.extra_flags, *abi]


def _compiled(unit: CppUnit, text: str, key: str, scratch: Path, flags: list[str], compiler: Compiler, running: _Running) -> Path:
    # The source stays in the cache beside the library: error messages and debuggers point at it.
    source, compiled = scratch.parent / f"{key}.cpp", scratch / f"{unit.name}.o"
    cache.put_text(source, text)
    running.run([*compiler.command, *flags, "-c", str(source), "-o", str(compiled)], unit, source)
    return compiled


def _libraries(unit: CppUnit, compiler: Compiler) -> list[str]:
    flags = []
    loaded = openmp.library()
    # clang calls libomp's entry points (__kmpc_*), which libgomp lacks: there a second pool cannot be helped. libiomp5 has both.
    if loaded is None or (compiler.is_clang and "gomp" in loaded.name):
        flags.append("-fopenmp")
        if loaded is not None:
            _log.warning("%s: clang++ needs libomp while torch runs on %s: two thread pools; set CXX=g++", unit.name, loaded)
    else:
        flags += [str(loaded), f"-Wl,-rpath,{loaded.parent}"]
    if unit.link_torch:
        flags += [f"-L{openmp.TORCH_LIB}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{openmp.TORCH_LIB}"]
    return flags


class _Running:
    """The compilers that one build has started, so that they can be ended together."""

    def __init__(self):
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: list[str], unit: CppUnit, source: Path) -> None:
        """Run one compiler to its end; BuildError with its messages if it fails."""
        _log.debug("%s", shlex.join(command))
        with self._lock:
            if self._stopped:
                raise BuildError(f"the build of {unit.name} was stopped", source_path=str(source))
            # A group of its own: g++ is a driver, and ending it alone leaves cc1plus running. LC_ALL=C: messages in English.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       text=True, errors="replace", start_new_session=True,
                                       env={**os.environ, "LC_ALL": "C"})
            self._processes.add(process)
        try:
            output, _ = process.communicate(timeout=_TIMEOUT)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"compiling {unit.name} took over {_TIMEOUT} s", source_path=str(source)) from None
            raise
        finally:
            with self._lock:
                self._processes.discard(process)
        if process.returncode < 0:
            raise BuildError(f"the compiler of {unit.name} was ended by {signal.Signals(-process.returncode).name}",
                             stderr=output, source_path=str(source), cure="is there enough memory?")
        if process.returncode:
            # The driver reports a killed cc1plus by its own exit status and a line of text.
            cure = "is there enough memory?" if "Killed signal" in output else None
            raise BuildError(f"{unit.name} does not compile", stderr=output, source_path=str(source), cure=cure)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                _end(process)


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:  # a reaped process's number may belong to somebody else by now
            os.killpg(process.pid, signal.SIGKILL)


def _load(path: Path, unit: CppUnit) -> ctypes.CDLL:
    try:
        return load_library(path)
    except OSError as error:
        raise BuildError(f"{unit.name} was built but does not load: {error}", source_path=str(path.with_suffix(".cpp")),
                         cure="if its file system is mounted noexec, set TILEWELD_CACHE_DIR to another folder") from error
