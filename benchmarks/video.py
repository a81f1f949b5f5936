"""What merging across frames saves, beside merging inside them: video towers at full size.

CLIP4Clip's tower on CLIP ViT-B/32 and B/16, and STOP's, 12 frames, random weights: unmerged, ToMe
inside frames (r = 2 in every layer), and TempMe's published setting (r = 2, then layers 8, 9 and 10
join 2, 2 and 3 clips at 30 and 10 %). Parity is checked on moving samples, and all are timed in
turn on ONNX Runtime's CPU provider at batch 1. Prints the rows; writes them to
benchmarks/results/video.json.

    python -m benchmarks.video [--models clip4clip_b32] [--rounds 7] [--no-write]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import paired, percentiles, write_rows
from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.data.samples import moving_samples
from tome_export.merge.schedule import Schedule
from tome_export.onnx.files import load
from tome_export.runtime.inputs import Fed
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import INPUT_NAME, BatchRange
from tome_export.video.options import FrameMerging, VideoOptions

MODELS = ("clip4clip_b32", "clip4clip_b16", "stop_b32")
FRAMES, R = 12, 2
UNMERGED, INSIDE, ACROSS = "unmerged", "inside frames", "across frames"
VARIANTS = {
    UNMERGED: (0, VideoOptions(FRAMES)),
    INSIDE: (R, VideoOptions(FRAMES)),
    ACROSS: (R, VideoOptions(FRAMES, FrameMerging())),
}


def built(model: str, variant: str, folder: Path) -> Artifact:
    """One artifact, fp32, batch 1; the unmerged one is not checked, there is nothing to decide."""
    r, video = VARIANTS[variant]
    request = BuildRequest(
        model,
        folder,
        Schedule(r),
        weights="random",
        engine="none",
        batch=BatchRange(1, 1, 1),
        video=video,
    )
    return build(replace(request, check=variant != UNMERGED))


def measured(model: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant; speed-ups are ratios to the unmerged one within each round."""
    with tempfile.TemporaryDirectory(prefix="video-") as name:
        artifacts, runs = {}, {}
        for variant in VARIANTS:
            artifact = built(model, variant, Path(name) / variant.replace(" ", "-"))
            artifacts[variant] = artifact.manifest
            runs[variant] = _run(artifact)
        seconds = paired(runs, rounds)
    return [
        {
            "model": model,
            "variant": variant,
            "frames": FRAMES,
            "batch": 1,
            "tokens": [manifest.tokens_in, *manifest.tokens],
            "macs": manifest.macs,
            "parity": manifest.parity,
            "rounds": rounds,
            "latency_ms": percentiles(1e3 * seconds[variant]),
            "speedup": percentiles(seconds[UNMERGED] / seconds[variant]),
        }
        for variant, manifest in artifacts.items()
    ]


def _run(artifact: Artifact) -> Callable[[], object]:
    preprocessing = artifact.manifest.preprocessing
    pixels = moving_samples(preprocessing, 1, FRAMES)
    more = {i.name: [int(n) for n in i.shape[1:]] for i in artifact.manifest.inputs[1:]}
    runner = Fed(OrtRunner(load(artifact.model_path)), more)
    return lambda: runner.infer({INPUT_NAME: pixels})


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for row in measured(model, given.rounds):
            rows.append(row)
            print(
                f"{model}, {row['variant']}: {row['tokens'][0]} -> {row['tokens'][-1]} tokens, "
                f"MACs ratio {row['macs'].ratio:.2f}, speed-up {row['speedup']['p50']:.2f} "
                f"({row['latency_ms']['p50']:.0f} ms)"
            )
    if not given.no_write:
        print(write_rows("video", rows))


if __name__ == "__main__":
    main()
