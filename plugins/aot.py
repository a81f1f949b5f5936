"""Kernels compiled to PTX ahead of time, for any GPU, on a machine that need not have one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tome_export.errors import ExportError, MissingComponentError, UsageError
from tome_export.merge import spec
from tome_export.plugins.store import Binary
from tome_export.plugins.variants import MAX_SHARED_BYTES, Variant

if TYPE_CHECKING:
    from types import ModuleType

MINIMUM = (3, 6)
"""Earlier versions of the Triton language lack some of the GPUs, or end the process at them."""

MAX_PTX_BYTES = 150_000
"""A kernel's PTX is stored in the engine once per layer."""

PTX_VERSIONS = {
    (7, 5): 80,
    (8, 0): 80,
    (8, 6): 80,
    (8, 7): 80,
    (8, 9): 80,
    (9, 0): 80,
    (10, 0): 87,
    (10, 3): 88,
    (12, 0): 87,
    (12, 1): 88,
}
"""Compute capability -> PTX version written, the oldest that serves: older drivers take it too.

PTX 8.0 is CUDA 12.0, 8.7 is CUDA 12.8 and 8.8 is CUDA 12.9 (PTX ISA, release notes). The compiler
ends the process at a GPU it does not know, so others than these are refused.
"""

# Trailing pointers that the compiler gives every kernel for scratch memory.
_SCRATCH_PARAMETERS = 2


def compile_ptx(variant: Variant, capability: tuple[int, int]) -> Binary:
    """Compile one kernel for one compute capability.

    Raises:
        UsageError: if no kernels can be compiled for such a GPU.
        MissingComponentError: if the Triton language is not installed.
        ExportError: if it cannot compile the kernel, or the result is not one that TensorRT can
            start: it uses scratch memory, too much shared memory, or is too large.
    """
    if capability not in PTX_VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in PTX_VERSIONS)
        raise UsageError(
            f"compute capability is {capability[0]}.{capability[1]}; the plugin's kernels can be "
            f"compiled for {known}"
        )
    triton = require_compiler()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    major, minor = capability
    kernel, contract = _kernel(variant.op)
    signature = {
        **contract.signature(variant.dtype),
        **dict.fromkeys(variant.constants, "constexpr"),
    }
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {(position[name],): value for name, value in variant.constants.items()},
        {(position[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": 1,
        "ptx_version": PTX_VERSIONS[capability],
        "enable_fp_fusion": True,
        "maxnreg": variant.max_registers,
    }
    target = GPUTarget("cuda", 10 * major + minor, 32)
    try:
        with triton.knobs.compilation.scope():
            # Line information names files of this machine, and is larger than the code.
            triton.knobs.compilation.disable_line_info = True
            compiled = triton.compile(source, target=target, options=options)
    except OSError as error:
        raise ExportError(
            f"the Triton language cannot write its cache ({error}): set TRITON_CACHE_DIR to a "
            "folder that can be written"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the Triton language {triton.__version__} cannot compile {variant.op} for compute "
            f"capability {major}.{minor}: {reason}; use --merge-op matmul"
        ) from error
    metadata = compiled.metadata
    problem = _problem(metadata, compiled.asm["ptx"])
    if problem:
        raise ExportError(
            f"{variant.name} for compute capability {major}.{minor} {problem}; leave this GPU out, "
            "or use --merge-op matmul"
        )
    arguments = len(signature) - len(variant.constants)
    ptx = without_scratch_parameters(compiled.asm["ptx"], metadata.name, arguments)
    gpu = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if gpu is None:
        raise ExportError("the compiled kernel names no .target; expected PTX")
    return Binary(
        compute_capability=f"{major}.{minor}",
        target=gpu[1],
        entry=metadata.name,
        threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
        ptx=ptx,
    )


def compiler() -> str:
    """Name and version of what compiles the kernels."""
    return f"triton {require_compiler().__version__}"


def require_compiler() -> ModuleType:
    """The Triton language, to be asked for before any work is done for it."""
    wanted = ".".join(map(str, MINIMUM))
    try:
        import triton
    except ImportError as error:
        raise MissingComponentError(
            "the Triton language compiles the plugin's kernels and is not installed: "
            f"pip install 'triton>={wanted}', or use --merge-op matmul"
        ) from error
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MINIMUM:
        raise MissingComponentError(
            f"the Triton language {triton.__version__} is installed; the plugin's kernels need "
            f"{wanted} or later: pip install 'triton>={wanted}', or use --merge-op matmul"
        )
    if triton.knobs.runtime.interpret:
        raise MissingComponentError(
            "kernels cannot be compiled while TRITON_INTERPRET is set: unset it"
        )
    module: ModuleType = triton
    return module


def _kernel(op: str) -> tuple[Any, ModuleType]:
    from tome_export.plugins.match import contract as match_contract
    from tome_export.plugins.match.kernel import match_kernel
    from tome_export.plugins.merge import contract as merge_contract
    from tome_export.plugins.merge.kernel import merge_kernel

    known = {spec.MATCH: (match_kernel, match_contract), spec.MERGE: (merge_kernel, merge_contract)}
    return known[op]


def _problem(metadata: Any, ptx: str) -> str | None:
    """Why TensorRT could not start such a kernel, or None."""
    if metadata.shared > MAX_SHARED_BYTES:
        return (
            f"needs {metadata.shared} bytes of shared memory; expected at most {MAX_SHARED_BYTES}"
        )
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return "needs scratch memory; expected none"
    if len(ptx) > MAX_PTX_BYTES:
        return f"has {len(ptx)} bytes of PTX; expected at most {MAX_PTX_BYTES}"
    return None


def without_scratch_parameters(ptx: str, entry: str, arguments: int) -> str:
    """Remove the scratch pointers that the compiler appends and the kernel does not use.

    TensorRT passes inputs, scalars and outputs, the ``arguments`` of the kernel's source; one with
    more parameters would be started with whatever lies behind them.
    """
    found = re.search(rf"\.entry {re.escape(entry)}\((.*?)\n\)", ptx, re.DOTALL)
    names = re.findall(rf"\b{re.escape(entry)}_param_\d+\b", found[1]) if found else []
    expected = [f"{entry}_param_{index}" for index in range(arguments + _SCRATCH_PARAMETERS)]
    extra = expected[arguments:]
    used = [name for name in extra if len(re.findall(rf"\b{name}\b", ptx)) > 1]
    if found is None or names != expected or used:
        use = ", used by the kernel" if used else ""
        raise ExportError(
            f"kernel {entry} has {len(names)} parameters{use}; expected {arguments} and "
            f"{_SCRATCH_PARAMETERS} unused ones: this version of the Triton language is not "
            "supported, use --merge-op matmul"
        )
    lines = [line for line in found[1].splitlines() if not any(name in line for name in extra)]
    kept = "\n".join(lines).rstrip().removesuffix(",")
    return ptx[: found.start(1)] + kept + ptx[found.end(1) :]
