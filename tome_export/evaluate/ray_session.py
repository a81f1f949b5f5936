"""A connection to Ray that leaves nothing behind: no process, no folder, no handler of a signal."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tome_export.data.decode import reason_of
from tome_export.errors import InputError, MissingComponentError

LOCAL = "local"

CONNECT_S = 5.0

END_S = 10.0
"""Seconds in which the processes of a session must have ended once they are killed."""

MAX_FOLDER = 40
"""Longest temporary folder: below it Ray makes sockets, whose paths may have 107 characters."""

AUTHENTICATION = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Keeps the caller's handlers of signals in force while Ray runs in the main thread.

    Ray puts its own in the place of SIGTERM's, and its waits in C++ drop every exception that a
    handler raises but ``KeyboardInterrupt``.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {int(n): signal.getsignal(n) for n in SIGNALS}
        self._taken = threading.current_thread() is threading.main_thread()
        self._inside = False
        self._pending: BaseException | None = None

    def take(self) -> None:
        """Put the handlers in force; once more after whatever may have replaced them."""
        for number, handler in self._before.items() if self._taken else ():
            signal.signal(number, self._handle if callable(handler) else handler)

    def restore(self) -> None:
        """Give them back."""
        for number, handler in self._before.items() if self._taken else ():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Around calls of Ray: what a handler raises comes out at their end at the latest."""
        self._inside = True
        try:
            yield
        except SystemExit:
            # Of Ray's handler, which is in force while it starts.
            self._inside = False
            self.take()
            if self._taken and callable(self._before[signal.SIGTERM]):
                self._before[signal.SIGTERM](signal.SIGTERM, None)
            raise
        except KeyboardInterrupt:
            if self._pending is not None:
                raise self._pending from None
            raise
        finally:
            self._inside = False
        if self._pending is not None:
            raise self._pending

    def _handle(self, number: int, frame: Any) -> None:
        try:
            self._before[number](number, frame)
        except BaseException as error:
            if not self._inside:
                raise
            self._pending = error
            raise KeyboardInterrupt from error


@contextlib.contextmanager
def ray_session(ray: Any, address: str, cores: int) -> Iterator[Signals]:
    """Connect to Ray, or start it here; one that the caller has connected to is left as it is.

    Args:
        ray: The package.
        address: ``local``, or a cluster's.
        cores: What a Ray that is started here may use.

    Raises:
        InputError: if the cluster cannot be reached.
        MissingComponentError: if Ray cannot be started here.
    """
    with contextlib.ExitStack() as stack:
        signals = Signals()
        stack.callback(signals.restore)
        signals.take()
        if not ray.is_initialized():
            options: dict[str, Any] = {
                "configure_logging": False,
                "logging_level": logging.CRITICAL,
                "log_to_driver": False,
            }
            if address == LOCAL:
                folder = stack.enter_context(_folder())
                stack.callback(_end, folder)
                options |= {"_temp_dir": str(folder), "include_dashboard": False, "num_cpus": cores}
                stack.enter_context(_without_api_server(ray))
                stack.enter_context(_own_token())
            else:
                _reach(address)
            stack.callback(ray.shutdown)
            with signals.inside():
                _start(lambda: ray.init(address=address, **options), address)
            signals.take()
        yield signals


def _start(init: Callable[[], Any], address: str) -> None:
    try:
        init()
    # Ray raises what it pleases: of its own, of gRPC, of the system.
    except Exception as error:
        reason = reason_of(error)
        if address == LOCAL:
            raise MissingComponentError(
                f"Ray cannot be started here ({reason}); run without --ray, or give a cluster's "
                "address"
            ) from error
        raise InputError(_unreachable(address, reason)) from error


@contextlib.contextmanager
def _without_api_server(ray: Any) -> Iterator[None]:
    """Start no server of Ray's dashboard, which nothing here asks.

    Ray starts it even without a dashboard, and for usage statistics even if they are off: it asks
    the metadata addresses of cloud providers what machine it is on. There is no option.
    """
    with contextlib.ExitStack() as stack:
        services = ray._private.services
        if hasattr(services, "start_api_server"):
            before = services.start_api_server
            stack.callback(setattr, services, "start_api_server", before)
            services.start_api_server = lambda *_, **__: ("", None)
        yield


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Without it Ray writes one into the home folder, which clusters of later days ask for."""
    before = {name: os.environ.get(name) for name in AUTHENTICATION}
    if not any(before[name] for name in AUTHENTICATION[:2]):
        os.environ[AUTHENTICATION[0]] = _token()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def _token() -> str:
    """One for the life of this process: Ray reads it once."""
    return secrets.token_hex(32)


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
    own, inside = os.getpid(), f"{folder}/"
    return [
        process
        for process in psutil.process_iter()
        if process.pid != own and _uses(process, inside)
    ]


def _uses(process: psutil.Process, inside: str) -> bool:
    # It may end meanwhile, or be another user's.
    with contextlib.suppress(psutil.Error):
        return any(inside in word for word in process.cmdline()) or any(
            file.path.startswith(inside) for file in process.open_files()
        )
    return False


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
