"""Generated Python becomes a module whose text can be read back."""

import inspect
import os
import stat
import sys
from pathlib import Path

import pytest

from tileweld.compiler.errors import BuildError, OptionError
from tileweld.runtime.source_module import load_python_source

SOURCE = '"""Doubles."""\n\n\ndef double(x):\n    return 2 * x  # × two\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_the_function_runs_and_shows_its_source():
    module = load_python_source("double", SOURCE)
    assert module.double(4) == 8
    assert inspect.getsource(module.double) == "def double(x):\n    return 2 * x  # × two\n"
    assert module.__doc__ == "Doubles." and module.double.__module__ == module.__name__
    assert stat.S_IMODE(os.stat(module.__file__).st_mode) == 0o600


def test_the_same_text_is_the_same_module_and_another_is_another():
    first = load_python_source("double", SOURCE)
    assert load_python_source("double", SOURCE) is first
    assert load_python_source("double", SOURCE.replace("2 *", "3 *")).double(4) == 12
    assert load_python_source("other", SOURCE) is not first


def test_a_tampered_file_is_not_run():
    module = load_python_source("double", SOURCE)
    path = Path(module.__file__)
    path.write_text("raise SystemExit('altered')\n")
    del sys.modules[module.__name__]
    assert load_python_source("double", SOURCE).double(4) == 8
    assert path.read_text() == SOURCE


def test_no_bytecode_is_left_that_carries_no_hash(folder):
    load_python_source("double", SOURCE)
    assert {file.suffix for file in folder.iterdir()} == {".py", ".json"}


def test_a_source_that_does_not_import_names_its_file():
    for source, message in (("def f(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError")):
        with pytest.raises(BuildError, match=message) as caught:
            load_python_source("does_not_import", source)
        assert Path(caught.value.source_path).read_text() == source
    assert not any(name.startswith("tileweld_generated.does_not_import") for name in sys.modules)


def test_a_name_that_is_a_path_is_refused():
    with pytest.raises(OptionError, match="Python identifier"):
        load_python_source("../evil", SOURCE)


def test_a_triton_kernel_in_it_can_be_parsed():
    pytest.importorskip("triton", reason="triton exists for Linux only")
    source = ('import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef double(x_ptr, BLOCK: tl.constexpr):\n'
              '    offsets = tl.arange(0, BLOCK)\n    tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets))\n')
    kernel = load_python_source("triton_double", source).double
    function = kernel if hasattr(kernel, "src") else kernel.fn  # under TRITON_INTERPRET=1 the decorator makes another object
    assert "tl.store" in inspect.getsource(getattr(function, "fn", function))
