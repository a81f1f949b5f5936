"""Evaluation on Ray Data: decoding in tasks, inference in one actor per device."""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from tome_export.data.decode import Decode, Task, decode_task, reason_of
from tome_export.data.source import printable
from tome_export.errors import ExportError, InputError, MissingComponentError, TomeExportError
from tome_export.evaluate.ray_session import ray_session
from tome_export.evaluate.records import Classifier, Record
from tome_export.runtime.runner import Runner

Opener = Callable[[], AbstractContextManager[dict[str, Runner]]]
"""Opens the runners where it is called; can be pickled, and needs no file of this machine."""

MAX_BLOCKS = 512
"""Most pieces that Ray Data schedules; each holds chunks, and each chunk is a record."""

RETRIES = 3
"""How often a chunk is tried again whose process died; Ray itself would never give up."""

MAX_REASON = 300
"""Most characters of what Ray says that an error repeats."""


def ray_records(
    tasks: Sequence[Task],
    decode: Decode,
    opener: Opener,
    classifier: Classifier,
    address: str,
    cores: int,
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
        cores: What Ray may use of this machine, where it is started here.
        roots: Paths that every machine must see.

    Raises:
        MissingComponentError: if Ray is not installed, or a backend not where an actor runs.
        InputError: if the cluster cannot be reached, or a machine does not see the data.
        ExportError: if a runner or Ray itself fails.
    """
    ray = require_ray()
    with ray_session(ray, address, cores) as signals:
        with signals.inside():
            rows = _rows(ray, tasks, decode, opener, classifier, roots)
        while True:
            try:
                with signals.inside():
                    row = next(rows, None)
            # Ray wraps what happens elsewhere in errors of its own, which are many.
            except Exception as error:
                raise _told(error) from error
            if row is None:
                return
            outcome: Record | TomeExportError = pickle.loads(row["outcome"])  # noqa: S301 (ours)
            if isinstance(outcome, TomeExportError):
                raise outcome
            yield outcome


def require_ray() -> Any:
    """The package.

    Raises:
        MissingComponentError: if it is not installed.
    """
    # Else a thread of its own that outlives a session starts another, which nobody ends.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingComponentError(
            "ray is not installed, which --ray runs on; install tome-export[ray]"
        ) from None
    return ray


def _told(error: Exception) -> TomeExportError:
    """A failure of Ray itself, in one line."""
    text = str(error)
    # Of a traceback its end tells most, of all else the first line.
    ends = re.findall(r"^\s*((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
    line = ends[-1] if ends else next(iter(text.strip().splitlines()), type(error).__name__)
    reason = printable(" ".join(line.split()))[:MAX_REASON]
    if re.search(r"\b(ModuleNotFoundError|ImportError)\b", reason):
        return MissingComponentError(_lacking("a machine of the Ray cluster", reason))
    return ExportError(
        f"Ray could not go on ({reason}); run the same command again to go on from here, or "
        "without --ray"
    )


def _lacking(machine: str, reason: str) -> str:
    return f"{machine} lacks a package ({reason}); install the same tome-export on all machines"


def _portable(error: Exception) -> TomeExportError:
    """What another machine raised, without its cause, which may be of a package lacking here."""
    if isinstance(error, TomeExportError):
        return type(error)(str(error))
    machine = f"the machine {socket.gethostname()}"
    if isinstance(error, ImportError):
        return MissingComponentError(_lacking(machine, reason_of(error)))
    return ExportError(f"{machine} failed ({reason_of(error)}); look there, or run without --ray")


def _rows(
    ray: Any,
    tasks: Sequence[Task],
    decode: Decode,
    opener: Opener,
    classifier: Classifier,
    roots: Sequence[Path],
) -> Iterator[dict[str, Any]]:
    """What the actors give, as it comes; work begins with the first ``next``."""
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
    pieces = [{"task": pickle.dumps(task)} for task in tasks]
    data = (
        ray.data.from_items(pieces, override_num_blocks=min(len(pieces), MAX_BLOCKS))
        .map_batches(
            _decoded_rows,
            batch_size=1,
            num_cpus=1,
            max_retries=RETRIES,
            fn_kwargs={"decode": pickle.dumps(decode), "roots": [str(root) for root in roots]},
        )
        .map_batches(
            _Inference,
            batch_size=1,
            compute=pool,
            fn_constructor_args=([content],),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            **devices,
        )
    )
    rows: Iterator[dict[str, Any]] = iter(data.iter_rows())
    return rows


def _decoded_rows(batch: dict[str, Any], decode: bytes, roots: list[str]) -> dict[str, list[bytes]]:
    """Runs in a task of Ray."""
    missing = next((root for root in roots if not Path(root).exists()), None)
    if missing is not None:
        error = InputError(
            f"the machine {socket.gethostname()} does not see {missing}; put the data where every "
            "machine of the Ray cluster has it under this path"
        )
        return {"decoded": [pickle.dumps(error)]}
    try:
        function = pickle.loads(decode)  # noqa: S301 (from our own driver)
        tasks = [pickle.loads(task) for task in batch["task"]]  # noqa: S301 (our own driver's)
        return {"decoded": [pickle.dumps(decode_task(task, function)) for task in tasks]}
    except Exception as error:
        return {"decoded": [pickle.dumps(_portable(error))]}


class _Inference:
    """Runs in an actor of Ray; the runners live as long as it."""

    def __init__(self, content: list[Any]) -> None:
        import ray

        self._content: bytes = ray.get(content[0])
        self._stack = ExitStack()
        self._classifier: Classifier | None = None
        self._runners: dict[str, Runner] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self._outcome(data)) for data in batch["decoded"]]}

    def _outcome(self, data: bytes) -> Record | TomeExportError:
        """A record, or the error to be told: Ray would wrap what is raised in its own."""
        decoded = pickle.loads(data)  # noqa: S301 (from our own tasks)
        if isinstance(decoded, TomeExportError):
            return decoded
        try:
            if self._classifier is None:
                opener, classifier = pickle.loads(self._content)  # noqa: S301 (our own driver's)
                self._runners = self._stack.enter_context(opener())
                self._classifier = classifier
            return self._classifier.record(decoded, self._runners)
        except Exception as error:
            return _portable(error)

    def __del__(self) -> None:
        self._stack.close()
