"""Other programs that say something on a GPU: the marked tests, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu import ROOT, run_onnxruntime
from benchmarks.gpu.parts import Context
from benchmarks.gpu.prepared import Prepared
from benchmarks.gpu.rows import attempt, emit
from scripts.thin_onnxruntime_gpu import PROVIDER

_MARK = re.compile(r"^\s*@?pytest\.mark\.gpu\b", re.MULTILINE)
_SUMMARY = re.compile(r"^=*\s*(\d+ [a-z]+(?:, \d+ [a-z]+)*) in [\d.]+s", re.MULTILINE)
_OUTCOME = re.compile(r"(\d+) (passed|failed|skipped|error)")
_TAIL = 2000
_WRONG_ACCESS = 99


def marked_tests(context: Context) -> None:
    """Emit what the tests that need a GPU say."""
    attempt("pytest -m gpu", {}, run_marked_tests, context)


def run_marked_tests(context: Context, folder: Path = ROOT / "tests") -> dict[str, Any]:
    """Run those in a folder; only their files are read, so that others need not be importable.

    Returns:
        As ``finished``, with pytest's own counts as ``tests``; where all were skipped, nothing
        passed.
    """
    files = marked_files(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider"]
    # The package makes the checkout importable; another version of torch may warn of other things.
    command += ["-p", "benchmarks.gpu", "-o", "filterwarnings=default", *map(str, files)]
    found = finished(command, context.seconds - 5, **with_onnxruntime(context.prepared))
    return found | judged_tests(found)


def judged_tests(found: dict[str, Any]) -> dict[str, Any]:
    """Counts of what pytest said last, and whether tests passed and none did not."""
    (last,) = _SUMMARY.findall(found["said"])[-1:] or [""]
    counts = {name: int(number) for number, name in _OUTCOME.findall(last)}
    return {"tests": counts, "passed": found["passed"] and counts.get("passed", 0) > 0}


def with_onnxruntime(prepared: Prepared) -> dict[str, str]:
    """Variables with which Python finds the carried ONNX Runtime and that its CUDA libraries.

    None where step 2 has not unpacked it.
    """
    tree = prepared.onnxruntime
    if not tree.exists():
        return {}
    libraries = map(Path, run_onnxruntime.cuda_libraries(tree / PROVIDER))
    folders = dict.fromkeys(str(library.parent) for library in libraries if library.is_absolute())
    return {
        name: os.pathsep.join(filter(None, [*values, os.environ.get(name, "")]))
        for name, values in {"PYTHONPATH": [str(tree)], "LD_LIBRARY_PATH": folders}.items()
    }


def marked_files(folder: Path) -> list[Path]:
    """Test files that have a test marked so."""
    return sorted(p for p in folder.rglob("test_*.py") if _MARK.search(p.read_text()))


def memcheck(context: Context) -> None:
    """Emit what compute-sanitizer says of one match and one merge."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        emit("memcheck", skipped="compute-sanitizer is not installed")
        return
    attempt("memcheck", {}, run_memcheck, tool, context)


def run_memcheck(tool: str, context: Context) -> dict[str, Any]:
    """Run both kernels under the tool, every tensor in an allocation of its own.

    Returns:
        As ``finished``: status 99 for a wrong access, 1 if a kernel did not run or was wrong.
    """
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(_WRONG_ACCESS)]
    command += [sys.executable, "-m", "benchmarks.gpu.run_tools", str(context.prepared.folder)]
    return finished(command, context.seconds - 5, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def finished(command: list[str], limit_s: float, **variables: str) -> dict[str, Any]:
    """Exit status, whether that is 0, and the end of what was said."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            cwd=ROOT,
            env={**os.environ, **variables},
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"not done after {limit_s:.0f} s"}
    said = (done.stdout[-_TAIL:] + done.stderr[-_TAIL:]).strip()
    return {"passed": done.returncode == 0, "status": done.returncode, "said": said}


def main(arguments: list[str]) -> int:
    """What the sanitizer watches.

    Args:
        arguments: The prepared folder, and the device if not ``cuda``.

    Returns:
        Exit status: 0 if every kernel ran and was right, else 1.
    """
    from benchmarks.gpu import check_kernels

    device: Literal["cuda", "cpu"] = "cpu" if arguments[1:] == ["cpu"] else "cuda"
    return int(not check_kernels.memcheck(Context(Prepared(Path(arguments[0])), device, 0.0)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
