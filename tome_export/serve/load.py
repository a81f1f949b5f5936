"""Load on a served model: a number of requests kept under way over gRPC, and how they fare."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.errors import InputError, MissingComponentError
from tome_export.serve.server_log import shortened

if TYPE_CHECKING:
    from numpy.typing import NDArray

REQUEST_SECONDS = 120.0
"""Longest that one answer may take."""

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """How requests of one image each fared.

    Attributes:
        concurrency: Requests that were under way at once.
        requests: Answers that came within the measurement.
        images_per_second: These, by its length.
        latency_ms: ``p50``, ``p95`` and ``p99`` of them: from sending a request to its answer.
        client_share: Time of a processor that this process took, by the time that passed; near 1
            its own speed is what was measured.
    """

    concurrency: int
    requests: int
    images_per_second: float
    latency_ms: Mapping[str, float]
    client_share: float


@dataclass(frozen=True)
class Setting:
    """What is chosen: see ``ServeOptions``."""

    instances: int
    threads: int | None
    max_queue_delay_us: int


@dataclass(frozen=True)
class SettingResult:
    """A setting under the load at which it answers the most images within the limit.

    ``fits`` is whether it keeps to the limit; if not, the load is that of one request at a time.
    """

    setting: Setting
    load: Load
    fits: bool


@dataclass(frozen=True)
class Analysis:
    """What was measured on this machine, and what was chosen.

    Attributes:
        model: What was asked, ``<name>_pipeline`` for one.
        p99_ms: The limit.
        results: One for each setting.
        chosen: The one that was written.
        notes: What a user should know.
    """

    model: str
    p99_ms: float
    results: tuple[SettingResult, ...]
    chosen: Setting
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


def measure_load(
    address: str,
    model: str,
    requests: Sequence[Mapping[str, NDArray[Any]]],
    concurrency: int,
    seconds: float,
    warmup: float = 0.5,
) -> Load:
    """Keep ``concurrency`` requests under way for ``seconds``, after some that do not count.

    A measurement goes on until at least ``2 * concurrency`` requests were answered in it.

    Args:
        address: ``host:port`` of gRPC.
        model: Name of the model.
        requests: Inputs by name, with a batch of one, sent in turn; BYTES as arrays of ``bytes``.
        concurrency: Requests at once, each sent when the one before it is answered.
        seconds: Length of the measurement.
        warmup: How long before it requests are sent, in seconds.

    Raises:
        InputError: if the server refuses a request.
        MissingComponentError: if tritonclient is missing.
    """
    try:
        import tritonclient.grpc as library
        from tritonclient.utils import np_to_triton_dtype
    except ImportError as error:
        raise MissingComponentError(
            f"tritonclient for grpc is not installed ({error}); pip install 'tome-export[serve]'"
        ) from error
    prepared = []
    for request in requests:
        tensors = []
        for name, array in request.items():
            tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(array))
        prepared.append(tensors)
    client = library.InferenceServerClient(address)
    answered: list[tuple[float, float]] = []  # when, after how long
    failures: list[Exception] = []
    stop = threading.Event()

    def send(first: int) -> None:
        number = first
        while not stop.is_set():
            began = time.perf_counter()
            try:
                client.infer(
                    model, prepared[number % len(prepared)], client_timeout=REQUEST_SECONDS
                )
            except Exception as error:  # of gRPC and the client library
                failures.append(error)
                stop.set()
                return
            now = time.perf_counter()
            answered.append((now, now - began))
            number += concurrency

    threads = [threading.Thread(target=send, args=(first,)) for first in range(concurrency)]
    for thread in threads:
        thread.start()
    try:
        stop.wait(warmup)
        began, before, used = time.perf_counter(), len(answered), time.process_time()
        stop.wait(seconds)
        while len(answered) - before < 2 * concurrency and not stop.is_set():
            time.sleep(0.02)
        ended, cpu = time.perf_counter(), time.process_time() - used
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        client.close()
    if failures:
        message = getattr(failures[0], "message", lambda: None)() or str(failures[0])
        raise InputError(f"model {model} refused a request under load: {shortened(message)}")
    found = np.array([latency for at, latency in answered if began <= at <= ended]) * 1e3
    return Load(
        concurrency,
        len(found),
        len(found) / (ended - began),
        {f"p{p}": float(np.percentile(found, p)) for p in PERCENTILES},
        cpu / (ended - began),
    )
