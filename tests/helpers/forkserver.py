"""Commands in processes that need not import torch: forks of one process that has."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

IMPORTS = (
    "torch",
    "torch.onnx",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tome_export.cli.main",
)
"""What takes seconds, and starts no thread, which a fork would lose."""

SERVE = "import forkserver, sys; exec(forkserver.serve(int(sys.argv[1])), {'__name__': '__main__'})"


class Forked:
    """What ``subprocess.Popen`` gives, as far as tests use it; both streams are text.

    Attributes:
        pid: Of the process, which is a child of the server.
        returncode: None while it runs; negative for a signal.
    """

    def __init__(self, pid: int, status: socket.socket, stdout: IO[str], stderr: IO[str]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._status = status

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; ``subprocess.TimeoutExpired``."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked command", timeout or 0)
            self.returncode = pickle.loads(self._status.recv(1 << 10))  # noqa: S301 - our server
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes, until it ends; the streams are closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        texts = ["", ""]

        def read(index: int, stream: IO[str]) -> None:
            texts[index] = stream.read()
            stream.close()

        streams = enumerate((self.stdout, self.stderr))
        readers = [
            threading.Thread(target=read, args=pair) for pair in streams if not pair[1].closed
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        self.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process with everything imported; it ends when this one closes it or ends."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(
                        [str(Path(__file__).parent), *filter(None, sys.path)]
                    ),
                },
            )

    def start(self, code: str, *arguments: str, cwd: Path, env: dict[str, str]) -> Forked:
        """``python -c code arguments`` without its start.

        What a module reads from the environment when it is imported is the server's: a test of
        that starts a process of its own.
        """
        ours, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, err = os.pipe(), os.pipe()
        request = pickle.dumps((code, arguments, str(cwd), env))
        socket.send_fds(self._requests, [request], [out[1], err[1], status.fileno()])
        status.close()
        os.close(out[1])
        os.close(err[1])
        pid = pickle.loads(ours.recv(1 << 10))  # noqa: S301 - our server
        return Forked(pid, ours, open(out[0]), open(err[0]))  # noqa: PTH123

    def close(self) -> None:
        """End the server."""
        self._requests.close()
        self._process.wait(timeout=30)


def serve(number: int) -> str:
    """Fork for each request; the code to run, in the child that is to run it.

    Args:
        number: The descriptor that requests come from.
    """
    for name in IMPORTS:
        __import__(name)
    threads = os.listdir("/proc/self/task")  # noqa: PTH208
    assert len(threads) == 1, f"{len(threads)} threads, which a fork would lose"
    requests = socket.socket(fileno=number)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            woken.recv(1 << 10)
            _report(running)
        if requests not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not request:
            sys.exit()
        out, err, status = descriptors
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for other in (requests, woken, wake, *running.values()):
                other.close()
            os.close(status)
            return _become(pickle.loads(request), out, err)  # noqa: S301 - from our tests
        os.close(out)
        os.close(err)
        running[pid] = socket.socket(fileno=status)
        running[pid].send(pickle.dumps(pid))


def _report(running: dict[int, socket.socket]) -> None:
    """Tell of each process that has ended."""
    for pid, status in list(running.items()):
        ended, state = os.waitpid(pid, os.WNOHANG)
        if ended:
            del running[pid]
            with status, contextlib.suppress(BrokenPipeError):
                status.send(pickle.dumps(os.waitstatus_to_exitcode(state)))


def _become(request: Any, out: int, err: int) -> str:
    """Make this child what the request asks for; the code."""
    code, arguments, cwd, environment = request
    for given, stream in ((out, 1), (err, 2)):
        os.dup2(given, stream)
        os.close(given)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # Shells start background jobs, and so perhaps the tests, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv[:] = ["-c", *arguments]
    return str(code)
