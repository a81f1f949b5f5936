"""What does merging cost a trained DINOv2, and what does it gain on a CPU?

The weights that ``scripts/trained_dinov2.py`` makes, at 224 and 518 pixels, r = 0 and five more.

- quality: crops of real photographs, PyTorch in fp32. ToMe beside every reducer that needs neither
  training nor a second input, each with the tokens per layer that bring it nearest to ToMe's MACs:
  cosine of the tower's feature to the unmerged one's; whether the most similar of all other crops
  is of the same photograph (recall@1); correlation and error of the saliency map.
- speed: ToMe in ONNX Runtime on the CPU against the unmerged graph, batch 1, all in turn; ratios
  are medians of the per-round ratios; and the shares of the runtime's own profile.

Rows are written as they are measured, and a row of the same weights and images that is there is
not measured again: what was interrupted or left out goes on from there.

    python -m benchmarks.trained FOLDER [--part quality|speed] [--sizes 224,518]
                                        [--reducers tome,pitome] [--again] [--no-write]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from importlib import resources
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import RESULTS, cpu_name, paired, percentiles, write_rows
from benchmarks.reducers import halved
from tome_export.data.metrics import correlations, cosines, unit_vectors
from tome_export.data.preprocess import pixels_from_image
from tome_export.models import resolve
from tome_export.models.recipe import LoadedModel
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.patch import MergedModel, patch
from tome_export.reducers import reducer_from_text
from tome_export.runtime.ort import OrtRunner
from tome_export.runtime.profile import profile_in_turn
from tome_export.spec import INPUT_NAME, BatchRange

NAME = "trained"
WEIGHTS = "saliency.safetensors"
MODELS = {224: "dinov2_s14_saliency", 518: "dinov2_s14_saliency_518"}
R = {224: (4, 8, 12, 16, 20), 518: (20, 40, 60, 80, 100)}
REDUCERS = ("tome", "pitome", "tofu", "kth", "random", "evit", "topk", "diffrate")
CROPS = {224: 3, 518: 2}
"""Crops of each photograph, those at 518 pixels the first of those at 224."""

EVERY = {224: 1, 518: 2}
"""At 518 pixels, which take seven times as long, every second photograph is taken."""

SIDE = (0.35, 0.7)
"""Side of a crop over the photograph's shorter side: low and high."""

BATCH, ROUNDS, PROFILED = 7, 9, 5

PHOTOGRAPHS = {
    ("skimage", "data"): (
        *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png"),
        *("clock_motion.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
        *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png"),
        *("retina.jpg", "rocket.jpg", "text.png"),
    ),
    ("sklearn", "datasets", "images"): ("china.jpg", "flower.jpg"),
    ("matplotlib", "mpl-data", "sample_data"): ("grace_hopper.jpg",),
}
"""Real photographs that packages of the test environment bring along, each of another scene."""

Row = dict[str, Any]
Array = NDArray[np.float32]


class Crops(NamedTuple):
    """Images and what they show: ``pixels [B, 3, H, W]`` float32, ``labels [B]``."""

    pixels: torch.Tensor
    labels: NDArray[np.int64]


class Outputs(NamedTuple):
    """What a model gives: ``features [B, C]``, ``maps [B, 1, H, W]`` where no token is dropped."""

    features: Array
    maps: Array | None


class Rows:
    """The rows of the result file, of which one with the same ``key`` is replaced."""

    KEY = ("part", "size", "reducer", "tome_r", "build")

    def __init__(self, *, write: bool, again: bool) -> None:
        path = RESULTS / f"{NAME}.json"
        found = json.loads(path.read_text())["rows"] if path.exists() else []
        self._rows = {self._key(row): row for row in found}
        self._write, self._again = write, again

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.KEY)

    def has(self, row: Row) -> bool:
        """Whether one with all these values is there and need not be measured again."""
        found = self._rows.get(self._key(row), {})
        return not self._again and all(found.get(key) == value for key, value in row.items())

    def add(self, row: Row) -> None:
        """Show it and write all."""
        print(json.dumps(row), flush=True)
        self._rows[self._key(row)] = row
        if self._write:
            write_rows(NAME, [self._rows[key] for key in sorted(self._rows, key=_in_order)])


def _in_order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    part, size, reducer, r, build = key
    order = REDUCERS.index(reducer) if reducer in REDUCERS else -1
    return part, size, order, r or 0, build or ""


def photographs() -> Iterator[Image.Image]:
    """All of ``PHOTOGRAPHS``, in colour."""
    for (package, *folders), names in PHOTOGRAPHS.items():
        for name in names:
            # One part at a time: joinpath takes several from Python 3.11 on.
            found = reduce(truediv, [*folders, name], resources.files(package))
            with resources.as_file(found) as path, Image.open(path) as image:
                yield image.convert("RGB")


def crops(loaded: LoadedModel, count: int, every: int = 1) -> Crops:
    """Squares of random size and place out of the photographs, always the same ones."""
    pixels, labels = [], []
    for label, image in enumerate(photographs()):
        if label % every:
            continue
        rng = np.random.default_rng(label)
        for _ in range(count):
            side = round(rng.uniform(*SIDE) * min(image.size))
            left, top = (int(rng.integers(length - side + 1)) for length in image.size)
            part = image.crop((left, top, left + side, top + side))
            pixels.append(pixels_from_image(part, loaded.recipe.preprocessing))
            labels.append(label)
    return Crops(torch.from_numpy(np.stack(pixels)), np.array(labels))


def spread(total: int, depth: int) -> list[int]:
    """Tokens to remove per layer, equal but for one more in the first layers."""
    return [total // depth + (layer < total % depth) for layer in range(depth)]


def nearest(name: str, module: Any, macs: int) -> MergedModel:
    """A reducer on a model with as nearly so many MACs as whole numbers of tokens allow."""
    unmerged = patch(module, 0)
    depth, tokens = len(unmerged.layers), unmerged.layers[0].tokens_in

    def with_total(total: int) -> MergedModel:
        per_layer = spread(total, depth)
        if name == "diffrate":
            options = halved(tokens, per_layer)
            return patch(module, None, reducer=reducer_from_text(name, options))
        return patch(module, per_layer, reducer=reducer_from_text(name, ()))

    most = range(tokens - unmerged.prefix - 1)
    above = bisect_left(most, -macs, key=lambda total: -with_total(total).macs())
    tried = [with_total(total) for total in (max(0, above - 1), above)]
    return min(tried, key=lambda model: abs(model.macs() - macs))


def outputs_of(tower: MergedModel, module: Any, images: torch.Tensor) -> Outputs:
    """Run the whole model with a tower's merging; only the tower where tokens are dropped."""
    settings = tower.settings
    batches = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    features: list[torch.Tensor] = []
    with torch.inference_mode():
        if settings.reducer.drops:
            return Outputs(_joined(tower(batch) for batch in batches), None)
        whole = patch(
            module, settings.schedule, reducer=settings.reducer, prop_attn=settings.prop_attn
        )
        # The tower's feature is the class token behind the last norm, which the decoder leaves out.
        hook = module.backbone.layernorm.register_forward_hook(
            lambda _module, _inputs, x: features.append(x[:, 0])
        )
        try:
            maps = _joined(whole(batch) for batch in batches)
        finally:
            hook.remove()
    return Outputs(_joined(features), maps)


def _joined(batches: Iterable[torch.Tensor]) -> Array:
    return torch.cat(list(batches)).numpy()


def recall(features: Array, labels: NDArray[np.int64]) -> int:
    """How many images have one of the same label as the most similar other image."""
    directions = unit_vectors(features)
    similarity = directions @ directions.T
    np.fill_diagonal(similarity, -np.inf)
    return int((labels[similarity.argmax(axis=1)] == labels).sum())


def map_measures(maps: Array, unmerged: Array) -> Row:
    """Pearson correlation per image and mean absolute error of maps ``[B, ...]``."""
    return {
        "correlation": _mean_and_lowest(correlations(maps, unmerged)),
        "mean_absolute_error": float(np.abs(maps - unmerged).mean()),
    }


def _mean_and_lowest(values: NDArray[np.float64]) -> dict[str, float]:
    return {"mean": float(values.mean()), "lowest": float(values.min())}


def measure_quality(loaded: LoadedModel, size: int, names: Sequence[str], rows: Rows) -> None:
    """A row per reducer and r, and one of the unmerged model."""
    module: Any = loaded.module
    images = crops(loaded, CROPS[size], EVERY[size])
    plain = patch(module.backbone, 0)
    unmerged = outputs_of(plain, module, images.pixels)
    same = {"benchmark": NAME, "part": "quality", "size": size, "weights": loaded.weights.sha256}
    same |= {"photographs": len(np.unique(images.labels)), "crops": len(images.labels)}
    wanted = [("unmerged", 0), *((name, r) for r in R[size] for name in names)]
    for name, r in wanted:
        row = {**same, "reducer": name, "tome_r": r}
        if rows.has(row):
            continue
        tome = patch(module.backbone, r)
        tower = tome if r == 0 else nearest(name, module.backbone, tome.macs())
        found = unmerged if r == 0 else outputs_of(tower, module, images.pixels)
        maps = None
        if found.maps is not None and unmerged.maps is not None:
            maps = map_measures(found.maps, unmerged.maps)
        rows.add(
            {
                **row,
                "r": [layer.r for layer in tower.layers],
                "macs": tower.macs(),
                "tome_macs": tome.macs(),
                "unmerged_macs": plain.macs(),
                "cosine": _mean_and_lowest(cosines(found.features, unmerged.features)),
                "recall": recall(found.features, images.labels),
                "map": maps,
            }
        )


def measure_speed(loaded: LoadedModel, size: int, rounds: int, rows: Rows) -> None:
    """A row per r of the tower's graphs, all timed and profiled in turn."""
    backbone: Any = loaded.module.backbone
    image = crops(loaded, 1).pixels[:1].numpy()
    models = {r: patch(backbone, r).eval() for r in (0, *R[size])}
    with tempfile.TemporaryDirectory() as folder:
        paths = {str(r): Path(folder) / f"{r}.onnx" for r in models}
        options = ExportOptions(batch=BatchRange(1, 1, 1))
        for r, model in models.items():
            onnx_from_model(model, paths[str(r)], options, "features")
        runs = {
            name: partial(OrtRunner(path).infer, {INPUT_NAME: image})
            for name, path in paths.items()
        }
        seconds = paired(runs, rounds)
        profiles = profile_in_turn(paths, image, PROFILED)
    for r, model in models.items():
        ratio = models[0].macs() / model.macs()
        ratios = percentiles(seconds["0"] / seconds[str(r)])
        profile = profiles[str(r)]
        rows.add(
            {
                "benchmark": NAME,
                "part": "speed",
                "size": size,
                "reducer": "tome",
                "tome_r": r,
                "weights": loaded.weights.sha256,
                "tokens": model.layers[0].tokens_in,
                "cpu": cpu_name(),
                "threads": len(os.sched_getaffinity(0)),
                "rounds": rounds,
                "macs": model.macs(),
                "macs_ratio": ratio,
                "seconds": percentiles(seconds[str(r)]),
                "speedup": ratios,
                "speedup_over_macs_ratio": ratios["p50"] / ratio,
                "profile_shares": {
                    group: ms / profile.total_ms for group, ms in profile.groups_ms.items()
                },
            }
        )


def load(folder: Path, size: int) -> LoadedModel:
    """The trained saliency model for images of a size."""
    return resolve(MODELS[size]).load(weights=str(folder / WEIGHTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/trained_dinov2.py wrote")
    parser.add_argument("--part", choices=["quality", "speed"], help="only one of the two")
    parser.add_argument("--sizes", default="224,518", help="image sizes, in pixels")
    parser.add_argument("--reducers", default=",".join(REDUCERS), help="beside the unmerged model")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed runs of each graph")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = Rows(write=not arguments.no_write, again=arguments.again)
    names = arguments.reducers.split(",")
    for size in map(int, arguments.sizes.split(",")):
        loaded = load(arguments.folder, size)
        if arguments.part != "speed":
            measure_quality(loaded, size, names, rows)
        if arguments.part != "quality":
            measure_speed(loaded, size, arguments.rounds, rows)


if __name__ == "__main__":
    main()
