"""Compile Triton kernels ahead of time, without a GPU: registers, spills, shared memory and matrix instructions per architecture.

triton.compile needs only a target; ptxas, cuobjdump and LLVM for AMD come in Triton's wheel.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from types import ModuleType

from ..compiler.errors import BuildError, OptionError

#: architecture -> (backend, Triton's name of it, threads of a warp, bytes of shared memory that one block may have)
ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}
#: the widest instruction found in the assembly names the way matrices are multiplied
_MATMUL = (("wgmma.mma_async", "wgmma"), ("tcgen05.mma", "tcgen05"), ("mma.sync", "mma"), ("v_mfma", "mfma"))


@dataclasses.dataclass(frozen=True)
class AotResult:
    """One kernel compiled for one architecture."""

    arch: str
    registers: int  # per thread
    spills: int  # bytes of local memory per thread on cuda, spilled vector registers on hip
    shared_bytes: int  # per block
    matmul: str  # "wgmma", "tcgen05", "mma", "mfma" or "" for plain arithmetic
    binary_bytes: int
    assembly: str = dataclasses.field(repr=False)  # PTX or AMD's GCN assembly

    @property
    def fits(self) -> bool:
        """Does a block fit into the architecture's shared memory?"""
        return self.shared_bytes <= ARCHITECTURES[self.arch][3]


def backend_of(arch: str) -> str:
    """"cuda" or "hip". Raises OptionError for an unknown architecture."""
    if arch not in ARCHITECTURES:
        raise OptionError.unknown("architecture", arch, ARCHITECTURES)
    return ARCHITECTURES[arch][0]


def family_of(arch: str) -> str:
    """The key of an architecture's tile configurations: "ampere", "cuda" (Hopper and later) or "hip"; see tune.backend_of."""
    return "ampere" if backend_of(arch) == "cuda" and ARCHITECTURES[arch][1] < 90 else backend_of(arch)


def compile_ahead(module: ModuleType, kernel: str, signature: dict[str, str], constants: dict[str, object], arch: str, *, divisible_by_16=(), num_warps: int = 4,
                  num_stages: int = 3) -> AotResult:
    """The kernel `kernel` of a generated module for `arch`.

    signature: parameter -> Triton's type ("*fp16", "i32", "constexpr"), in the order of the parameters; constants: values of the
    constexprs; divisible_by_16: parameters that are multiples of 16, without which vector loads vanish.
    Raises BuildError with Triton's message if the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = backend_of(arch)
    _, name, warp, _ = ARCHITECTURES[arch]
    function = getattr(module, kernel)
    attributes = {(function.arg_names.index(p),): [["tt.divisibility", 16]] for p in divisible_by_16}
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=GPUTarget(backend, name, warp), options=options)
    except Exception as error:
        raise BuildError(f"{kernel} does not compile for {arch}: {type(error).__name__}", stderr=str(error), source_path=module.__file__) from error
    assembly = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    binary = compiled.asm["cubin" if backend == "cuda" else "hsaco"]
    registers, spills = _cubin_usage(binary) if backend == "cuda" else _gcn_usage(assembly)
    matmul = next((word for instruction, word in _MATMUL if instruction in assembly), "")
    return AotResult(arch, registers, spills, compiled.metadata.shared, matmul, len(binary), assembly)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the only kernel in a cubin. Triton's kernels have no arrays: their stack is spills."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    if not found:
        raise BuildError("cuobjdump -res-usage says nothing of registers", stderr=report.stdout + report.stderr)
    return int(found[1]), int(found[2])


def _gcn_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled vector registers) from the metadata at the end of the assembly."""
    counts = dict(re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly, re.M))
    return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
