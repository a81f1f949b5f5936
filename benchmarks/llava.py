"""LLaVA-1.5's vision tower at full size: what merging saves, and what a build takes.

CLIP ViT-L/14 at 336 pixels, cut behind layer 23, random weights, r = 23 in every layer. Builds the
merged and the unmerged tower with the command line, each in a process of its own whose peak memory
is taken, and times both on ONNX Runtime's CPU provider at batch 1 in turn. Prints the rows; writes
them to benchmarks/results/llava.json.

    python -m benchmarks.llava [--rounds 7] [--precision fp32]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import paired, percentiles, write_rows
from tome_export.artifact import Artifact
from tome_export.onnx.files import load
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import INPUT_NAME

MODEL, R = "llava15_tower", 23
MEMORY_LIMIT_GIB = 6.0
ENTRY = "import sys; from tome_export.cli.main import main; sys.exit(main())"


def build(folder: Path, r: int, precision: str, *more: str) -> dict[str, Any]:
    """Build one artifact in a process of its own.

    Args:
        folder: Of the artifact.
        r: Tokens to merge per layer.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        more: More options of ``tome-export build``.

    Returns:
        Seconds and peak resident memory in GiB.
    """
    options = ["--r", str(r), f"--{precision}", "--weights", "random", "--batch", "1"]
    arguments = ["build", MODEL, *options, "--engine", "none", *more, "-o", str(folder)]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", ENTRY, *arguments])
    # Of this child alone; RUSAGE_CHILDREN would be the largest of all.
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"build of {folder.name} ended with exit code {code}")
    return {
        "seconds": time.perf_counter() - start,
        "peak_gib": usage.ru_maxrss / 2**20,
    }


def timed(merged: Path, plain: Path, rounds: int) -> dict[str, Any]:
    """Latency of both at batch 1, and the speed-up of each round."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 336, 336), dtype=np.float32)
    runs: dict[str, Callable[[], object]] = {}
    for name, folder in (("unmerged", plain), ("merged", merged)):
        runner = OrtRunner(load(folder / "model.onnx"))
        runs[name] = partial(runner.infer, {INPUT_NAME: pixels})
    seconds = paired(runs, rounds)
    return {
        "rounds": rounds,
        "latency_ms": {name: percentiles(1e3 * values) for name, values in seconds.items()},
        "speedup": percentiles(seconds["unmerged"] / seconds["merged"]),
    }


def row(rounds: int, precision: str) -> dict[str, Any]:
    """Everything of one precision."""
    with tempfile.TemporaryDirectory(prefix="llava-") as name:
        merged, plain = Path(name) / "merged", Path(name) / "unmerged"
        built = build(merged, R, precision)
        build(plain, 0, precision, "--no-check")
        manifest = Artifact.open(merged).manifest
        return {
            "model": MODEL,
            "weights": "random",
            "r": R,
            "precision": precision,
            "tokens_in": manifest.tokens_in,
            "tower": manifest.tower,
            "output": manifest.output,
            "macs": manifest.macs,
            "parity": manifest.parity,
            "build": built,
            **timed(merged, plain, rounds),
        }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "fp16"])
    given = parser.parse_args()
    rows = [row(given.rounds, precision) for precision in given.precision]
    for found in rows:
        print(json.dumps(found, indent=2))
        if found["build"]["peak_gib"] > MEMORY_LIMIT_GIB:
            raise SystemExit(f"the build took more than {MEMORY_LIMIT_GIB:g} GiB")
    print(write_rows("llava", rows))


if __name__ == "__main__":
    main()
