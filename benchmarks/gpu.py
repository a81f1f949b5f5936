"""Are the kernels right and fast on this GPU, and how much faster does a model get?

Needs torch, the Triton language and timm. Parts, each in a process of its own, so that one that
fails or hangs leaves the others their results:

    check     decisions against exact ones, merges against float64
    aot       kernels compiled ahead of time, started through the CUDA driver as TensorRT does
    ops       times of match and merge against PyTorch's operations and the memory floor
    models    times of whole models, merged and not
    runtimes  TensorRT, TensorRT-RTX and ONNX Runtime's CUDA provider, where they are installed

    python benchmarks/gpu.py [--only PART,PART] [--quick] [--out FILE]

Exit status: 0 all passed, 1 something failed (its row says what), 2 usage, 4 no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path

import gpu_checkout  # noqa: F401, before what it makes importable
import gpu_rows

PARTS = ("check", "aot", "ops", "models", "runtimes")
DEFAULT_OUT = Path(__file__).parent / "results" / "gpu.json"
NO_GPU = 4


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker is not None:
        importlib.import_module(f"gpu_{options.worker}").main(options.quick)
        return 0
    problem = missing()
    if problem is not None:
        print(f"nothing was measured: {problem}", file=sys.stderr)
        return NO_GPU
    results = gpu_rows.Results(options.out, gpu_rows.environment(options.commit))
    about = results.about
    print(f"{about['gpu']}, compute capability {about['compute_capability']}", flush=True)
    end = time.monotonic() + options.limit
    for part in options.only:
        run_part(part, options.quick, end - time.monotonic(), results)
    print("\n".join(["", *gpu_rows.table(results.rows)]))
    wrong = [row for row in results.rows if gpu_rows.failed(row)]
    print(f"{len(results.rows)} rows, {len(wrong)} failed: {options.out}")
    for row in wrong:
        print(f"  {gpu_rows.text(row)}")
    return int(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=_parts, default=list(PARTS), metavar="PART,PART")
    parser.add_argument("--quick", action="store_true", help="one shape of each")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="of the JSON rows")
    parser.add_argument("--limit", type=float, default=470.0, help="seconds for all parts")
    parser.add_argument("--commit", help="of this copy, where it has no git history")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(map(repr, unknown))} is no part; expected some of {','.join(PARTS)}"
        )
    return parts


def missing() -> str | None:
    """What this machine lacks, or None."""
    for name in ("torch", "triton", "timm"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


def run_part(part: str, quick: bool, limit_s: float, results: gpu_rows.Results) -> None:
    """Run one part in a process of its own and collect its rows as they come.

    A part that fails, or is not done in time, adds a row that says so.
    """
    if limit_s <= 0:
        results.add({"part": part, "benchmark": "part", "error": "no time was left; see --limit"})
        return
    command = [sys.executable, __file__, "--worker", part, *(["--quick"] if quick else [])]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                row = gpu_rows.row_from_line(line)
                if row is None:
                    print(line, end="", file=sys.stderr, flush=True)
                else:
                    results.add(row)
                    print(gpu_rows.text(row), flush=True)
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    seconds = time.monotonic() - started
    if status != 0:
        reason = f"was ended after {limit_s:.0f} s" if seconds >= limit_s else "see its traceback"
        error = f"the process ended with status {status}: {reason}"
        results.add({"part": part, "benchmark": "part", "error": error})
    smi = gpu_rows.nvidia_smi()
    results.add({"part": part, "benchmark": "seconds", "wall_s": seconds, "nvidia_smi": smi})


if __name__ == "__main__":
    sys.exit(main())
