"""What does decoding cost a served pipeline, and what has become faster?

JPEG bytes go into ``<name>_pipeline`` of one server at concurrency 1, 4 and 16, one image a
request: photographs as they come with the package, and made as large as those of a web page and of
a phone. The pipelines take turns, in the other order every other round, and ratios are medians of
the rounds' ratios. Time of processors per image is what the server's processes used meanwhile; it
says what costs on a machine that does other things besides, too.

| pipeline | |
|---|---|
| before | as another checkout writes it (``--before``) |
| after | as this one does |
| sized | with an instance for each core, of one thread each, as ``serve --analyze`` may choose |
| scaled | that, and ``--scaled-decoding`` |

    git worktree add ../before 6a52625
    python -m benchmarks.serving --jpeg --before ../before [--rounds 3] [--seconds 5] [--no-write]
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from tome_export.data import pixels
from tome_export.data.samples import sample_paths
from tome_export.serve.load import Load, measure_load
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.names import IMAGE, PIPELINE, POSTPROCESS, PREPROCESS
from tome_export.serve.server import RunningServer, RunRequest, running

R = 13
CONCURRENCY = (1, 4, 16)
SIZES: Mapping[str, tuple[int, int] | None] = {
    "as they are": None,
    "1280 x 960": (1280, 960),
    "4000 x 3000": (4000, 3000),
}
"""Name -> width and height of the photographs."""

QUALITY = 85
"""Of the JPEG files that are made, as cameras and web pages have it."""

GOAL = 1.3
"""Least ratio of throughput at concurrency 16."""

STAGES = ("server", "preprocess", "decoder", "model", "postprocess")


def photographs(size: tuple[int, int] | None) -> list[NDArray[Any]]:
    """The photographs that come with the package as requests ``[1, 1]`` of JPEG files."""
    files = []
    for path in sample_paths():
        data = path.read_bytes()
        if size is not None:
            stream = io.BytesIO()
            image = Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)
            image.save(stream, "JPEG", quality=QUALITY)
            data = stream.getvalue()
        files.append(np.array([[data]], np.object_))
    return files


def write_pipelines(artifact: Path, repository: Path, before: Path | None) -> list[str]:
    """The pipelines' names in the repository; the first one is what the others are held against."""
    cores = os.cpu_count() or 1
    options = {
        "after": ServeOptions(name="after", preprocess=True),
        "sized": ServeOptions(name="sized", preprocess=True, instances=cores, threads=1),
        "scaled": ServeOptions(
            name="scaled", preprocess=True, instances=cores, threads=1, scaled_decoding=True
        ),
    }
    for one in options.values():
        serve(ServeRequest((artifact,), repository, one))
    if before is None:
        return [*options]
    command = [sys.executable, "-m", "tome_export.cli", "serve", str(artifact)]
    command += ["--repository", str(repository), "--name", "before", "--preprocess"]
    environment = {**os.environ, "PYTHONPATH": str(before.absolute())}
    subprocess.run([*command, "--no-self-test"], env=environment, cwd=before, check=True)
    return ["before", *options]


def cpu_seconds(server: RunningServer, repository: Path, name: str) -> dict[str, float]:
    """Time of processors that one pipeline's processes, and the server's, took so far, by stage."""
    found = dict.fromkeys(STAGES, 0.0)
    stages = {
        name: "model",
        f"{name}{PREPROCESS}": "preprocess",
        f"{name}{POSTPROCESS}": "postprocess",
    }
    root = psutil.Process(server.pid)
    for process in [root, *root.children(recursive=True)]:
        words, times = process.cmdline(), process.cpu_times()
        paths = [Path(word) for word in words if word.startswith(f"{repository}/")]
        models = [path.relative_to(repository).parts[0] for path in paths]
        stage = stages.get(models[0], "") if models else "server" * (process == root)
        if stage == "preprocess" and paths[0].name == Path(pixels.__file__).name:
            stage = "decoder"  # a process that the stub has started
        if stage:
            found[stage] += times.user + times.system
    return found


def server_seconds(server: RunningServer, name: str) -> dict[str, float]:
    """Time that one pipeline's requests have taken so far, by the server's statistics.

    Of ``_preprocess`` these know only how long it takes to take a request: it answers later. Its
    time is what a pipeline takes besides its other models.
    """
    from tritonclient.grpc import InferenceServerClient

    with contextlib.closing(InferenceServerClient(server.grpc)) as client:
        models = client.get_inference_statistics(as_json=True)["model_stats"]
    taken = {
        model["name"]: int(model["inference_stats"]["success"].get("ns", 0)) / 1e9
        for model in models
    }
    parts = {"model": taken[name], "postprocess": taken[f"{name}{POSTPROCESS}"]}
    return {**parts, "pipeline": taken[f"{name}{PIPELINE}"]}


@dataclass(frozen=True)
class Measured:
    """One pipeline under one load.

    Attributes:
        cpu_ms: Time of processors per image by stage.
        preprocess_share: Part of a request's time in the server that is not that of the model or
            the labels: decoding and waiting for it.
    """

    load: Load
    cpu_ms: Mapping[str, float]
    preprocess_share: float


def measured(
    server: RunningServer,
    repository: Path,
    name: str,
    images: Sequence[NDArray[Any]],
    concurrency: int,
    seconds: float,
) -> Measured:
    """Put one pipeline under load."""
    requests = [{IMAGE: image} for image in images]
    # Warm, and so that what is counted before and after is of one load.
    measure_load(server.grpc, f"{name}{PIPELINE}", requests, concurrency, seconds / 4)
    cpu, taken = cpu_seconds(server, repository, name), server_seconds(server, name)
    load = measure_load(server.grpc, f"{name}{PIPELINE}", requests, concurrency, seconds, warmup=0)
    used = {stage: now - cpu[stage] for stage, now in cpu_seconds(server, repository, name).items()}
    parts = {part: now - taken[part] for part, now in server_seconds(server, name).items()}
    return Measured(
        load,
        {stage: value / load.requests * 1e3 for stage, value in used.items()},
        1 - (parts["model"] + parts["postprocess"]) / parts["pipeline"],
    )


Round = Mapping[tuple[str, int, str], Measured]


def rows_of(rounds: Sequence[Round], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each size and concurrency, from each round by size, concurrency and pipeline."""
    rows = []
    for size, concurrency in itertools.product(SIZES, CONCURRENCY):
        found = {name: [one[size, concurrency, name] for one in rounds] for name in names}
        rates = {
            name: np.array([one.load.images_per_second for one in many])
            for name, many in found.items()
        }
        rows.append(
            {
                "photographs": size,
                "concurrency": concurrency,
                "images_per_second": {name: float(np.median(rates[name])) for name in names},
                "ratio": {
                    name: float(np.median(rates[name] / rates[names[0]])) for name in names[1:]
                },
                "latency_ms": {
                    name: {
                        p: float(np.median([one.load.latency_ms[p] for one in many]))
                        for p in ("p50", "p99")
                    }
                    for name, many in found.items()
                },
                "preprocess_share": {
                    name: float(np.median([one.preprocess_share for one in many]))
                    for name, many in found.items()
                },
                "cpu_ms": {
                    name: {s: float(np.median([one.cpu_ms[s] for one in many])) for s in STAGES}
                    for name, many in found.items()
                },
            }
        )
    return rows


def pipeline_rows(
    artifact: Path, repository: Path, before: Path | None, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Write the pipelines, take turns, and make rows of it."""
    names = write_pipelines(artifact, repository, before)
    images = {name: photographs(size) for name, size in SIZES.items()}
    found: list[dict[tuple[str, int, str], Measured]] = []
    with running(RunRequest(repository, gpu=False)) as server:
        for number in range(rounds):
            found.append({})
            for size, concurrency in itertools.product(SIZES, CONCURRENCY):
                # The second of two may meet a warmer machine: which it is changes.
                for name in names[:: -1 if number % 2 else 1]:
                    found[-1][size, concurrency, name] = measured(
                        server, repository, name, images[size], concurrency, seconds
                    )
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        common = {"benchmark": "serving_pipeline", "stand_in": server.stand_in, "r": R}
    common |= {"rounds": rounds, "seconds": seconds, "cores": os.cpu_count()}
    return [common | row for row in rows_of(found, names)]


def show(row: Mapping[str, Any]) -> None:
    """Print one row."""
    print(f"{row['photographs']}, concurrency {row['concurrency']}")
    for name, rate in row["images_per_second"].items():
        latency = "  ".join(f"{p} {ms:7.1f} ms" for p, ms in row["latency_ms"][name].items())
        cpu = "  ".join(f"{stage} {ms:.1f}" for stage, ms in row["cpu_ms"][name].items())
        print(
            f"  {name:7s} {rate:6.1f} images/s ({row['ratio'].get(name, 1):.2f})  {latency}  "
            f"preprocessing {row['preprocess_share'][name]:.0%} of the time; CPU ms: {cpu}"
        )
