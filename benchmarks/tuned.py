"""How much more of a trained tower does a tuned schedule keep than the best constant r?

``tune`` searches on crops of two thirds of the photographs of ``benchmarks.trained`` for 70 % of
the MACs, with ToMe. What it holds out are other crops of the same photographs; beside them the
schedule and the best constant r are compared on crops of the photographs that it never saw.

    python -m benchmarks.tuned FOLDER [--seconds 640] [--no-write]

FOLDER is what ``scripts/trained_dinov2.py`` made.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import write_rows
from benchmarks.trained import BATCH, SIDE, photographs
from tome_export.artifact.goal import Goal
from tome_export.data.metrics import cosines, mean_of
from tome_export.data.preprocess import pixels_from_image
from tome_export.models import resolve
from tome_export.patch import patch
from tome_export.tune import TuneRequest, tune

NAME = "tuned"
SHARE = 70
"""Target in percent of the unmerged MACs."""

EVERY = 3
"""One photograph in so many is kept from the search altogether."""

SEARCHED, OTHER = 22, 12
"""Crops of each photograph that is searched on, and of each of the others."""


def crops(image: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """Squares of random size and place out of a photograph, always the same ones."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        side = round(rng.uniform(*SIDE) * min(image.size))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        found.append(image.crop((left, top, left + side, top + side)))
    return found


def features(module: Any, r: tuple[int, ...], pixels: torch.Tensor) -> NDArray[np.float32]:
    """Features ``[B, C]`` of images that are merged by a schedule."""
    model = patch(module, list(r))
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in torch.split(pixels, BATCH)]).numpy()


def measure(folder: str, seconds: float) -> dict[str, Any]:
    """Tune, and compare what was found on the photographs that were kept from it."""
    loaded = resolve(f"hf:{folder}").load()
    others = []
    with tempfile.TemporaryDirectory() as made:
        for index, image in enumerate(photographs()):
            if index % EVERY == 1:
                others += crops(image, OTHER, index)
                continue
            for number, part in enumerate(crops(image, SEARCHED, index)):
                part.save(Path(made) / f"{index:02d}-{number:02d}.png")
        output = Path(made) / "schedule.json"
        goal = Goal.target_macs(f"{SHARE}%")
        found = tune(TuneRequest(f"hf:{folder}", goal, output, data=(made,), time_limit=seconds))
    constant, estimate = found.best_constant, found.found.estimate
    if constant is None or estimate is None:
        raise SystemExit("there was too little time to compare with a constant r: give more")
    pixels = torch.from_numpy(
        np.stack([pixels_from_image(part, loaded.recipe.preprocessing) for part in others])
    )
    plain = features(loaded.module, (0,) * len(found.schedule), pixels)
    tuned, fixed = (
        cosines(features(loaded.module, r, pixels), plain)
        for r in (found.schedule, constant.schedule)
    )
    return {
        "share": SHARE,
        "schedule": found.schedule,
        "constant": constant.schedule,
        "macs": {
            "unmerged": found.unmerged.macs,
            "tuned": found.found.macs,
            "constant": constant.macs,
        },
        "data": found.data.model_copy(update={"source": "crops of photographs"}),
        "search": found.search,
        "seconds": found.seconds,
        "held_out": estimate,
        "other_photographs": {
            "images": len(others),
            "tuned": {**vars(mean_of(tuned)), "lowest": float(tuned.min())},
            "constant": {**vars(mean_of(fixed)), "lowest": float(fixed.min())},
            "over_constant": mean_of(tuned - fixed),
        },
    }


def main() -> None:
    """Measure and write the row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=640.0)
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    row = measure(given.folder, given.seconds)
    print(json.dumps(row, default=lambda part: part.model_dump(mode="json"), indent=1))
    if not given.no_write:
        write_rows(NAME, [row])


if __name__ == "__main__":
    main()
