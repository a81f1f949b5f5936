"""Evaluation on Ray Data: decoding in tasks, inference in one actor per device."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from tome_export.errors import InputError, MissingComponentError, TomeExportError
from tome_export.evaluation.classify import Classifier
from tome_export.evaluation.decode import Decode, decode_task
from tome_export.evaluation.records import Record, Task
from tome_export.runtime.runner import Runner

Opener = Callable[[], AbstractContextManager[dict[str, Runner]]]
"""Opens the runners where it is called; can be pickled, and needs no file of this machine."""

LOCAL = "local"

MAX_BLOCKS = 512
"""Most pieces that Ray Data schedules; each holds chunks, and each chunk is a record."""

CONNECT_S = 5.0


def ray_records(
    tasks: Sequence[Task],
    decode: Decode,
    opener: Opener,
    classifier: Classifier,
    address: str,
    roots: Sequence[Path] = (),
) -> Generator[Record, None, None]:
    """One record per chunk, in the order in which they are finished.

    The same steps on the same batches as on one machine. Every machine needs this package and sees
    the data under the same path; the models are sent to it.

    Args:
        tasks: Chunks, at least one.
        decode: Encoded image to pixels.
        opener: Opens the runners.
        classifier: What to keep.
        address: ``local`` to start Ray here, else a cluster's, such as ``10.0.0.1:6379``,
            ``ray://10.0.0.1:10001`` or ``auto``.
        roots: Paths that every machine must see.

    Raises:
        MissingComponentError: if Ray is not installed, or a backend not where an actor runs.
        InputError: if the cluster cannot be reached, or a machine does not see the data.
        ExportError: if a runner fails.
    """
    ray = _ray()
    own = not ray.is_initialized()
    try:
        if own:
            _connect(ray, address)
        yield from _records(ray, tasks, decode, opener, classifier, roots)
    finally:
        if own:
            ray.shutdown()


def require_ray() -> None:
    """Check that Ray is installed, before any work is done.

    Raises:
        MissingComponentError: if it is not.
    """
    _ray()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingComponentError(
            "ray is not installed, which --ray runs on; install tome-export[ray]"
        ) from None
    return ray


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {
        "configure_logging": False,
        "logging_level": logging.CRITICAL,
        "log_to_driver": False,
    }
    if address == LOCAL:
        cores = len(os.sched_getaffinity(0))
        # "local", or a cluster that runs here would be taken.
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **options)
        return
    _reach(address)
    try:
        ray.init(address=address, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(_unreachable(address, reason)) from error


def _reach(address: str) -> None:
    """Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host or not port.isdigit():
        raise InputError(
            f"the Ray address is {address!r}; expected local, auto, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(_unreachable(address, str(error))) from None


def _unreachable(address: str, reason: str) -> str:
    return (
        f"no Ray cluster can be reached at {address} ({reason}); start one with 'ray start --head' "
        "and give its address, or use --ray local"
    )


def _records(
    ray: Any,
    tasks: Sequence[Task],
    decode: Decode,
    opener: Opener,
    classifier: Classifier,
    roots: Sequence[Path],
) -> Generator[Record, None, None]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    # A device is a GPU or all cores of a machine. Tasks take cores, actors none, so that neither
    # keeps the other from running.
    devices: dict[str, Any] = (
        {"num_gpus": 1, "size": gpus}
        if gpus
        else {"num_cpus": 0, "scheduling_strategy": "SPREAD", "size": machines}
    )
    pool = ray.data.ActorPoolStrategy(size=devices.pop("size"))
    content = ray.put(pickle.dumps((opener, classifier)))
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    data = (
        ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
        .map_batches(
            _decoded_rows,
            batch_size=1,
            num_cpus=1,
            fn_kwargs={"decode": pickle.dumps(decode), "roots": [str(root) for root in roots]},
        )
        .map_batches(
            _Inference, batch_size=1, compute=pool, fn_constructor_args=([content],), **devices
        )
    )
    for row in data.iter_rows():
        outcome = pickle.loads(row["outcome"])  # noqa: S301 (from our own actors)
        if isinstance(outcome, TomeExportError):
            raise outcome
        yield Record.from_bytes(outcome)


def _decoded_rows(batch: dict[str, Any], decode: bytes, roots: list[str]) -> dict[str, list[bytes]]:
    """Runs in a task of Ray."""
    missing = next((root for root in roots if not Path(root).exists()), None)
    if missing is not None:
        error = InputError(
            f"the machine {socket.gethostname()} does not see {missing}; put the data where every "
            "machine of the Ray cluster has it under this path"
        )
        return {"decoded": [pickle.dumps(error)]}
    function = pickle.loads(decode)  # noqa: S301 (from our own driver)
    tasks = [pickle.loads(task) for task in batch["task"]]  # noqa: S301 (from our own driver)
    return {"decoded": [pickle.dumps(decode_task(task, function)) for task in tasks]}


class _Inference:
    """Runs in an actor of Ray; the runners live as long as it."""

    def __init__(self, content: list[Any]) -> None:
        import ray

        opener, self._classifier = pickle.loads(ray.get(content[0]))  # noqa: S301 (our driver's)
        self._opener: Opener = opener
        self._stack = ExitStack()
        self._runners: dict[str, Runner] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self._outcome(data)) for data in batch["decoded"]]}

    def _outcome(self, data: bytes) -> bytes | TomeExportError:
        """A record, or the error to be told: Ray would wrap what is raised in its own."""
        decoded = pickle.loads(data)  # noqa: S301 (from our own tasks)
        if isinstance(decoded, TomeExportError):
            return decoded
        try:
            if self._runners is None:
                self._runners = self._stack.enter_context(self._opener())
            record: bytes = self._classifier.record(decoded, self._runners).to_bytes()
        except TomeExportError as error:
            # Without its cause, which may be of a package that the other side lacks.
            return type(error)(str(error))
        return record

    def __del__(self) -> None:
        self._stack.close()
