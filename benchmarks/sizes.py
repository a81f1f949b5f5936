"""Does a router of several image sizes answer every request rightly?

vit_digits is built at three image sizes, one of them wide, each with two r. The six artifacts are
served behind one router, and 16 clients ask it over gRPC and HTTP at once: about pixels of every
size, about JPEG and PNG files of many shapes and orientations, one or several in a request, with
and without the parameters ``size``, ``r`` and ``max_ms``. Each answer is held against the artifact
that has to answer, run directly by ONNX Runtime on what Pillow and NumPy make of the file; which
artifact that is follows from Pillow's own size of the upright image.

    python -m benchmarks.sizes [--requests 10000] [--concurrency 16] [--no-write]

Exit code 1 if an answer was wrong or a request lost.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.harness import write_rows
from benchmarks.soak import TOLERANCE, expected_scores, told_apart
from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build_sizes
from tome_export.data.best_size import best_size
from tome_export.data.preprocess import load_images
from tome_export.errors import TomeExportError
from tome_export.merge.schedule import Schedule
from tome_export.serve.client import Client, connect
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.names import PIPELINE, ROUTER
from tome_export.serve.server import RunRequest, running
from tome_export.spec import BatchRange, ImageSize

MODEL, RS = "vit_digits", (8, 4)
SIZES = tuple(map(ImageSize.parse, ("32", "24x48", "64")))
FILES = 120
MOST_IMAGES = 4

Size = tuple[int, int]


@dataclass
class Case:
    """What is asked, and the scores or logits that have to come, a row per image."""

    kind: str
    model: str
    inputs: dict[str, NDArray[Any]]
    parameters: dict[str, str | int | bool]
    expected: NDArray[Any]


@dataclass
class Tally:
    """What one client has seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    largest_error: float = 0.0


class Cases:
    """Requests drawn at random, with what the artifacts say of them."""

    def __init__(self, artifacts: dict[tuple[Size, int], Path], files: Sequence[Path]) -> None:
        self.sizes = sorted({size for size, _ in artifacts})
        self.artifacts, self.files = artifacts, files
        keys = [*artifacts]
        scores = expected_scores([artifacts[key] for key in keys], files)
        self.told_apart = told_apart(scores)
        self.scores = dict(zip(keys, scores, strict=True))
        self.bytes = [path.read_bytes() for path in files]
        self.upright = [_upright(path) for path in files]
        self.pixels: dict[Size, NDArray[Any]] = {}
        self.logits: dict[tuple[Size, int], NDArray[Any]] = {}
        for (size, r), path in artifacts.items():
            recipe = Artifact.open(path).manifest.preprocessing
            self.pixels[size] = load_images(files, recipe)
            self.logits[size, r] = _logits(path, self.pixels[size])

    def draw(self, rng: np.random.Generator) -> Case:
        """One request."""
        parameters: dict[str, str | int | bool] = {}
        budget = rng.integers(4)
        r = min(RS)  # the least merging
        if budget == 1:
            parameters["r"], r = int(rng.integers(min(RS), 20)), 0
            r = max(one for one in RS if one <= int(parameters["r"]))
        elif budget == 2:
            parameters["r"] = str(min(RS))
        elif budget == 3:  # nothing was measured
            parameters["max_ms"] = "0.5"
        rows = rng.integers(0, len(self.files), rng.integers(1, MOST_IMAGES + 1))
        if rng.random() < 0.3:
            size = self.sizes[rng.integers(len(self.sizes))]
            if rng.random() < 0.3:
                parameters["size"] = f"{size[0]}x{size[1]}"
            inputs = {"pixel_values": self.pixels[size][rows]}
            expected = self.logits[size, r][rows]
            return Case("pixels", f"{MODEL}{ROUTER}", inputs, parameters, expected)
        sizes = [best_size(self.upright[row], self.sizes) for row in rows]
        kind = "one image" if len(rows) == 1 else "images of one size"
        if len({*sizes}) > 1:
            kind = "images of several sizes"
        if rng.random() < 0.2:
            chosen = self.sizes[rng.integers(len(self.sizes))]
            parameters["size"], sizes = f"{chosen[0]}x{chosen[1]}", [chosen] * len(rows)
            kind = "images of a size that is asked for"
        images = np.empty((len(rows), 1), np.object_)
        images[:, 0] = [self.bytes[row] for row in rows]
        expected = np.stack(
            [self.scores[size, r][row] for size, row in zip(sizes, rows, strict=True)]
        )
        return Case(kind, f"{MODEL}{ROUTER}{PIPELINE}", {"image": images}, parameters, expected)


def _upright(path: Path) -> Size:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


def _logits(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    rows = [session.run(["logits"], {"pixel_values": image[None]})[0] for image in pixels]
    return np.concatenate(rows)


def write_files(folder: Path) -> list[Path]:
    """JPEG and PNG files of noise in many shapes, each with an orientation of EXIF."""
    rng = np.random.default_rng(0)
    shapes = [(w, h) for w, h in itertools.product((20, 33, 64, 130, 300), repeat=2)]
    for index in range(FILES):
        shape = shapes[index % len(shapes)]
        coarse = rng.integers(0, 255, (6, 6), np.uint8)
        image = Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = index % 9  # 0 is no orientation
        end = ("jpg", "png")[index // len(shapes) % 2]
        image.save(folder / f"{index:03}.{end}", exif=exif, quality=95)
    return sorted(folder.iterdir())


def check(client: Client, case: Case, tally: Tally) -> None:
    """Ask one request and count its answer."""
    tally.kinds[case.kind] += 1
    began = time.perf_counter()
    try:
        answer = client.infer(case.model, case.inputs, parameters=case.parameters)
    except TomeExportError as error:
        tally.lost[str(error)] += 1
        return
    tally.seconds.append(time.perf_counter() - began)
    found = answer.get("logits")
    if found is None:
        found = np.zeros_like(case.expected)
        np.put_along_axis(found, answer["index"], answer["score"], axis=1)
    off = np.abs(found - case.expected).max() / max(1.0, np.abs(case.expected).max())
    tally.largest_error = max(tally.largest_error, float(off))
    if not off <= TOLERANCE:  # NaN is wrong
        tally.wrong[f"{case.kind}: off by {off:.1e}"] += 1


def run(server: Any, cases: Cases, requests: int, concurrency: int) -> dict[str, Any]:
    """Ask, and give a row of results."""
    numbers, tallies = itertools.count(), [Tally() for _ in range(concurrency)]

    def ask(index: int, tally: Tally) -> None:
        rng = np.random.default_rng(index)
        protocol: Literal["grpc", "http"] = "grpc" if index % 2 else "http"
        with connect(getattr(server, protocol), protocol) as client:
            while next(numbers) < requests:
                check(client, cases.draw(rng), tally)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(tallies)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    latency_ms = np.concatenate([tally.seconds for tally in tallies]) * 1e3
    wrong = sum((tally.wrong for tally in tallies), Counter())
    lost = sum((tally.lost for tally in tallies), Counter())
    for reason, count in (wrong + lost).most_common(5):
        print(f"{count} x {reason}", file=sys.stderr)
    kinds = sum((tally.kinds for tally in tallies), Counter())
    return {
        "benchmark": "serving_sizes",
        "model": MODEL,
        "sizes": [str(size) for size in SIZES],
        "r": list(RS),
        "stand_in": server.stand_in,
        "concurrency": concurrency,
        "requests": kinds.total(),
        "requests_by_kind": dict(sorted(kinds.items())),
        "wrong": wrong.total(),
        "lost": lost.total(),
        "largest_error": max(tally.largest_error for tally in tallies),
        "duration_seconds": seconds,
        "requests_per_second": kinds.total() / seconds,
        "latency_ms": {f"p{p}": float(np.percentile(latency_ms, p)) for p in (50, 95, 99, 100)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {}
        for r in RS:
            asked = [
                BuildRequest(
                    MODEL,
                    Path(folder, f"r{r}"),
                    Schedule(r),
                    image_size=size,
                    engine="none",
                    batch=BatchRange(1, 8, 16),
                )
                for size in SIZES
            ]
            for size, artifact in zip(SIZES, build_sizes(asked), strict=True):
                artifacts[(size.height, size.width), r] = artifact.path
        images = Path(folder, "images")
        images.mkdir()
        cases = Cases(artifacts, write_files(images))
        repository = Path(folder, "models")
        serve(ServeRequest(tuple(artifacts.values()), repository, ServeOptions(preprocess=True)))
        data = [path.stat() for path in repository.rglob("*.data")]
        load = os.getloadavg()[0]
        with running(RunRequest(repository, gpu=False, ready_seconds=300)) as server:
            row = run(server, cases, arguments.requests, arguments.concurrency)
            server.stop(0)
    row |= {
        "load_average_before": load,
        "images_told_apart": int(cases.told_apart.sum()),
        "images": len(cases.files),
        "files_of_weights": len(data),
        "stored_files_of_weights": len({one.st_ino for one in data}),
    }
    latency = "  ".join(f"{name} {ms:.1f} ms" for name, ms in row["latency_ms"].items())
    print(
        f"{row['requests']} requests at concurrency {row['concurrency']} in "
        f"{row['duration_seconds']:.1f} s ({row['requests_per_second']:.0f}/s): {row['wrong']} "
        f"wrong, {row['lost']} lost; largest error {row['largest_error']:.1e}\n  {latency}\n  "
        f"{row['requests_by_kind']}; {row['images_told_apart']} of {row['images']} images tell all "
        f"artifacts apart\n  {row['files_of_weights']} files of weights, "
        f"{row['stored_files_of_weights']} stored"
    )
    if not arguments.no_write:
        print(write_rows("serving_sizes", [row]))
    return int(row["wrong"] + row["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
