"""Evaluation on Ray: one actor per device decodes chunks side by side and runs the models on them.

Ray is driven from a process of its own: it replaces handlers of signals, reads and writes the
environment, and its waits drop exceptions; none of that reaches this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pickle
import re
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from tome_export.data.decode import Decode, Task, decode_task, reason_of
from tome_export.data.source import printable
from tome_export.errors import ExportError, InputError, MissingComponentError, TomeExportError
from tome_export.evaluate.candidates import Opener
from tome_export.evaluate.records import Classifier, Record
from tome_export.runtime.process import COMMAND, answers, request

LOCAL = "local"

RETRIES = 3
"""How often a chunk is tried again whose process died."""

CONNECT_S = 5.0

END_S = 10.0
"""Seconds in which the processes of a session must have ended once they are told to."""

MAX_FOLDER = 40
"""Longest temporary folder: below it Ray makes sockets, whose paths may have 107 characters."""


@dataclass(frozen=True)
class RayWork:
    """What is computed on Ray, the same steps on the same batches as on one machine."""

    tasks: Sequence[Task]
    decode: Decode
    opener: Opener
    classifier: Classifier
    roots: Sequence[Path] = ()


def require_ray() -> None:
    """Raise ``MissingComponentError`` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingComponentError(
            "ray is not installed, which --ray runs on; install tome-export[ray]"
        )


def ray_records(work: RayWork, address: str, cores: int) -> Generator[Record, None, None]:
    """One record per chunk, in the order in which they are finished.

    Every machine needs this package and sees the data under the same path; the models are sent to
    it. When this ends, also by an exception, nothing is left of a Ray that was started here, which
    ``local`` asks for; other addresses are ``10.0.0.1:6379``, ``ray://10.0.0.1:10001`` or ``auto``.
    """
    require_ray()
    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if address == LOCAL:
            folder = stack.enter_context(_folder())
            stack.callback(_end, folder)
            options = {"_temp_dir": str(folder), "include_dashboard": False, "num_cpus": cores}
        else:
            _reach(address)
        process = stack.enter_context(
            subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process
            )
        )
        stack.callback(_stop, process)
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None  # noqa: S101, PT018 (both are pipes)
        with contextlib.suppress(BrokenPipeError), stdin:
            stdin.write(request(_drive, work, address, options))
        done = 0
        for outcome in answers(stdout):
            if isinstance(outcome, TomeExportError):
                raise outcome
            done += 1
            yield outcome
        if done < len(work.tasks):
            raise _told(RuntimeError(f"its process ended with {process.wait()}"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the driver, which disconnects from its cluster if it has the time."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    process.kill()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder with a short path."""
    bases = [os.environ.get("RAY_TMPDIR", ""), tempfile.gettempdir(), "/tmp"]  # noqa: S108
    prefix = "tome-ray-"
    # mkdtemp adds eight characters.
    longest = MAX_FOLDER - len(prefix) - 9
    base = next((b for b in bases if b.startswith("/") and len(b) <= longest), bases[-1])
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix, dir=base, ignore_cleanup_errors=True)
    except OSError as error:
        raise MissingComponentError(
            f"Ray cannot be started here: no folder can be made in {base} ({error.strerror}); set "
            f"TMPDIR to one of at most {longest} characters"
        ) from None
    with made as name:
        yield Path(name)


def _end(folder: Path) -> None:
    """Kill what still uses the folder: Ray's agents outlive it by some seconds."""
    until = time.monotonic() + END_S
    while (found := _using(folder)) and time.monotonic() < until:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def _using(folder: Path) -> list[psutil.Process]:
    """Processes that name the folder in their command line, or have a file in it open."""
    found, inside = [], f"{folder}/"
    for process in psutil.process_iter():
        # It may end meanwhile, or be another user's.
        with contextlib.suppress(psutil.Error):
            files = (file.path for file in process.open_files())
            if any(inside in word for word in process.cmdline()) or any(
                path.startswith(inside) for path in files
            ):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


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


# In the process that drives Ray.


def _drive(
    work: RayWork, address: str, options: dict[str, Any]
) -> Iterator[Record | TomeExportError]:
    """Records, or the error that ends them."""
    try:
        ray = _connected(address, options)
    except TomeExportError as error:
        yield error
        return
    try:
        for outcome in _outcomes(ray, work):
            yield pickle.loads(outcome)  # noqa: S301 (our own actor's)
    # Ray wraps what happens elsewhere in errors of its own, which are many.
    except Exception as error:
        yield _told(error)
    finally:
        ray.shutdown()


def _connected(address: str, options: dict[str, Any]) -> Any:
    # Else a thread of its own that outlives a session starts another, which nobody ends.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if address == LOCAL and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        # Else Ray writes one into the home folder, which clusters of later days ask for.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray raises what it pleases: of its own, of gRPC, of the system.
    try:
        import ray

        services: Any = ray._private.services
        if address == LOCAL and hasattr(services, "start_api_server"):
            # Even without a dashboard, and with usage statistics off, it asks the metadata
            # addresses of cloud providers what machine it is on. There is no option.
            services.start_api_server = lambda *_, **__: ("", None)
        ray.init(
            address=address,
            configure_logging=False,
            logging_level=logging.CRITICAL,
            log_to_driver=False,
            **options,
        )
    except Exception as error:
        reason = reason_of(error)
        if address != LOCAL:
            raise InputError(_unreachable(address, reason)) from error
        raise MissingComponentError(
            f"Ray cannot be started here ({reason}); run without --ray, or give a cluster's address"
        ) from error
    return ray


def _outcomes(ray: Any, work: RayWork) -> Iterator[bytes]:
    there = ray.cluster_resources()
    # A device is a GPU or all cores of a machine.
    gpus, devices = int(there.get("GPU", 0)), sum(bool(node["Alive"]) for node in ray.nodes())
    device: dict[str, Any] = {"num_gpus": 1} if gpus else {"scheduling_strategy": "SPREAD"}
    devices = gpus or devices
    # A chunk per core is decoded, and one is with the models.
    threads = int(there.get("CPU", 1)) // devices + 1
    actor_class = ray.remote(_Actor).options(
        num_cpus=0,
        max_restarts=RETRIES,
        max_task_retries=RETRIES,
        max_concurrency=threads,
        **device,
    )
    content = ray.put(pickle.dumps(replace(work, tasks=())))
    actors = [actor_class.remote([content]) for _ in range(devices)]
    tasks = map(pickle.dumps, work.tasks)
    waiting = {
        actor.outcome.remote(task): actor
        for actor, task in zip(actors * threads, tasks, strict=False)
    }
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        actor = waiting.pop(done)
        waiting |= {actor.outcome.remote(task): actor for task in islice(tasks, 1)}
        yield ray.get(done)


class _Actor:
    """Decodes chunks in threads, and runs the models on one after the other."""

    def __init__(self, content: list[Any]) -> None:
        import ray

        self._content: bytes = ray.get(content[0])
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._work: RayWork | None = None
        self._runners: dict[str, Any] = {}

    def outcome(self, task: bytes) -> bytes:
        """A record, or the error to be told: Ray would wrap what is raised in its own."""
        try:
            with self._lock:
                if self._work is None:
                    self._work = self._opened()
            decoded = decode_task(pickle.loads(task), self._work.decode)  # noqa: S301 (our driver's)
            with self._lock:
                return pickle.dumps(self._work.classifier.record(decoded, self._runners))
        except Exception as error:
            return pickle.dumps(_portable(error))

    def _opened(self) -> RayWork:
        work: RayWork = pickle.loads(self._content)  # noqa: S301 (our own driver's)
        missing = next((root for root in work.roots if not root.exists()), None)
        if missing is not None:
            raise InputError(
                f"the machine {socket.gethostname()} does not see {missing}; put the data where "
                "every machine of the Ray cluster has it under this path"
            )
        self._runners = self._stack.enter_context(work.opener())
        return work

    def __del__(self) -> None:
        self._stack.close()


def _told(error: Exception) -> TomeExportError:
    """A failure of Ray itself, in one line."""
    text = str(error)
    # Of a traceback its end tells most, of all else the first line.
    ends = re.findall(r"^\s*((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
    line = ends[-1] if ends else next(iter(text.strip().splitlines()), type(error).__name__)
    reason = printable(" ".join(line.split()))[:300]
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
