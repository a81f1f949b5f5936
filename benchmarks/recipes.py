"""Does every recipe export, decide as PyTorch decides, and build?

Every recipe at reduced depth with random weights (``vit_digits`` with its own), on the real
photographs that come with the package: fp32 under five schedules, fp16 under the first. The first
is also built by TensorRT-RTX in both precisions. ``--full`` names recipes to run at full depth.

    python -m benchmarks.recipes [--recipe NAME ...] [--full NAME ...] [--no-engine] [--no-write]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from benchmarks.harness import write_rows
from tome_export.artifact.parity import ParityReport
from tome_export.data.samples import sample_pixels
from tome_export.engine import EngineOptions, select
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES, resolve
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import check_parity
from tome_export.patch import patch
from tome_export.spec import BatchRange

DEPTH = 3
IMAGES = 6


def schedules(r: int) -> dict[str, Schedule]:
    return {
        "constant": Schedule(r),
        "decreasing": Schedule(r, -1.0),
        "increasing": Schedule(r, 1.0),
        "list": Schedule(per_layer=(3, 0, r)),
        "clamped": Schedule(10_000),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="append", default=[], help="only these")
    parser.add_argument("--full", action="append", default=[], help="these at full depth")
    parser.add_argument("--no-engine", action="store_true", help="do not build engines")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--name", default="recipes", help="of the result file")
    arguments = parser.parse_args()
    if arguments.full and not arguments.recipe:
        parser.error("--full needs --recipe, and a --name of its own for the result file")
    rows = []
    for name in arguments.recipe or RECIPES:
        full = name in arguments.full or name == "vit_digits"
        rows += recipe_rows(name, None if full else DEPTH, not arguments.no_engine)
    failed = [row for row in rows if breaches(row)]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} cases passed, "
        f"at most {max(row['allowance_used'] for row in rows):.2f} of the allowed error used"
    )
    if not arguments.no_write:
        print(write_rows(arguments.name, rows))
    return int(bool(failed))


def recipe_rows(name: str, depth: int | None, engines: bool) -> list[dict[str, Any]]:
    recipe = resolve(name)
    weights = "pretrained" if recipe.name == "vit_digits" else "random"
    loaded = recipe.load(weights=weights, depth=depth)
    images = sample_pixels(recipe, IMAGES)
    rows = []
    for label, schedule in schedules(recipe.merging.r).items():
        model = patch(loaded.module, schedule, prop_attn=recipe.merging.prop_attn)
        for precision in ("fp32", "fp16") if label == "constant" else ("fp32",):
            engine = engines and label == "constant"
            rows.append(case(name, label, model, images, precision, engine))
            show(rows[-1])
    return rows


def case(
    name: str, label: str, model: Any, images: Any, precision: Any, engine: bool
) -> dict[str, Any]:
    options = ExportOptions(precision=precision, batch=BatchRange(1, IMAGES, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_from_model(model, path, options, "output")
        report = check_parity(model, onnx.load(path), images, precision, options.batch)
        built = None
        if engine:
            backend = select("tensorrt-rtx").builder
            if backend is None:
                raise SystemExit("TensorRT-RTX is not here; give --no-engine")
            output = Path(folder) / backend.file_name
            built = backend.build(path, EngineOptions(batch=options.batch), output)
    return {
        "benchmark": "recipes",
        "recipe": name,
        "depth": len(model.layers),
        "tokens": [model.layers[0].tokens_in, *(layer.tokens_out for layer in model.layers)],
        "schedule": label,
        "precision": precision,
        "images": len(images),
        "passed": report.passed,
        "failures": report.failures,
        "decisions": report.decisions,
        "disagreements": report.disagreements,
        "defects": report.defects,
        "largest_margin": max((layer.largest_margin for layer in report.layers), default=0.0),
        "margin_bound": min((layer.margin_bound for layer in report.layers), default=0.0),
        "allowance_used": allowance_used(report),
        "relative_error": report.output.relative,
        "led_relative_error": report.led_output.relative,
        "cosine": report.output.cosine,
        "top1_agreement": report.output.top1_agreement,
        "engine_bytes": built and built.size_bytes,
        "engine_seconds": built and built.build_seconds,
    }


def allowance_used(report: ParityReport) -> float:
    """Largest share of the allowed error, of the scores in any layer or of the output."""
    shares = [layer.score_error / layer.score_error_allowed for layer in report.layers]
    return max([report.led_output.max_abs / report.led_allowed, *shares])


def breaches(row: dict[str, Any]) -> list[str]:
    """What a case misses: parity, and the project's own limits on the numbers."""
    found = list(row["failures"])
    if row["precision"] == "fp32" and not row["led_relative_error"] <= 1e-5:
        found.append(f"relative error {row['led_relative_error']:.1e} exceeds 1e-5 in fp32")
    if row["precision"] == "fp16" and not row["cosine"] >= 0.999:
        found.append(f"cosine {row['cosine']:.6f} is below 0.999 in fp16")
    return found


def show(row: dict[str, Any]) -> None:
    engine = f"engine {row['engine_bytes'] / 1e6:6.1f} MB" if row["engine_bytes"] else ""
    print(
        f"{row['recipe']:20s} depth {row['depth']:2d} {row['schedule']:10s} {row['precision']} "
        f"{'pass' if row['passed'] else 'FAIL'} decisions {row['decisions']:6d} "
        f"differ {row['disagreements']:3d} defects {row['defects']} "
        f"relative {row['relative_error']:.1e} led {row['led_relative_error']:.1e} "
        f"cosine {row['cosine']:.7f} {engine}",
        flush=True,
    )
    for failure in breaches(row):
        print(f"    {failure}")


if __name__ == "__main__":
    sys.exit(main())
