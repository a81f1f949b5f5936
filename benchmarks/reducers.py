"""What do the reducers keep of a model's accuracy, and what do they gain in time, at the same MACs?

Accuracy: the trained vit_digits on its 450 test images, PyTorch in fp32, over each reducer's own
range of budgets. No model is trained for its reducer, and the parts that some learn are random.
Speed: deit_tiny (random weights) in
fp32 on ONNX Runtime CPU, each reducer beside ToMe at the same MACs, timed in turn.

    python -m benchmarks.reducers [--part accuracy|speed] [--no-write]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, paired, percentiles, write_rows
from tome_export.data.samples import digits_test
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES, resolve
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.parity.compare import inputs_of
from tome_export.patch import MergedModel, patch
from tome_export.reducers import REDUCERS, reducer_from_text
from tome_export.reducers.base import Reducer
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import INPUT_NAME, BatchRange

LEARNED = dict.fromkeys(("dtem", "dynamicvit", "query"), ("weights=random",))
TOKENS, DEPTH = 65, 6
R = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32)
KEEP = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SPEED_MODEL, SPEED_R, BATCH, ROUNDS = "timm:deit_tiny_patch16_224", 8, 8, 15


@dataclass(frozen=True)
class Budget:
    """A reducer's options and, unless they give the counts, its schedule."""

    options: tuple[str, ...]
    schedule: Schedule | None


def budgets(name: str) -> Iterator[Budget]:
    """What a reducer is tried with on vit_digits, from much kept to little."""
    learned = LEARNED.get(name, ())
    if name in ("evit", "dynamicvit"):
        for keep in KEEP:
            yield Budget((f"keep={keep}", *learned), None)
    elif name == "diffrate":
        for r in R:
            counts = [layer.r for layer in Schedule(r).tokens(DEPTH, TOKENS, prefix=1)]
            yield Budget(halved(TOKENS, counts), None)
    else:
        for r in R:
            yield Budget(learned, Schedule(r))


def accuracy(_folder: Path) -> list[dict[str, Any]]:
    """Right answers of every reducer and budget."""
    pixels, labels = digits_test()
    images = torch.from_numpy(pixels)
    module = RECIPES["vit_digits"].load().module
    rows = []
    for name in REDUCERS:
        seen: set[int] = set()
        for budget in budgets(name):
            reducer = reducer_from_text(name, budget.options)
            model = patch(module, budget.schedule, reducer=reducer).eval()
            macs = model.macs()
            if macs in seen:  # clamped to the same counts
                continue
            seen.add(macs)
            extra = [torch.from_numpy(value) for value in inputs_of(model, len(images)).values()]
            with torch.inference_mode():
                right = model(images, *extra).argmax(dim=1).numpy() == labels
            rows.append(
                {
                    "benchmark": "reducers",
                    "part": "accuracy",
                    "reducer": name,
                    "options": [o for o in budget.options if "/" not in o],
                    "r": [layer.r for layer in model.layers],
                    "macs": macs,
                    "unmerged_macs": model.macs(merged=False),
                    "correct": int(right.sum()),
                    "images": len(labels),
                }
            )
            print(f"{name:12s} {macs / 1e6:6.2f} M  {right.sum()} of {len(labels)}")
    return rows


def halved(tokens: int, counts: list[int]) -> tuple[str, ...]:
    """DiffRate's options that remove ``counts``, one half by pruning and one by merging."""
    prune, merged = [], []
    for r in counts:
        prune.append(tokens - r // 2)
        tokens -= r
        merged.append(tokens)
    return tuple(
        f"{key}={','.join(map(str, kept))}"
        for key, kept in (("prune_kept", prune), ("merge_kept", merged))
    )


def same_macs(name: str, module: Any) -> MergedModel:
    """A reducer on the speed model, with as nearly ToMe's MACs as its counts allow."""
    tome = patch(module, SPEED_R)
    learned = LEARNED.get(name, ())
    if name == "diffrate":
        options = halved(tome.layers[0].tokens_in, [SPEED_R] * len(tome.layers))
        return patch(module, None, reducer=reducer_from_text(name, options))
    reducers: list[Reducer] = [reducer_from_text(name, learned)]
    if name == "dynamicvit":
        keeps = [percent / 100 for percent in range(30, 100)]
        reducers = [reducer_from_text(name, (*learned, f"keep={keep}")) for keep in keeps]
    schedule = None if name == "dynamicvit" else Schedule(SPEED_R)
    found = [patch(module, schedule, reducer=reducer) for reducer in reducers]
    return min(found, key=lambda model: abs(model.macs() - tome.macs()))


def speed(folder: Path) -> list[dict[str, Any]]:
    """Each reducer's latency as a share of ToMe's at the same MACs."""
    module = resolve(SPEED_MODEL).load(weights="random").module
    tome, anchor = _runner(patch(module, SPEED_R).eval(), folder / "tome.onnx")
    rows = []
    for name in REDUCERS:
        model = same_macs(name, module).eval()
        runner, inputs = _runner(model, folder / f"{name}.onnx")
        runs = {"tome": partial(tome.infer, anchor), name: partial(runner.infer, inputs)}
        if name == "tome":
            runs = {"tome": runs["tome"], "again": runs["tome"]}
        seconds = list(paired(runs, ROUNDS).values())
        ratios = percentiles(seconds[1] / seconds[0])
        rows.append(
            {
                "benchmark": "reducers",
                "part": "speed",
                "reducer": name,
                "reducer_options": model.settings.reducer.record()["options"],
                "model": SPEED_MODEL,
                "batch": BATCH,
                "rounds": ROUNDS,
                "macs": model.macs(),
                "tome_macs": patch(module, SPEED_R).macs(),
                "time_over_tome": ratios,
            }
        )
        print(f"{name:12s} {model.macs() / 1e9:.3f} G  {ratios}")
    return rows


def _runner(model: MergedModel, path: Path) -> tuple[Any, dict[str, Any]]:
    onnx_from_model(model, path, ExportOptions(batch=BatchRange(BATCH, BATCH, BATCH)), "logits")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, *model.input_size), dtype=np.float32)
    return OrtRunner(path).__enter__(), {INPUT_NAME: images, **inputs_of(model, BATCH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["accuracy", "speed"], help="only one of the two")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("accuracy", accuracy), ("speed", speed)):
            if arguments.part in (None, name):
                rows += part(Path(folder))
            else:
                kept = json.loads((RESULTS / "reducers.json").read_text())["rows"]
                rows += [row for row in kept if row["part"] == name]
    if not arguments.no_write:
        print(write_rows("reducers", rows))


if __name__ == "__main__":
    main()
