"""How much of the speed-up that ONNX Runtime shows is left when the models are served?

One server, the merged model and the unmerged one beside each other, as ``tome-export serve``
writes them, under the load of perf_analyzer at concurrency 1, 4 and 16, one image a request. In
the same rounds ONNX Runtime alone runs both models on batches of 1, 4 and 8, with the threads that
the server's sessions have (its default: the cores). Served and alone take turns, merged and
unmerged too; ratios are medians of the rounds' ratios. A concurrency is held against the batch that
the server makes of it: 1, 4, and 8, the largest.

    python -m benchmarks.serving --perf-analyzer TOOLS [--rounds 5] [--seconds 9] [--no-write]

What TOOLS is and how to get it: ``benchmarks/perf_analyzer.py``. With ``--jpeg`` what is served is
the pipeline from JPEG bytes: ``benchmarks/serving_pipeline.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import serving_pipeline
from benchmarks.harness import write_rows
from benchmarks.perf_analyzer import Load, PerfAnalyzer
from tome_export.build import BuildRequest, build
from tome_export.data.samples import sample_pixels
from tome_export.errors import TomeExportError
from tome_export.merge.schedule import Schedule
from tome_export.models import resolve
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.server import RunningServer, RunRequest, running
from tome_export.spec import BatchRange

MODEL, R = "timm:vit_small_patch16_224", 16
KINDS = {"merged": R, "unmerged": 0}
BATCH_OF = {1: 1, 4: 4, 16: 8}
"""Concurrency -> batch of ONNX Runtime alone."""

GOAL = 0.85
"""Least share of ONNX Runtime's own speed-up that is to be left."""


class Alone:
    """ONNX Runtime on the same files, without a server."""

    def __init__(self, artifacts: Mapping[str, Path], images: NDArray[np.float32]) -> None:
        import onnxruntime

        self._images = images
        self._sessions = {
            kind: onnxruntime.InferenceSession(
                path / "model.onnx", providers=["CPUExecutionProvider"]
            )
            for kind, path in artifacts.items()
        }

    def images_per_second(self, kind: str, batch: int, seconds: float) -> float:
        """Over at least ``seconds`` of runs, after one that does not count."""
        feeds = {"pixel_values": self._images[:batch]}
        self._sessions[kind].run(["logits"], feeds)
        began, runs = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            self._sessions[kind].run(["logits"], feeds)
            runs += 1
        return runs * batch / (time.perf_counter() - began)


def rows_of(
    served: Sequence[Mapping[tuple[int, str], Load]],
    alone: Sequence[Mapping[tuple[int, str], float]],
) -> list[dict[str, Any]]:
    """A row for each concurrency.

    Args:
        served: Of each round, by concurrency and kind.
        alone: Of each round, by batch and kind, in images per second.
    """
    rows = []
    for concurrency, batch in BATCH_OF.items():
        loads = {kind: [one[concurrency, kind] for one in served] for kind in KINDS}
        own = {kind: np.array([one[batch, kind] for one in alone]) for kind in KINDS}
        rates = {k: np.array([load.images_per_second for load in v]) for k, v in loads.items()}
        speedup = float(np.median(rates["merged"] / rates["unmerged"]))
        speedup_alone = float(np.median(own["merged"] / own["unmerged"]))
        rows.append(
            {
                "concurrency": concurrency,
                "images_per_second": {k: float(np.median(v)) for k, v in rates.items()},
                "latency_ms": {
                    kind: {
                        p: float(np.median([load.latency_ms[p] for load in v]))
                        for p in ("p50", "p95", "p99")
                    }
                    for kind, v in loads.items()
                },
                "queue_ms": {
                    k: float(np.median([load.queue_ms for load in v])) for k, v in loads.items()
                },
                "alone_batch": batch,
                "alone_images_per_second": {k: float(np.median(v)) for k, v in own.items()},
                "speedup": speedup,
                "speedup_alone": speedup_alone,
                "share_of_speedup_alone": speedup / speedup_alone,
                "served_over_alone": {k: float(np.median(rates[k] / own[k])) for k in KINDS},
            }
        )
    return rows


def measure(
    server: RunningServer,
    tool: PerfAnalyzer,
    alone: Alone,
    images: Any,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Take turns, and make rows of it."""
    served: list[dict[tuple[int, str], Load]] = []
    by_itself: list[dict[tuple[int, str], float]] = []
    for number in range(rounds):
        served.append({})
        by_itself.append({})
        # The second of two may meet a warmer machine: which it is changes from round to round.
        kinds = [*KINDS][:: -1 if number % 2 else 1]
        for concurrency, batch in BATCH_OF.items():
            for kind in kinds:
                served[-1][concurrency, kind] = tool.measure(
                    server.grpc, kind, concurrency, images, seconds
                )
            for kind in kinds:
                by_itself[-1][batch, kind] = alone.images_per_second(kind, batch, seconds / 2)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return rows_of(served, by_itself)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--perf-analyzer", type=Path, metavar="TOOLS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=9.0, help="of one measurement")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--jpeg", action="store_true", help="measure the pipeline from JPEG bytes")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="to compare --jpeg with")
    arguments = parser.parse_args()
    if arguments.jpeg:
        return main_of_pipelines(arguments)
    images = sample_pixels(resolve(arguments.model), max(BATCH_OF.values()))
    with ExitStack() as stack:
        folder, tools = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in "12")
        try:
            tool = PerfAnalyzer(arguments.perf_analyzer, tools)
        except TomeExportError as error:
            print(f"Error: {error}", file=sys.stderr)
            return error.exit_code
        artifacts = {kind: folder / kind for kind in KINDS}
        for kind, r in KINDS.items():
            request = BuildRequest(
                arguments.model,
                artifacts[kind],
                Schedule.of(r),
                weights="random",
                engine="none",
                batch=BatchRange(1, 4, max(BATCH_OF.values())),
                check=False,
            )
            build(request)
        for kind, path in artifacts.items():
            serve(ServeRequest((path,), folder / "repository", ServeOptions(name=kind)))
        load = os.getloadavg()[0]
        alone = Alone(artifacts, images)
        server = stack.enter_context(running(RunRequest(folder / "repository", gpu=False)))
        rows = measure(server, tool, alone, images, arguments.rounds, arguments.seconds)
        common = {
            "benchmark": "serving",
            "stand_in": server.stand_in,
            "model": arguments.model,
            "r": R,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "tritonclient": version("tritonclient"),
            "load_average_before": load,
        }
    rows = [common | row for row in rows]
    for row in rows:
        show(row)
    if not arguments.no_write:
        print(write_rows("serving", rows))
    return 0


def main_of_pipelines(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        artifact, repository = Path(folder) / "artifact", Path(folder) / "repository"
        request = BuildRequest(
            arguments.model,
            artifact,
            Schedule.of(serving_pipeline.R),
            weights="random",
            engine="none",
            batch=BatchRange(1, 4, max(BATCH_OF.values())),
            check=False,
        )
        build(request)
        load = os.getloadavg()[0]
        rows = serving_pipeline.pipeline_rows(
            artifact, repository, arguments.before, arguments.rounds, arguments.seconds
        )
    rows = [{"model": arguments.model, "load_average_before": load, **row} for row in rows]
    for row in rows:
        serving_pipeline.show(row)
    if not arguments.no_write:
        print(write_rows("serving_pipeline", rows))
    return 0


def show(row: Mapping[str, Any]) -> None:
    label = " (stand-in backend)" * row["stand_in"]
    print(f"{row['model']} r={row['r']}, concurrency {row['concurrency']}{label}")
    for kind in KINDS:
        latency = "  ".join(f"{name} {ms:7.1f} ms" for name, ms in row["latency_ms"][kind].items())
        print(
            f"  {kind:9s} {row['images_per_second'][kind]:6.1f} images/s  {latency}  "
            f"(ONNX Runtime alone, batch {row['alone_batch']}: "
            f"{row['alone_images_per_second'][kind]:6.1f})"
        )
    print(
        f"  merged over unmerged: served {row['speedup']:.2f}, alone {row['speedup_alone']:.2f}: "
        f"{row['share_of_speedup_alone']:.2f} is left (goal {GOAL})"
    )


if __name__ == "__main__":
    sys.exit(main())
