"""What does merging cost in accuracy, on a model that was trained?

vit_digits on its 450 test images, by ``tome-export eval``: top-1 of constant schedules.

    python -m benchmarks.digits [--no-write]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import write_rows
from tome_export.build import BuildRequest, build
from tome_export.data.find import SAMPLES
from tome_export.evaluate.main import EvalRequest, evaluate
from tome_export.merge.schedule import Schedule

MODEL, R = "vit_digits", 8
SCHEDULES = (0, 2, 4, 8, 16, 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / MODEL
        request = BuildRequest(MODEL, output, Schedule(R), engine="none", check=False)
        artifact = build(request)
        found = evaluate(
            EvalRequest(artifact.path, data=(SAMPLES,), r=SCHEDULES, workers=0, restart=True)
        ).evaluation
    rows: list[dict[str, Any]] = [
        {
            "benchmark": "digits",
            "model": MODEL,
            "images": found.data.images,
            "confidence": found.confidence,
            "r": r,
            "per_layer": candidate.r,
            "macs": candidate.macs,
            "top1": candidate.top1,
        }
        for r in SCHEDULES
        for candidate in found.candidates
        if candidate.name == f"r={r}"
    ]
    for row in rows:
        top1 = row["top1"]
        print(f"r={row['r']:2d}  {row['macs'] / 1e6:6.2f} M  {top1.correct}/{top1.images}")
    if not arguments.no_write:
        print(write_rows("digits", rows))


if __name__ == "__main__":
    main()
