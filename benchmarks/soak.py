"""Does a server under load answer every request, and rightly, while new versions are deployed?

Two artifacts of vit_digits with different r go in turn into one repository as versions 1, 2, 3 …,
each with ``tome-export serve --version N`` and the server's own load call, every 5 seconds, while
16 clients ask over gRPC. Each answer is held against ONNX Runtime's logits of the version that was
the newest when the request was sent, or of one whose deployment was under way until the answer
came: an old version that still answers is wrong too. Requests go on until there have been as many
as asked for and at least 3 deployments.

    python -m benchmarks.soak [--requests 10000] [--concurrency 16] [--every 5] [--no-write]

Exit code 1 if an answer was wrong, a request lost or a deployment failed.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import write_rows
from tome_export.errors import TomeExportError
from tome_export.merge.schedule import Schedule
from tome_export.models import resolve
from tome_export.models.samples import sample_pixels
from tome_export.pipeline import BuildRequest, build
from tome_export.pipeline.serve import ServeOptions, ServeRequest, serve
from tome_export.serve.client import connect
from tome_export.serve.config import CPU
from tome_export.serve.server import RunningServer, start
from tome_export.spec import BatchRange

MODEL, RS = "vit_digits", (8, 4)
IMAGES = 64
LEAST_DEPLOYMENTS = 3

TOLERANCE = 1e-5
"""Of a logit, as a share of the image's largest: the server's batches are not those of the
expected logits, and sums of other batches may round otherwise."""


class Deployments:
    """Versions 1, 2, 3 … of a model, alternately of the given artifacts.

    Attributes:
        started: Version that is being deployed, or was last.
        finished: Newest version that is deployed.
    """

    def __init__(self, repository: Path, artifacts: Sequence[Path], name: str) -> None:
        self.started = self.finished = 0
        self._repository, self._artifacts, self._name = repository, artifacts, name

    def deploy(self, load: Callable[[], object]) -> None:
        """Write the next version and have the server load it."""
        version = self.started + 1
        options = ServeOptions(name=self._name, version=version)
        serve(ServeRequest((self._artifacts[self.source(version)],), self._repository, options))
        # From here on the server may find it, though it has not been told.
        self.started = version
        load()
        self.finished = version

    def source(self, version: int) -> int:
        """Which artifact a version is of."""
        return (version - 1) % len(self._artifacts)


@dataclass
class Tally:
    """What one client has seen."""

    asked: int = 0
    seconds: list[float] = field(default_factory=list)
    sources: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    largest_error: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def count(
        self, logits: NDArray[Any], expected: NDArray[Any], allowed: set[int], seconds: float
    ) -> None:
        """Count an answer.

        Args:
            logits: ``[classes]``.
            expected: ``[artifacts, classes]`` of the same image.
            allowed: The artifacts that it may come from.
            seconds: From the request to the answer.
        """
        scale = np.abs(expected).max(1)
        errors = (np.abs(expected - logits).max(1) / scale)[sorted(allowed)]
        best = int(np.argmin(errors))
        self.seconds.append(seconds)
        if not errors[best] <= TOLERANCE:  # NaN is wrong
            self.wrong += 1
            self.reasons[f"off by {errors[best]:.1e} of the largest logit"] += 1
            return
        self.sources[sorted(allowed)[best]] += 1
        self.largest_error = max(self.largest_error, float(errors[best]))


def soak(
    server: RunningServer,
    deployments: Deployments,
    model: str,
    images: NDArray[np.float32],
    expected: NDArray[np.float32],
    *,
    requests: int,
    concurrency: int,
    every_seconds: float,
) -> dict[str, Any]:
    """Ask while versions are deployed.

    Args:
        server: Under explicit model control, with the first version loaded.
        deployments: What is deployed on it.
        model: Name on the server.
        images: ``pixel_values [images, C, H, W]``, asked for in turn, one a request.
        expected: ``logits [artifacts, images, classes]``.
        requests: Least number of requests.
        concurrency: Clients, each with one request at a time and a connection of its own.
        every_seconds: From one deployment to the next.

    Returns:
        A row of results.
    """
    import tritonclient.grpc as grpc

    numbers, done = itertools.count(), threading.Event()

    def ask(tally: Tally) -> None:
        with connect(server.grpc) as client:
            while not done.is_set():
                tally.asked += 1
                image = next(numbers) % len(images)
                first, began = deployments.finished, time.perf_counter()
                try:
                    answer = client.infer(model, {"pixel_values": images[image : image + 1]})
                except TomeExportError as error:
                    tally.lost += 1
                    tally.reasons[str(error)] += 1
                    continue
                seconds = time.perf_counter() - began
                allowed = {deployments.source(v) for v in range(first, deployments.started + 1)}
                tally.count(answer["logits"][0], expected[:, image], allowed, seconds)

    tallies = [Tally() for _ in range(concurrency)]
    threads = [threading.Thread(target=ask, args=(tally,)) for tally in tallies]
    attempts = failed = 0
    deploy_seconds = []
    control = grpc.InferenceServerClient(server.grpc)
    began = time.perf_counter()
    try:
        for thread in threads:
            thread.start()
        while sum(t.asked for t in tallies) < requests or attempts < LEAST_DEPLOYMENTS:
            if time.perf_counter() - began >= every_seconds * (attempts + 1):
                attempts += 1
                deployed = time.perf_counter()
                try:
                    deployments.deploy(lambda: control.load_model(model))
                    deploy_seconds.append(time.perf_counter() - deployed)
                except grpc.InferenceServerException as error:
                    failed += 1
                    print(f"deployment failed: {error}", file=sys.stderr)
            if not any(thread.is_alive() for thread in threads):
                break
            time.sleep(0.01)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        duration = time.perf_counter() - began
        control.close()
    latency_ms = np.concatenate([tally.seconds for tally in tallies]) * 1e3
    asked = sum(tally.asked for tally in tallies)
    sources = sum((tally.sources for tally in tallies), Counter())
    reasons = sum((tally.reasons for tally in tallies), Counter())
    for reason, count in reasons.most_common(5):
        print(f"{count} x {reason}", file=sys.stderr)
    return {
        "benchmark": "serving_soak",
        "stand_in": server.stand_in,
        "requests": asked,
        "concurrency": concurrency,
        "wrong": sum(tally.wrong for tally in tallies),
        "lost": asked - len(latency_ms),
        "reloads": attempts - failed,
        "failed_reloads": failed,
        "reload_every_seconds": every_seconds,
        "longest_reload_seconds": max(deploy_seconds, default=0.0),
        "answers_by_artifact": [sources[i] for i in range(len(expected))],
        "largest_relative_error": max(tally.largest_error for tally in tallies),
        "duration_seconds": duration,
        "requests_per_second": len(latency_ms) / duration,
        "latency_ms": {f"p{p}": float(np.percentile(latency_ms, p)) for p in (50, 95, 99, 100)}
        if len(latency_ms)
        else {},
    }


def expected_logits(artifacts: Sequence[Path], images: NDArray[np.float32]) -> NDArray[np.float32]:
    """ONNX Runtime's own ``[artifacts, images, classes]``, one image at a time.

    Raises:
        ValueError: if two artifacts agree on an image, so that an answer could not be told apart.
    """
    import onnxruntime

    expected = []
    for artifact in artifacts:
        session = onnxruntime.InferenceSession(
            artifact / "model.onnx", providers=["CPUExecutionProvider"]
        )
        rows = [session.run(["logits"], {"pixel_values": image[None]})[0] for image in images]
        expected.append(np.concatenate(rows))
    logits = np.stack(expected)
    for one, other in itertools.combinations(logits, 2):
        apart = (np.abs(one - other).max(1) / np.abs(one).max(1)).min()
        if apart < 10 * TOLERANCE:
            raise ValueError(f"two artifacts agree on an image within {apart:.1e}; take other r")
    return logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between deployments")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    images = sample_pixels(resolve(MODEL), IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        artifacts = [Path(folder, f"r{r}") for r in RS]
        for r, path in zip(RS, artifacts, strict=True):
            build(
                BuildRequest(MODEL, path, Schedule.of(r), engine="none", batch=BatchRange(1, 8, 16))
            )
        expected = expected_logits(artifacts, images)
        repository = Path(folder, "repository")
        deployments = Deployments(repository, artifacts, MODEL)
        deployments.deploy(lambda: None)
        load = os.getloadavg()[0]
        with start(repository, config_name=CPU, control="explicit", load=[MODEL]) as server:
            row = soak(
                server,
                deployments,
                MODEL,
                images,
                expected,
                requests=arguments.requests,
                concurrency=arguments.concurrency,
                every_seconds=arguments.every,
            )
    row |= {"model": MODEL, "r": list(RS), "load_average_before": load}
    show(row)
    if not arguments.no_write:
        print(write_rows("serving_soak", [row]))
    return int(row["wrong"] + row["lost"] + row["failed_reloads"] > 0)


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['requests']} requests at concurrency {row['concurrency']} in "
        f"{row['duration_seconds']:.1f} s ({row['requests_per_second']:.0f}/s), "
        f"{row['reloads']} reloads (the longest {row['longest_reload_seconds']:.1f} s): "
        f"{row['wrong']} wrong, {row['lost']} lost"
    )
    latency = "  ".join(f"{name} {ms:.1f} ms" for name, ms in row["latency_ms"].items())
    by = ", ".join(map(str, row["answers_by_artifact"]))
    print(f"  {latency}  largest relative error {row['largest_relative_error']:.1e}")
    print(f"  answers by artifact: {by}{'  (stand-in backend)' * row['stand_in']}")


if __name__ == "__main__":
    sys.exit(main())
