"""The house rules that a reader relies on: who imports whom, and files short enough to read in a sitting."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compiler", "passes", "codegen", "runtime", "models", "convert")
MAX_LINES = 400

# What each part may import of the package, itself aside. The backend joins the parts, so compiler/ alone is free.
COMMON = ("tileweld.compiler.ir", "tileweld.compiler.errors", "tileweld.compiler.log", "tileweld.__version__")
ALLOWED = {
    "tileweld.compiler.ir": ("tileweld.compiler.errors", "tileweld.compiler.log"),
    "tileweld.compiler.errors": (),
    "tileweld.compiler.log": (),
    "tileweld.passes": COMMON,
    "tileweld.codegen": COMMON,
    "tileweld.runtime": COMMON,
    "tileweld.models": (),
    "tileweld.convert": ("tileweld.compiler.ir", "tileweld.compiler.errors"),
}
MODELS_OUTSIDE = {"torch", *sys.stdlib_module_names}


def module_name(path: Path) -> str:
    parts = ("tileweld", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imported(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of everything `source` imports, at any depth: relative ones made absolute, `from a import b` as a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own = next((package for package in ALLOWED if is_within(module, package)), None)
    if own is None:
        return []
    problems = []
    for line, name in imported(source, module, is_package):
        if is_within(name, "tileweld"):
            # `from ..compiler import ir` and `from ..compiler.ir import scalar` both name something at or below what is allowed.
            if not any(is_within(name, package) for package in (own, *ALLOWED[own])):
                problems.append(f"{module}:{line} imports {name}")
        elif own == "tileweld.models" and name.split(".")[0] not in MODELS_OUTSIDE:
            problems.append(f"{module}:{line} imports {name}; models import torch alone")
    return problems


def package_files() -> list[Path]:
    return [ROOT / "__init__.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def test_the_parts_import_only_what_they_may():
    files = package_files()
    assert len(files) > len(FOLDERS)
    problems = [problem for path in files
                for problem in violations(path.read_text(), module_name(path), path.name == "__init__.py")]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tileweld.passes.attention", "from ..codegen import cpp"),
        ("tileweld.passes.attention", "from .. import runtime"),
        ("tileweld.passes.attention", "import tileweld.compiler.backend"),
        ("tileweld.passes.attention", "from ..compiler.report import Report"),
        ("tileweld.codegen.cpp.attention", "def f():\n    from ...runtime.build import compile_cpp"),
        ("tileweld.codegen.cpp.attention", "from tileweld.passes import PIPELINE"),
        ("tileweld.runtime.launch", "from ..codegen.triton import attention"),
        ("tileweld.compiler.ir.scalar", "from ..capture import capture"),
        ("tileweld.compiler.ir.scalar", "from ...runtime import cache"),
        ("tileweld.compiler.errors", "from . import ir"),
        ("tileweld.models.llama", "import numpy as np"),
        ("tileweld.models.llama", "from ..compiler.ir import scalar"),
        ("tileweld.models.llama", "from transformers import LlamaConfig"),
        ("tileweld.convert.gqa", "from ..passes import PIPELINE"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tileweld.passes.attention", "from ..compiler import ir\nfrom ..compiler.ir.scalar import parse\nfrom . import rms_norm"),
        ("tileweld.codegen.cpp.attention", "from ...compiler.errors import BuildError\nfrom ..region import partition\nimport sympy"),
        ("tileweld.runtime.cache", "from .. import __version__\nfrom ..compiler import log"),
        ("tileweld.compiler.backend", "from .. import codegen, passes, runtime"),
        ("tileweld.models.llama", "import math\nfrom dataclasses import dataclass\nimport torch.nn.functional as F\nfrom .rope import rotate"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, module) == []


def test_relative_imports_of_a_package_resolve_from_itself():
    assert imported("from .scalar import parse", "tileweld.compiler.ir", True) == [(1, "tileweld.compiler.ir.scalar.parse")]
    assert imported("from .. import report", "tileweld.compiler.ir", True) == [(1, "tileweld.compiler.report")]


def test_every_package_is_listed_for_installation():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module_name(path) for path in package_files() if path.name == "__init__.py"}
    assert set(listed) == found
    # A folder of modules without an __init__.py imports from a checkout (as a namespace) and is missing from a wheel.
    bare = {str(path.parent.relative_to(ROOT)) for path in package_files() if not (path.parent / "__init__.py").exists()}
    assert not bare


def test_no_file_is_longer_than_one_sitting():
    suffixes = {".py", ".cpp", ".h", ".hpp"}
    files = package_files() + [path for folder in (*FOLDERS, "tests", "benchmarks", "examples")
                               for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert lengths["tests/test_layout.py"] > 100
    assert not {path: count for path, count in lengths.items() if count > MAX_LINES}


def test_importing_tileweld_imports_no_torch():
    """The CLI's --help and pip's entry-point scan import the package; torch alone takes seconds."""
    code = "import sys, tileweld; assert 'explain' in dir(tileweld); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
