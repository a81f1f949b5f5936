"""``tome-export serve --analyze``: how many instances and how long a queue delay, by measurement.

Each setting of a small grid is served on this machine and put under growing load, until the 99th
percentile of the latencies exceeds what is allowed or more load gives no more answers. Taken is the
setting that answers the most images per second within the limit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.data.samples import sample_paths
from tome_export.engine.gpu import detect
from tome_export.errors import InputError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.serve.client import connect
from tome_export.serve.load import Analysis, Load, Setting, SettingResult, measure_load
from tome_export.serve.main import ServeRequest, ServeResult, planned, serve
from tome_export.serve.names import IMAGE
from tome_export.serve.repository import config_of
from tome_export.serve.self_test import READY_SECONDS, sample_request
from tome_export.serve.server import RunRequest, running

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUEUE_DELAYS_US = (0, 2000, 10_000)
GPU_INSTANCES = (1, 2, 3)
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)

GROWS, STALLED = 1.05, 2
"""Loads in a row that give less than that many times the most throughput before end it: one may be
a machine's moment of other work."""

SECONDS = 3.0
"""Length of one measurement."""

BUSY = 0.8
"""Part of a core that the load takes itself, from which on it may be what limits."""


def serve_analyzed(
    request: ServeRequest,
    p99_ms: float,
    progress: Progress | None = None,
    *,
    seconds: float = SECONDS,
    settings: Sequence[Setting] | None = None,
) -> ServeResult:
    """Measure settings on a server of this machine, and ``serve`` with the best of them.

    Args:
        request: What to serve; its instances, threads and queue delay are what is looked for.
        p99_ms: Longest 99th percentile of the latencies that is allowed.
        progress: Told of each setting.
        seconds: Length of one measurement.
        settings: Those to measure; None for the grid of this machine.

    Raises:
        UsageError: if the limit is no number above 0.
        InputError: if no setting keeps to it; nothing is written then. And as ``serve`` does.
        MissingComponentError: if there is no server on this machine.
    """
    if not 0 < p99_ms < np.inf:
        raise UsageError(f"p99 is {p99_ms:g} ms; expected a number above 0")
    progress = progress or Silent()
    planned(request)  # before minutes of measurements, what the repository would refuse after them
    with tempfile.TemporaryDirectory(prefix="tome-export-analyze-") as folder:
        tried = replace(
            request, repository=Path(folder) / "repository", self_test=False, kserve=None
        )
        written = serve(tried)
        if settings is None:
            settings = settings_of_this_machine(tried.repository, written)
        results = []
        for number, setting in enumerate(settings, 1):
            progress.stage(f"Measure setting {number} of {len(settings)}: {_words(setting)}")
            options = replace(request.options, **asdict(setting))
            serve(replace(tried, options=options, force=True))
            results.append(_measure(tried.repository, written.entry, setting, p99_ms, seconds))
    fitting = [one for one in results if one.fits]
    if not fitting:
        least = min(results, key=lambda one: one.load.latency_ms["p99"])
        raise InputError(
            f"no setting keeps the 99th percentile at {p99_ms:g} ms on this machine: the least is "
            f"{least.load.latency_ms['p99']:.1f} ms, of one request at a time with "
            f"{_words(least.setting)}; nothing was written, allow more or merge more tokens (r)"
        )
    best = max(fitting, key=lambda one: one.load.images_per_second)
    notes = []
    if best.load.client_share > BUSY:
        notes.append(
            f"the load took {best.load.client_share:.0%} of a core itself and may be what limits; "
            "measure with perf_analyzer from another machine"
        )
    analysis = Analysis(written.entry, p99_ms, tuple(results), best.setting, tuple(notes))
    done = serve(
        replace(request, options=replace(request.options, **asdict(best.setting))), progress
    )
    return replace(done, analysis=analysis)


def _words(setting: Setting) -> str:
    threads = ""
    if setting.threads is not None:
        threads = f" of {setting.threads} thread{'s' * (setting.threads > 1)}"
    return (
        f"{setting.instances} instance{'s' * (setting.instances > 1)}{threads}, queue delay "
        f"{setting.max_queue_delay_us} us"
    )


def settings_of_this_machine(repository: Path, written: ServeResult) -> list[Setting]:
    """Instances that share the cores of a CPU, or a GPU, each with some queue delays."""
    configs = [config_of(repository / model.name) for model in written.models]
    # The model itself is the one of no ensemble and no Python.
    files = [one for one in configs if one.platform in ("onnxruntime_onnx", "tensorrt_plan")]
    batches = max(one.max_batch_size for one in configs) > 1
    delays = QUEUE_DELAYS_US if batches else QUEUE_DELAYS_US[:1]
    cores = len(os.sched_getaffinity(0))
    shares: list[tuple[int, int | None]] = [(1, None)]
    if detect().gpus:
        shares = [(instances, None) for instances in GPU_INSTANCES]
    elif all(one.platform == "onnxruntime_onnx" for one in files):
        instances = 2
        while instances <= cores:
            shares.append((instances, cores // instances))
            instances *= 2
    return [Setting(*share, delay) for share in shares for delay in delays]


def _measure(
    repository: Path, model: str, setting: Setting, p99_ms: float, seconds: float
) -> SettingResult:
    with (
        running(RunRequest(repository, ready_seconds=READY_SECONDS)) as server,
        connect(server.grpc, "grpc") as client,
    ):
        requests = _requests(repository, model)
        client.infer(model, requests[0])  # the first one is slower, and says what is wrong
        result = _most_within(
            lambda concurrency: measure_load(server.grpc, model, requests, concurrency, seconds),
            p99_ms,
        )
        server.stop(0)
    return SettingResult(setting, *result)


def _most_within(measure: Callable[[int], Load], p99_ms: float) -> tuple[Load, bool]:
    """The load of the most answers within the limit, and whether there is one."""
    best: Load | None = None
    stalled = 0
    for concurrency in CONCURRENCY:
        load = measure(concurrency)
        if load.latency_ms["p99"] > p99_ms:
            return (load, False) if best is None else (best, True)
        grows = best is None or load.images_per_second > GROWS * best.images_per_second
        stalled = 0 if grows else stalled + 1
        if best is None or load.images_per_second > best.images_per_second:
            best = load
        if stalled == STALLED:
            break
    assert best is not None  # noqa: S101 (the first load has fitted)
    return best, True


def _requests(repository: Path, model: str) -> list[Mapping[str, NDArray[Any]]]:
    """What a model takes: photographs where it takes images, else zeros (see ``self_test``)."""
    from tome_export.serve.config import ModelFolder

    folders = [
        ModelFolder(path.parent.name, config_of(path.parent))
        for path in repository.glob("*/config.pbtxt")
    ]
    (config,) = (folder.config for folder in folders if folder.name == model)
    request = sample_request(folders, config)
    if IMAGE not in request:
        return [request]
    encoded = [np.full_like(request[IMAGE], path.read_bytes()) for path in sample_paths()]
    return [{**request, IMAGE: one} for one in encoded]
