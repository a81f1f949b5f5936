"""How much of the saved work becomes saved time on a CPU?

ViT-B/16, r = 16, ONNX Runtime CPU: the speed-up of the merged ONNX model over the unmerged one,
divided by the ratio of their MACs (1.0 = merging costs nothing), at batch 8 and 1. Beside them
PyTorch eager, merged and not, on the same images. All are timed in turn; ratios are medians of
the per-round ratios.

    python -m benchmarks.cpu [--repeats 15] [--no-write]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.harness import paired, percentiles, write_rows
from tome_export.data.samples import sample_pixels
from tome_export.models import resolve
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.patch import patch
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import INPUT_NAME, BatchRange

MODEL, R = "vit_b16", 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    recipe = resolve(MODEL)
    module = recipe.load(weights="random").module
    merged, unmerged = patch(module, R), patch(module, 0)
    ratio = merged.macs(merged=False) / merged.macs()
    options = ExportOptions(batch=BatchRange(1, 8, 8))
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, model in (("merged", merged), ("unmerged", unmerged)):
            path = Path(folder) / f"{name}.onnx"
            onnx_from_model(model, path, options, recipe.output.name)
            runners[name] = OrtRunner(onnx.load(path))
    rows = []
    for batch in (8, 1):
        images = sample_pixels(recipe, batch)
        rows.append(
            measure(
                runners, {"merged": merged, "unmerged": module}, images, ratio, arguments.repeats
            )
        )
        show(rows[-1])
    if not arguments.no_write:
        print(write_rows("cpu", rows))


def measure(
    runners: dict[str, OrtRunner],
    modules: dict[str, torch.nn.Module],
    images: np.ndarray[Any, Any],
    macs_ratio: float,
    repeats: int,
) -> dict[str, Any]:
    tensor = torch.from_numpy(images)

    def eager(module: torch.nn.Module) -> None:
        with torch.inference_mode():
            module(tensor)

    runs = {
        f"onnxruntime {k}": lambda r=r: r.infer({INPUT_NAME: images}) for k, r in runners.items()
    }
    runs |= {f"torch {k}": lambda m=m: eager(m) for k, m in modules.items()}
    seconds = paired(runs, repeats)
    speedups = {
        library: float(np.median(seconds[f"{library} unmerged"] / seconds[f"{library} merged"]))
        for library in ("onnxruntime", "torch")
    }
    return {
        "benchmark": "cpu",
        "model": MODEL,
        "r": R,
        "batch": len(images),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "macs_ratio": macs_ratio,
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "speedup": speedups,
        "speedup_over_macs_ratio": {k: v / macs_ratio for k, v in speedups.items()},
        "onnxruntime_merged_over_torch_merged": float(
            np.median(seconds["torch merged"] / seconds["onnxruntime merged"])
        ),
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['model']} r={row['r']} batch {row['batch']}: MACs ratio {row['macs_ratio']:.2f}")
    for name, values in row["seconds"].items():
        print(f"  {name:22s}" + "".join(f"  {k} {v * 1e3:7.1f} ms" for k, v in values.items()))
    for library, speedup in row["speedup"].items():
        share = row["speedup_over_macs_ratio"][library]
        print(f"  {library}: {speedup:.2f} times faster, {share:.2f} of the MACs ratio")


if __name__ == "__main__":
    main()
