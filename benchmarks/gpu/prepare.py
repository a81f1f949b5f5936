"""Make the folder that the three steps bring to a machine with a GPU. Needs none itself.

    python -m benchmarks.gpu.prepare [FOLDER] [--python 3.12] [--compute-capability 9.0]
                                     [--wheel FILE]

Kernels are compiled by the Triton language that is installed here; wheels come from the package
registry; graphs are exported and their weights left out. Prints every file's size, and fails where
a step would bring more than it may.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu import check_kernels, graphs, run_onnxruntime, time_kernels, time_models
from benchmarks.gpu.parts import DEFAULT_PREPARED
from benchmarks.gpu.prepared import (
    COMPUTE_CAPABILITIES,
    KERNELS_LIMIT_BYTES,
    LIMIT_BYTES,
    OLDEST_CAPABILITY,
    STEPS,
    Prepared,
    PreparedInfo,
)
from scripts import thin_onnxruntime_gpu
from tome_export.plugins.aot import compile_ptx, compiler
from tome_export.plugins.store import Kernel, KernelStore, parse_capability

PACKAGES: dict[int, tuple[str, ...]] = {
    1: ("timm", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    2: ("onnx", "ml-dtypes"),
    3: (
        "pytest",
        "pluggy",
        "iniconfig",
        "pygments",
        "hypothesis",
        "sortedcontainers",
        "click",
        "rich",
        "markdown-it-py",
        "mdurl",
    ),
}
"""What a machine with torch, torchvision, the Triton language, Transformers and ONNX Runtime may
lack, by the step that first needs it. Versions are those that are installed here."""
_PLATFORMS = ("2_28", "2_27", "2_26", "2_24", "2_17")


class PreparingError(RuntimeError):
    """The folder cannot be made, or is too large."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_PREPARED)
    parser.add_argument("--python", default="3.12", help="version on the other machine")
    parser.add_argument("--compute-capability", default="9.0", help="of the other machine's GPU")
    parser.add_argument("--wheel", type=Path, help="of onnxruntime-gpu; downloaded if not given")
    options = parser.parse_args(arguments)
    problem = unknown_machine(options.python, options.compute_capability)
    if problem is not None:
        print(f"nothing was prepared: {problem}", file=sys.stderr)
        return 2
    try:
        prepare(Prepared(options.folder), options.python, options.compute_capability, options.wheel)
    except (PreparingError, thin_onnxruntime_gpu.ThinningError) as error:
        print(f"the folder is not ready: {error}", file=sys.stderr)
        return 1
    return 0


def unknown_machine(python: str, capability: str) -> str | None:
    """Why nothing can be prepared for a machine, or None: ONNX Runtime's wheels decide."""
    whose = f"{thin_onnxruntime_gpu.NAME} {thin_onnxruntime_gpu.VERSION}"
    pythons, capabilities = thin_onnxruntime_gpu.PYTHONS, COMPUTE_CAPABILITIES
    if python not in pythons:
        return f"Python is {python!r}; expected one that {whose} is for: {', '.join(pythons)}"
    if capability not in capabilities:
        return (
            f"compute capability is {capability!r}; expected one that {whose} has code for: "
            f"{', '.join(capabilities)}"
        )
    return None


def prepare(prepared: Prepared, python: str, capability: str, wheel: Path | None) -> None:
    """Make the folder anew.

    Raises:
        PreparingError: if pip cannot get a wheel, or a step would bring too much.
    """
    shutil.rmtree(prepared.folder, ignore_errors=True)
    prepared.folder.mkdir(parents=True)
    print("kernels, wheels", file=sys.stderr)
    write_kernels(prepared, capability)
    for step in STEPS:
        get_wheels(prepared.wheels(step), PACKAGES[step], python)
    print("ONNX Runtime", file=sys.stderr)
    write_onnxruntime(prepared, python, capability, wheel)
    print("graphs", file=sys.stderr)
    graphs.write_graphs(prepared.graphs, run_onnxruntime.MODEL, run_onnxruntime.CASES)
    commit = harness.environment()["commit"]
    prepared.write(PreparedInfo(python, commit, compiler(), capability))
    report(prepared)


def write_kernels(prepared: Prepared, capability: str) -> None:
    """Compile every kernel that a part of a step starts, for a GPU and as later ones fall back."""
    needed = [*check_kernels.variants(), *time_kernels.variants(), *time_models.variants()]
    capabilities = [
        parse_capability(text) for text in dict.fromkeys((capability, OLDEST_CAPABILITY))
    ]
    store = KernelStore(
        Kernel.of(variant, tuple(compile_ptx(variant, one) for one in capabilities))
        for variant in {variant.name: variant for variant in needed}.values()
    )
    prepared.kernels.parent.mkdir(parents=True, exist_ok=True)
    store.write(prepared.kernels, compiler())


def get_wheels(folder: Path, packages: tuple[str, ...], python: str) -> None:
    """Download the wheels of packages, of the versions that are installed here.

    Raises:
        PreparingError: if pip cannot.
    """
    from importlib import metadata

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", "--dest", str(folder)]
    for glibc in _PLATFORMS:
        command += ["--platform", f"manylinux_{glibc}_x86_64"]
    command += [f"{package}=={metadata.version(package)}" for package in packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise PreparingError(f"pip cannot download wheels for Python {python}: {last}")


def write_onnxruntime(prepared: Prepared, python: str, capability: str, wheel: Path | None) -> None:
    """Make the halves of the thinned ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or thin_onnxruntime_gpu.get_wheel(python, Path(folder))
        thin_onnxruntime_gpu.check_wheel(wheel)
        architecture = int(capability.replace(".", ""))
        halves = thin_onnxruntime_gpu.write_parts(wheel, architecture, Path(folder), 2)
        for index, half in enumerate(halves):
            target = prepared.part(index)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(half, target)


def report(prepared: Prepared) -> None:
    """Print the sizes.

    Raises:
        PreparingError: if a step would bring more than it may, or the kernels are too large.
    """
    too_large = []
    for step in STEPS:
        sizes = prepared.sizes(step)
        for path, size in sizes.items():
            print(f"{size / 2**20:8.2f} MiB  {path}")
        total = sum(sizes.values())
        print(f"{total / 2**20:8.2f} MiB  step {step} in all; at most {LIMIT_BYTES >> 20}")
        if total > LIMIT_BYTES:
            too_large.append(f"step {step} would bring {total / 2**20:.1f} MiB")
    files = [path for path in prepared.folder.rglob("*") if path.is_file()]
    whole = sum(path.stat().st_size for path in files)
    print(f"{whole / 2**20:8.2f} MiB  {prepared.folder} in all")
    kernels = sum(path.stat().st_size for path in prepared.kernels.iterdir())
    if kernels > KERNELS_LIMIT_BYTES:
        too_large.append(f"the kernels have {kernels / 2**20:.1f} MiB")
    if too_large:
        raise PreparingError(
            f"{'; '.join(too_large)}; expected at most {LIMIT_BYTES >> 20} MiB per step and "
            f"{KERNELS_LIMIT_BYTES >> 20} MiB of kernels"
        )


if __name__ == "__main__":
    sys.exit(main())
