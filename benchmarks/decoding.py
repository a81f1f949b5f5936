"""What do other ways of decoding cost, and how far are their pixels from the library's?

Photographs are made as large as those of a web page and of a phone, and decoded for a model of
224 x 224 as ``serve`` does it, with ``--scaled-decoding``, by pillow-simd in Pillow's place, and by
the pipeline of ``--dali``, on the CPU. The last two are in Pythons of their own:

    python -m venv DALI && DALI/bin/pip install nvidia-dali-cuda130 numpy
    python -m venv SIMD && CC="cc -mavx2" SIMD/bin/pip install pillow-simd numpy
    python -m benchmarks.decoding --dali DALI/bin/python --simd SIMD/bin/python [--no-write]

Times are of a processor, of one thread. Differences are in levels of 0 to 255, of the cut that the
model is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import write_rows
from benchmarks.serving_pipeline import SIZES, photographs
from tome_export.data import pixels
from tome_export.models import resolve
from tome_export.serve.config import PYTHON_MODELS

MODEL = "timm:vit_small_patch16_224"
SECONDS = 1.0

LOAD = """
import importlib.util, json, pathlib, sys, time
import numpy as np
folder = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("module", folder / sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
"""

DALI = """
pipeline = module.preprocess(prefetch_queue_depth=1)
pipeline.build()
def run():
    pipeline.feed_input("image", [np.frombuffer(file, np.uint8) for file in files])
    found = pipeline.run()[0]
    return [np.asarray(found.at(number)) for number in range(len(files))]
"""

SIMD = """
settings = json.loads((folder / "preprocessing.json").read_text())
def run():
    return [module.pixels_from_bytes(file, settings) for file in files]
"""

MEASURE = """
found = np.stack(run())
began, count = time.process_time(), 0
while time.process_time() - began < float(sys.argv[3]):
    run()
    count += len(files)
np.savez(folder / "found.npz", pixels=found, ms=(time.process_time() - began) / count * 1e3)
"""


def decoded(files: Sequence[bytes], settings: dict[str, Any]) -> tuple[NDArray[np.uint8], float]:
    """Pixels ``[B, H, W, C]`` as ``serve`` makes them, and milliseconds per image."""

    def run() -> list[NDArray[np.uint8]]:
        return [pixels.pixels_from_bytes(file, settings) for file in files]

    found = np.stack(run())
    return found, milliseconds(run) / len(files)


def milliseconds(run: Callable[[], object]) -> float:
    """Time of a processor that a call takes."""
    began, count = time.process_time(), 0
    while time.process_time() - began < SECONDS:
        run()
        count += 1
    return (time.process_time() - began) / count * 1e3


def decoded_elsewhere(
    files: Sequence[bytes], settings: dict[str, Any], python: Path, module: Path, run: str
) -> tuple[NDArray[np.uint8], float]:
    """The same by a module in another Python, where ``run`` says how."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / module.name).write_bytes(module.read_bytes())
        more = {"max_batch": len(files), "threads": 1, "device": "cpu"}
        (folder / "preprocessing.json").write_text(json.dumps(settings | more))
        for number, file in enumerate(files):
            (folder / f"{number:03d}.jpg").write_bytes(file)
        command: list[str | Path] = [
            python,
            "-c",
            LOAD + run + MEASURE,
            folder,
            module.name,
            str(SECONDS),
        ]
        subprocess.run(command, check=True)
        found = np.load(folder / "found.npz")
        return found["pixels"], float(found["ms"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dali", type=Path, metavar="PYTHON", help="one that has DALI")
    parser.add_argument("--simd", type=Path, metavar="PYTHON", help="one that has pillow-simd")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    recipe = asdict(resolve(MODEL).preprocessing) | {"form": "uint8"}
    rows = []
    for size, wanted in SIZES.items():
        files = [request.item() for request in photographs(wanted)]
        exact, ms = decoded(files, recipe)
        ways = {"scaled": decoded(files, recipe | {"scaled_decoding": True})}
        others = {
            "simd": (arguments.simd, Path(pixels.__file__), SIMD),
            "dali": (arguments.dali, PYTHON_MODELS / "dali.py", DALI),
        }
        for way, (python, module, run) in others.items():
            if python is not None:
                ways[way] = decoded_elsewhere(files, recipe, python, module, run)
        row: dict[str, Any] = {"benchmark": "decoding", "model": MODEL, "photographs": size}
        row |= {"images": len(files), "cpu_ms": {"exact": ms}, "levels": {}}
        for way, (found, taken) in ways.items():
            off = np.abs(found.astype(np.int16) - exact)
            row["cpu_ms"][way] = taken
            row["levels"][way] = {"mean": float(off.mean()), "max": int(off.max())}
        rows.append(row)
        print(json.dumps(row))
    if not arguments.no_write:
        print(write_rows("decoding", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
