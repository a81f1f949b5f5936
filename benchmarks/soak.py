"""Does a server under load answer every request, and rightly, whatever happens beside it?

Two artifacts of vit_digits with different r go in turn into one repository as versions 1, 2, 3 …,
each with ``tome-export serve --preprocess --version N`` and the server's own load calls, every 5
seconds, while 16 clients ask its pipeline about PNG files over gRPC. Each answer is held against
what Pillow, NumPy and ONNX Runtime make of the file with the version that was the newest when the
request was sent, or with one whose deployment was under way until the answer came: an old version
that still answers is wrong too. Requests go on until there have been as many as asked for and at
least 3 deployments.

That is done twice: by itself, and with two clients that send garbage (``benchmarks/garbage.py``)
over HTTP and gRPC, and one process of a python model killed in the middle. What is lost between
that and the end of the restart that follows is counted apart.

    python -m benchmarks.soak [--requests 10000] [--concurrency 16] [--every 5] [--no-write]

Exit code 1 if an answer was wrong, a request lost, a deployment failed, garbage was answered as if
it were right, or the 99th percentile of the latencies is above 5 times what it is without garbage.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
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
from PIL import Image

from benchmarks.harness import write_rows
from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.data.preprocess import load_images
from tome_export.data.scores import TOP_K
from tome_export.errors import TomeExportError
from tome_export.merge.schedule import Schedule
from tome_export.models.facts import DATA
from tome_export.serve.client import Client, connect
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.names import PIPELINE
from tome_export.serve.probe import stub_states
from tome_export.serve.server import RunningServer, RunRequest, running
from tome_export.spec import BatchRange

MODEL, RS = "vit_digits", (8, 4)
IMAGES = 64
LEAST_DEPLOYMENTS = 3

TOLERANCE = 1e-5
"""How far a score may be off: the server's batches are not those of the expected scores, and sums
of other batches may round otherwise."""

MOST_SLOWER = 5.0
"""Goal: most that the 99th percentile may grow with garbage."""

SETTLED_SECONDS = 1.0
"""After a restart, until every client has found the server again."""


class Deployments:
    """Versions 1, 2, 3 … of a model, alternately of the given artifacts.

    Attributes:
        started: Version that is being deployed, or was last.
        finished: Newest version that is deployed.
    """

    def __init__(self, repository: Path, artifacts: Sequence[Path], name: str) -> None:
        self.started = self.finished = 0
        self._repository, self._artifacts, self._name = repository, artifacts, name

    def deploy(self, load: Callable[[str], object]) -> None:
        """Write the next version and have the server load each of its models."""
        version = self.started + 1
        options = ServeOptions(name=self._name, version=version, preprocess=True)
        artifact = self._artifacts[self.source(version)]
        done = serve(ServeRequest((artifact,), self._repository, options))
        # From here on the server may find it, though it has not been told.
        self.started = version
        for model in done.models:
            load(model.name)
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
    lost: list[tuple[float, float]] = field(default_factory=list)  # from when to when
    largest_error: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def count(
        self, scores: NDArray[Any], expected: NDArray[Any], allowed: set[int], seconds: float
    ) -> None:
        """Count an answer.

        Args:
            scores: ``[classes]``, 0 where the class is none of the best.
            expected: ``[artifacts, classes]`` of the same image.
            allowed: The artifacts that it may come from.
            seconds: From the request to the answer.
        """
        errors = np.abs(expected - scores).max(1)[sorted(allowed)]
        best = int(np.argmin(errors))
        self.seconds.append(seconds)
        if not errors[best] <= TOLERANCE:  # NaN is wrong
            self.wrong += 1
            self.reasons[f"off by {errors[best]:.1e}"] += 1
            return
        self.sources[sorted(allowed)[best]] += 1
        self.largest_error = max(self.largest_error, float(errors[best]))


class Garbage:
    """Two processes that send garbage to a server, until the block ends.

    Attributes:
        sent: Requests by protocol and kind, after the block.
        answered: Of these, such as were answered as if they were right.
    """

    def __init__(self, server: RunningServer, model: str, shape: Sequence[int]) -> None:
        command: list[str] = [sys.executable, "-m", "benchmarks.garbage"]
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._clients = {
            protocol: subprocess.Popen(
                [*command, protocol, getattr(server, protocol), model, f"{model}{PIPELINE}"],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for protocol in ("http", "grpc")
        }
        for client in self._clients.values():
            print(json.dumps([*shape]), file=client.stdin, flush=True)

    def __enter__(self) -> Garbage:
        return self

    def __exit__(self, *_given: object) -> None:
        for protocol, client in self._clients.items():
            out, _ = client.communicate(timeout=150)
            counts = json.loads(out)
            for name, counter in (("sent", self.sent), ("answered", self.answered)):
                counter.update({f"{protocol} {kind}": n for kind, n in counts[name].items()})


def kill_a_stub(server: RunningServer, model: str) -> None:
    """SIGKILL for a process of a python model."""
    for pid in stub_states(server.pid):
        if f"/{model}/" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
            os.kill(pid, signal.SIGKILL)
            return
    raise ValueError(f"no process of {model}")


def soak(
    server: RunningServer,
    deployments: Deployments,
    model: str,
    files: Sequence[bytes],
    expected: NDArray[np.float64],
    *,
    requests: int,
    concurrency: int,
    every_seconds: float,
    kill: str | None = None,
) -> dict[str, Any]:
    """Ask while versions are deployed.

    Args:
        server: Under explicit model control, with the first version loaded.
        deployments: What is deployed on it.
        model: Name on the server; its pipeline is asked.
        files: Images, asked for in turn, one a request.
        expected: Scores ``[artifacts, images, classes]``, 0 where the class is none of the best.
        requests: Least number of requests.
        concurrency: Clients, each with one request at a time and a connection of its own.
        every_seconds: From one deployment to the next.
        kill: Model whose process is killed when half of the requests have been sent.

    Returns:
        A row of results.
    """
    import tritonclient.grpc as grpc

    numbers, done = itertools.count(), threading.Event()
    images = [np.array([[data]], np.object_) for data in files]

    def ask(tally: Tally) -> None:
        while not done.is_set():
            # After a failure by a new connection: the old one would wait before it tries again.
            with contextlib.suppress(TomeExportError), connect(server.grpc) as client:
                ask_with(client, tally)
            time.sleep(0.05)

    def ask_with(client: Client, tally: Tally) -> None:
        while not done.is_set():
            tally.asked += 1
            image = next(numbers) % len(images)
            first, began = deployments.finished, time.perf_counter()
            try:
                answer = client.infer(f"{model}{PIPELINE}", {"image": images[image]})
            except TomeExportError as error:
                tally.lost.append((began, time.perf_counter()))
                tally.reasons[str(error)] += 1
                return
            seconds = time.perf_counter() - began
            allowed = {deployments.source(v) for v in range(first, deployments.started + 1)}
            scores = np.zeros(expected.shape[-1])
            scores[answer["index"][0]] = answer["score"][0]
            tally.count(scores, expected[:, image], allowed, seconds)

    tallies = [Tally() for _ in range(concurrency)]
    threads = [threading.Thread(target=ask, args=(tally,)) for tally in tallies]
    attempts = failed = restarts = 0
    deploy_seconds: list[float] = []
    outage = (0.0, 0.0)
    began = time.perf_counter()

    def load(name: str) -> None:
        with grpc.InferenceServerClient(server.grpc) as control:
            control.load_model(name)

    try:
        for thread in threads:
            thread.start()
        while (asked := sum(t.asked for t in tallies)) < requests or attempts < LEAST_DEPLOYMENTS:
            if kill is not None and 2 * asked >= requests:
                outage = (time.perf_counter(), 0.0)
                kill_a_stub(server, kill)
                while not server.restart_if_broken(lambda line: print(line, file=sys.stderr)):
                    time.sleep(0.01)
                outage = (outage[0], time.perf_counter())
                kill, restarts = None, restarts + 1
            if time.perf_counter() - began >= every_seconds * (attempts + 1):
                attempts += 1
                deployed = time.perf_counter()
                try:
                    deployments.deploy(load)
                    deploy_seconds.append(time.perf_counter() - deployed)
                except grpc.InferenceServerException as error:
                    failed += 1
                    print(f"deployment failed: {error}", file=sys.stderr)
                    if not server.is_alive():
                        break
            time.sleep(0.01)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        duration = time.perf_counter() - began
    latency_ms = np.concatenate([tally.seconds for tally in tallies]) * 1e3
    lost = [times for tally in tallies for times in tally.lost]
    during = [
        times
        for times in lost
        if times[1] >= outage[0] and times[0] <= outage[1] + SETTLED_SECONDS * restarts
    ]
    sources = sum((tally.sources for tally in tallies), Counter())
    reasons = sum((tally.reasons for tally in tallies), Counter())
    for reason, count in reasons.most_common(5):
        print(f"{count} x {reason}", file=sys.stderr)
    return {
        "benchmark": "serving_soak",
        "stand_in": server.stand_in,
        "requests": sum(tally.asked for tally in tallies),
        "concurrency": concurrency,
        "wrong": sum(tally.wrong for tally in tallies),
        "lost": len(lost) - len(during) * (restarts > 0),
        "lost_during_restarts": len(during) * (restarts > 0),
        "restarts": restarts,
        "restart_seconds": outage[1] - outage[0],
        "reloads": attempts - failed,
        "failed_reloads": failed,
        "reload_every_seconds": every_seconds,
        "longest_reload_seconds": max(deploy_seconds, default=0.0),
        "answers_by_artifact": [sources[i] for i in range(len(expected))],
        "largest_error": max(tally.largest_error for tally in tallies),
        "duration_seconds": duration,
        "requests_per_second": len(latency_ms) / duration,
        "latency_ms": {f"p{p}": float(np.percentile(latency_ms, p)) for p in (50, 95, 99, 100)}
        if len(latency_ms)
        else {},
    }


def expected_scores(artifacts: Sequence[Path], files: Sequence[Path]) -> NDArray[np.float64]:
    """Scores of the best classes ``[artifacts, images, classes]`` of images, 0 for others."""
    import onnxruntime

    found = []
    for path in artifacts:
        artifact = Artifact.open(path)
        pixels = load_images(files, artifact.manifest.preprocessing)
        session = onnxruntime.InferenceSession(
            artifact.model_path, providers=["CPUExecutionProvider"]
        )
        rows = [session.run(["logits"], {"pixel_values": image[None]})[0] for image in pixels]
        logits = np.concatenate(rows).astype(np.float64)
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        least = np.sort(scores, axis=1)[:, -TOP_K:][:, :1]
        found.append(np.where(scores >= least, scores, 0.0))
    return np.stack(found)


def told_apart(expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Images ``[images]`` whose answer says which artifact it is of."""
    pairs = itertools.combinations(expected, 2)
    apart = [np.abs(one - other).max(1) >= 10 * TOLERANCE for one, other in pairs]
    together: NDArray[np.bool_] = np.all(apart, axis=0)
    return together


def write_digits(folder: Path) -> list[Path]:
    """The test digits as PNG files."""
    with np.load(DATA / "digits_test.npz") as data:
        digits = data["images"]
    for index, digit in enumerate(digits):
        Image.fromarray(digit).save(folder / f"{index:05}.png")
    return sorted(folder.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between deployments")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifacts = [Path(folder, f"r{r}") for r in RS]
        for r, path in zip(RS, artifacts, strict=True):
            build(
                BuildRequest(MODEL, path, Schedule.of(r), engine="none", batch=BatchRange(1, 8, 16))
            )
        images = Path(folder, "images")
        images.mkdir()
        paths = write_digits(images)
        expected = expected_scores(artifacts, paths)
        chosen = np.flatnonzero(told_apart(expected))[:IMAGES]
        files, expected = [paths[i].read_bytes() for i in chosen], expected[:, chosen]
        shape = Artifact.open(artifacts[0]).manifest.preprocessing.input_size
        load = os.getloadavg()[0]
        rows = []
        for garbage in (False, True):
            repository = Path(folder, f"repository{garbage:d}")
            deployments = Deployments(repository, artifacts, MODEL)
            deployments.deploy(lambda _: None)
            models = sorted(path.name for path in repository.iterdir())
            with (
                running(
                    RunRequest(repository, gpu=False, control="explicit", load=models)
                ) as server,
                contextlib.ExitStack() as stack,
            ):
                beside = stack.enter_context(Garbage(server, MODEL, shape)) if garbage else None
                row = soak(
                    server,
                    deployments,
                    MODEL,
                    files,
                    expected,
                    requests=arguments.requests,
                    concurrency=arguments.concurrency,
                    every_seconds=arguments.every,
                    kill=f"{MODEL}_postprocess" if garbage else None,
                )
                stack.close()
            row |= {"model": MODEL, "r": list(RS), "load_average_before": load}
            if beside is not None:
                row["garbage"] = beside.sent.total()
                row["garbage_kinds"] = len(beside.sent)
                row["garbage_answered"] = dict(beside.answered)
            rows.append(row)
            show(row)
    slower = rows[1]["latency_ms"]["p99"] / rows[0]["latency_ms"]["p99"]
    rows[1]["p99_over_that_without_garbage"] = slower
    print(f"p99 with garbage over that without: {slower:.2f} (goal: at most {MOST_SLOWER:g})")
    if not arguments.no_write:
        print(write_rows("serving_soak", rows))
    failures = sum(row["wrong"] + row["lost"] + row["failed_reloads"] for row in rows)
    return int(failures > 0 or slower > MOST_SLOWER or bool(rows[1]["garbage_answered"]))


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['requests']} requests at concurrency {row['concurrency']} in "
        f"{row['duration_seconds']:.1f} s ({row['requests_per_second']:.0f}/s), "
        f"{row['reloads']} reloads (the longest {row['longest_reload_seconds']:.1f} s): "
        f"{row['wrong']} wrong, {row['lost']} lost"
    )
    if "garbage" in row:
        print(
            f"  beside {row['garbage']} requests of {row['garbage_kinds']} kinds of garbage "
            f"(answered: {row['garbage_answered'] or 'none'}), and {row['restarts']} restart of "
            f"{row['restart_seconds']:.1f} s: {row['lost_during_restarts']} lost during that"
        )
    latency = "  ".join(f"{name} {ms:.1f} ms" for name, ms in row["latency_ms"].items())
    by = ", ".join(map(str, row["answers_by_artifact"]))
    print(f"  {latency}  largest error of a score {row['largest_error']:.1e}")
    print(f"  answers by artifact: {by}{'  (stand-in backend)' * row['stand_in']}")


if __name__ == "__main__":
    sys.exit(main())
