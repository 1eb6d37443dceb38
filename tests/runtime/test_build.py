"""Compiling C++ units: cache behaviour, failures, one OpenMP pool, floating-point semantics."""

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tileweld.compiler.errors import BuildError, CompilerNotFound, OptionError
from tileweld.runtime import build, openmp
from tileweld.runtime.build import CppUnit, compile_cpp

ANSWER = 'extern "C" int answer() {{ return {}; }}'
THREADS = r"""
#include <omp.h>
extern "C" int threads() {
    int count = 0;
    #pragma omp parallel
    {
        #pragma omp atomic
        count += 1;
    }
    return count;
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def commands(monkeypatch):
    """Every compiler command that a build starts."""
    seen = []
    run = build._Running.run
    monkeypatch.setattr(build._Running, "run", lambda self, command, *rest: (seen.append(command), run(self, command, *rest))[1])
    return seen


def test_units_come_back_in_order_and_the_second_time_from_the_cache(commands):
    units = [CppUnit(f"answer{n}", ANSWER.format(n)) for n in (3, 1, 2, 3)]
    assert [library.answer() for library in compile_cpp(units)] == [3, 1, 2, 3]
    assert len(commands) == 2 * 3  # compile and link; the repeated unit is built once
    compile_cpp(units)
    build.build(units)
    assert len(commands) == 2 * 3
    assert compile_cpp([]) == []


SHARED = 'int shared() {{ return {}; }}'
USER = 'int shared(); extern "C" int answer() {{ return {} + shared(); }}'


def test_units_that_share_a_part_have_it_compiled_once(commands):
    units = [CppUnit(f"user{n}", USER.format(n), parts=(SHARED.format(40),)) for n in (1, 2)]
    assert [library.answer() for library in compile_cpp(units)] == [41, 42]
    assert len(commands) == 1 + 2 * 2
    assert compile_cpp([CppUnit("user1", USER.format(1), parts=(SHARED.format(50),))])[0].answer() == 51  # another part is another library
    assert len(commands) == 1 + 2 * 2 + 3
    build.build(units)
    assert len(commands) == 1 + 2 * 2 + 3


def test_an_error_of_a_part_is_told_by_its_unit():
    with pytest.raises(BuildError, match="user does not compile") as raised:
        compile_cpp([CppUnit("user", USER.format(1), parts=("int shared() { return undeclared_thing; }",))])
    assert "undeclared_thing" in raised.value.stderr


def test_units_that_are_built_ahead_are_taken_and_the_rest_is_left(commands, monkeypatch):
    """With two cores one unit at a time is built ahead; the first build takes it, and those that nobody asked for are not begun."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    longest, wanted, spare = CppUnit("longest", ANSWER.format(1) + " " * 9), CppUnit("wanted", ANSWER.format(2)), CppUnit("spare", ANSWER.format(3))
    with build.building_ahead() as begin:
        begin([spare, wanted, longest, longest])
        while not commands:
            time.sleep(0.01)
        assert [library.answer() for library in compile_cpp([wanted, longest])] == [2, 1]
        assert [library.answer() for library in compile_cpp([longest])] == [1]
    assert len(commands) == 2 * 2 and not any("spare" in word for command in commands for word in command)
    assert build._ahead.get() is None


def test_an_error_of_a_unit_that_was_built_ahead_is_told_to_who_asks_for_it(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    broken, right = CppUnit("broken", "int f() { return undeclared_thing; }"), CppUnit("right", ANSWER.format(5))
    with build.building_ahead() as begin:
        begin([broken])
        assert compile_cpp([right])[0].answer() == 5
        with pytest.raises(BuildError, match="undeclared_thing|does not compile"):
            compile_cpp([broken])


def test_what_nobody_took_is_stopped_at_the_end(commands, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    slow = CppUnit("slow", "template <int n> struct S { enum { v = S<n - 1>::v + S<n - 2>::v % 7 }; }; template <> struct S<0> { enum { v = 1 }; }; template <> struct S<1> { enum { v = 1 }; };\n"
                   + "\n".join(f"int f{n}(int x) {{ int s = 0; for (int k = 0; k < x; ++k) s += k * S<{n % 800}>::v; return s; }}" for n in range(20000)))
    with build.building_ahead() as begin:
        begin([slow])
        while not commands:
            time.sleep(0.01)
    start = time.monotonic()
    while any(thread.name.startswith("tileweld-ahead") for thread in threading.enumerate()):
        assert time.monotonic() - start < 20
        time.sleep(0.01)
    assert len(commands) == 1  # it was never linked


def test_one_core_builds_nothing_ahead(commands, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with build.building_ahead() as begin:
        begin([CppUnit("answer", ANSWER.format(1))])
        time.sleep(0.1)
    assert not commands


def test_gold_links_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build._linker(("g++",), str(tmp_path)) == ()
    (tmp_path / "ld.gold").touch(mode=0o755)
    assert build._linker(("c++",), str(tmp_path)) == ("-fuse-ld=gold",)
    assert build._linker(("g++", "-fuse-ld=lld"), str(tmp_path)) == ()


def test_the_key_follows_source_name_and_flags():
    units = [
        CppUnit("answer", ANSWER.format(1)),
        CppUnit("answer", ANSWER.format(2)),
        CppUnit("other", ANSWER.format(1)),
        CppUnit("answer", ANSWER.format(1), extra_flags=("-DX",)),
        CppUnit("answer", ANSWER.format(1), link_torch=True),
    ]
    assert len(set(build.build(units))) == 5


def test_the_key_follows_the_compiler(tmp_path, monkeypatch):
    first = build.build([CppUnit("answer", ANSWER.format(1))])
    other = tmp_path / "another-g++"
    other.symlink_to(build.find_compiler().command[0])
    monkeypatch.setenv("CXX", f"{other} -pipe")
    assert build.find_compiler().command == (str(other), "-pipe")
    assert build.build([CppUnit("answer", ANSWER.format(1))]) != first


@pytest.mark.parametrize("cut", [False, True], ids=["flipped", "truncated"])
def test_a_damaged_library_is_rebuilt_before_it_is_loaded(cut):
    unit = CppUnit("answer", ANSWER.format(7))
    (path,) = build.build([unit])
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] if cut else whole[:5000] + bytes([whole[5000] ^ 0xFF]) + whole[5001:])
    (library,) = compile_cpp([unit])
    assert library.answer() == 7
    assert len(path.read_bytes()) == len(whole)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerNotFound, match=r"neither g\+\+ nor clang\+\+ is on PATH; install g\+\+.*reference"):
        compile_cpp([CppUnit("answer", ANSWER.format(1))])


def test_a_wrong_cxx_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerNotFound, match="'no-such-compiler' is not on PATH .CXX."):
        build.find_compiler()
    monkeypatch.setenv("CXX", sys.executable + " -c 'raise SystemExit(3)'")
    with pytest.raises(CompilerNotFound, match="--version fails"):
        build.find_compiler()


def test_a_compile_error_carries_the_message_and_the_source(folder):
    with pytest.raises(BuildError) as caught:
        compile_cpp([CppUnit("broken", "int f() { return undeclared_thing; }")])
    error = caught.value
    assert str(error).startswith("BuildError: broken does not compile")
    assert "undeclared_thing" in error.stderr and "undeclared_thing" in Path(error.source_path).read_text()
    assert not list(folder.glob("*.so")) and not list(folder.glob(".scratch-*"))


def test_a_missing_symbol_fails_when_it_is_built():
    with pytest.raises(BuildError, match="(?s)does not compile.*nowhere_defined"):
        compile_cpp([CppUnit("unlinked", 'extern "C" void nowhere_defined(); extern "C" void f() { nowhere_defined(); }')])


def test_one_failing_unit_stops_the_others():
    units = [CppUnit("broken", "syntax error")] + [CppUnit(f"answer{n}", ANSWER.format(n)) for n in range(3)]
    with pytest.raises(BuildError, match="broken does not compile"):
        compile_cpp(units)
    assert [library.answer() for library in compile_cpp(units[1:])] == [0, 1, 2]


@pytest.mark.parametrize("flag", sorted(build.FORBIDDEN_FLAGS))
def test_flags_that_drop_nan_are_refused(flag):
    with pytest.raises(OptionError, match="NaN"):
        CppUnit("fast", "", extra_flags=(flag,))


def test_a_name_that_is_a_path_is_refused():
    with pytest.raises(OptionError, match="C identifier"):
        CppUnit("../evil", "")


def test_nan_and_infinity_survive_the_flags():
    source = r"""
    #include <cmath>
    extern "C" float maximum_of(const float* x, int n) {  // a NaN must win, as in torch.amax
        float best = -INFINITY;
        for (int i = 0; i < n; ++i) best = (x[i] > best || x[i] != x[i]) ? x[i] : best;
        return best;
    }
    extern "C" int is_nan(float x) { return std::isnan(x); }
    extern "C" float minus(float a, float b) { return a - b; }
    """
    (library,) = compile_cpp([CppUnit("special", source)])
    for function, arguments in (("minus", [ctypes.c_float] * 2), ("maximum_of", [ctypes.c_void_p, ctypes.c_int])):
        getattr(library, function).restype = ctypes.c_float
        getattr(library, function).argtypes = arguments
    library.is_nan.argtypes = [ctypes.c_float]
    assert math.isnan(library.minus(math.inf, math.inf))
    assert library.is_nan(math.nan) == 1
    masked = torch.full((64,), -math.inf)
    assert library.maximum_of(masked.data_ptr(), 64) == -math.inf


def openmp_files() -> set[str]:
    names = ("libgomp", "libiomp", "libomp.", "libomp-")
    with open("/proc/self/maps") as lines:
        files = {line.split()[-1] for line in lines if "/" in line}
    return {file for file in files if os.path.basename(file).startswith(names)}


def test_kernels_run_in_torchs_own_thread_pool():
    before = torch.get_num_threads()
    (library,) = compile_cpp([CppUnit("threads", THREADS)])
    try:
        torch.set_num_threads(2)
        assert library.threads() == 2
        torch.set_num_threads(1)  # reaches the kernel only if both use one library
        assert library.threads() == 1
    finally:
        torch.set_num_threads(before)
    assert openmp_files() == {str(openmp.library())}


def test_a_torch_wheel_with_a_renamed_libgomp_gets_no_second_one(tmp_path, monkeypatch, commands):
    """Under the name `libgomp-HASH.so.1` its soname does not match the system's: plain -fopenmp would load both."""
    renamed = tmp_path / "libgomp-98b21ff3.so.1"
    # A stand-in with that soname and the two symbols of the kernel: what the kernel asks for is read off, not run.
    stub = tmp_path / "stub.cpp"
    stub.write_text('extern "C" { void GOMP_parallel() {} int omp_get_max_threads() { return 1; } }')
    subprocess.run([*build.find_compiler().command, "-shared", "-fPIC", f"-Wl,-soname,{renamed.name}", str(stub), "-o",
                    str(renamed)], check=True)
    monkeypatch.setattr(openmp, "library", lambda: renamed)
    (path,) = build.build([CppUnit("threads", THREADS)])
    content = path.read_bytes()
    assert b"libgomp-98b21ff3.so.1" in content and str(tmp_path).encode() in content
    assert b"libgomp.so.1" not in content


def test_a_kernel_can_call_libtorchs_sgemm():
    source = r"""
    extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
                           const float*, const int*, const float*, float*, const int*);
    // out[m, n] = a[m, k] @ b[k, n], row-major: column-major BLAS computes out^T = b^T @ a^T.
    extern "C" void matmul(const float* a, const float* b, float* out, int m, int n, int k) {
        const float one = 1, zero = 0;
        sgemm_("N", "N", &n, &m, &k, &one, b, &n, a, &k, &zero, out, &n);
    }
    """
    (library,) = compile_cpp([CppUnit("matmul", source, link_torch=True)])
    a, b, out = torch.randn(5, 7), torch.randn(7, 3), torch.empty(5, 3)
    library.matmul(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, out)), 5, 3, 7)
    torch.testing.assert_close(out, (a.double() @ b.double()).float())


# A compiler that hangs: says its version as g++ does, then sleeps in place of compiling.
HANGING = """#!/bin/sh
case "$*" in *--version*) exec g++ --version;; esac
echo $$ >> "{pids}"
exec sleep 600
"""


@pytest.fixture
def hanging_compiler(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    script = tmp_path / "hanging-g++"
    script.write_text(HANGING.format(pids=pids))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return pids


def wait_for_pid(pids: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if pids.exists() and pids.read_text().endswith("\n"):
            return int(pids.read_text().split()[0])
        time.sleep(0.02)
    raise AssertionError("the compiler was never started")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_compiler_is_an_error_and_leaves_nothing(hanging_compiler, folder):
    killer = threading.Thread(target=lambda: os.kill(wait_for_pid(hanging_compiler), signal.SIGKILL))
    killer.start()
    with pytest.raises(BuildError, match="ended by SIGKILL.*enough memory"):
        compile_cpp([CppUnit("answer", ANSWER.format(1))])
    killer.join()
    assert {file.suffix for file in folder.iterdir()} == {".cpp"}


BUILD_ANSWER = f"""
from tileweld.runtime.build import CppUnit, compile_cpp
print(compile_cpp([CppUnit("answer", {ANSWER.format(5)!r})])[0].answer())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_loadable(how, hanging_compiler, folder, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", BUILD_ANSWER], stderr=subprocess.PIPE, text=True)
    compiler = wait_for_pid(hanging_compiler)
    process.send_signal(how)
    _, message = process.communicate(timeout=60)
    assert process.returncode != 0
    try:
        if how == signal.SIGINT:
            assert "KeyboardInterrupt" in message and not is_running(compiler)
            assert not list(folder.glob(".scratch-*"))
        assert not list(folder.glob("*.so"))
    finally:
        if is_running(compiler):
            os.kill(compiler, signal.SIGKILL)
    monkeypatch.delenv("CXX")
    assert compile_cpp([CppUnit("answer", ANSWER.format(5))])[0].answer() == 5


def test_four_processes_build_the_same_kernel(folder):
    processes = [subprocess.Popen([sys.executable, "-c", BUILD_ANSWER], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=200)[0].strip() for process in processes] == ["5"] * 4
    assert len(list(folder.glob("*.so"))) == 1 and not list(folder.glob(".scratch-*"))
