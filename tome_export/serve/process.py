"""The server's processes: one that leads a group of its own, ended with all that it started.

A watchdog ends it where this process can no longer do so itself: after SIGKILL, for one. The
processes of its python models are found gone here, as the server does not say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tome_export.errors import ExportError
from tome_export.serve.probe import DEAD, STOPPED, stub_states

POLL_SECONDS = 0.02

DEAD_SECONDS = 0.5
"""A stub that the server ends itself is dead for a moment, until the server has collected it."""

STOPPED_SECONDS = 5.0
"""A stub that is stopped (SIGSTOP) answers nothing; for a moment somebody may look at it."""

SHELL = "/bin/sh"


def signal_name(number: int) -> str:
    """``SIGKILL``, or ``signal 40`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# The death of a parent can be signalled to a child, but of the thread that started it: ours ends
# at once. The end of a pipe comes with that of the process, whatever ended it.
_SCRIPT = """
group=
while read -r line; do group=$line; done
if [ -n "$group" ]; then
    kill -TERM "$group"
    seconds=0
    while [ "$seconds" -lt "$3" ] && kill -0 "$group"; do
        sleep 1
        seconds=$((seconds + 1))
    done
    kill -KILL "-$group"
fi
rm -rf "$1"
rm -f "$2"*
"""


class Watchdog:
    """A small child process that outlives this one, tidies up after it, and ends.

    It removes a folder and shared memory, whose paths begin with ``memory``, and gives the server
    so many seconds to end by itself after SIGTERM.
    """

    def __init__(self, folder: Path, memory: Path, seconds: int) -> None:
        given = [str(folder.absolute()), str(memory), str(seconds)]
        try:
            self._process = subprocess.Popen(
                [SHELL, "-c", _SCRIPT, "tome-export-watchdog", *given],
                bufsize=0,  # nothing is kept to be written when it has gone
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": "/usr/bin:/bin"},
                start_new_session=True,  # what ends the group that we are in is not to end it
            )
        except OSError as error:
            raise ExportError(
                f"cannot start {SHELL}, which ends tritonserver if this process is killed: "
                f"{error}; install a shell, or let the system run more processes"
            ) from error

    def guard(self, group: int) -> None:
        """Name the process group to end, by the process id of its leader."""
        self._say(str(group))

    def release(self) -> None:
        """Forget the group: once its leader is collected, the number may be another's."""
        self._say("")

    def end(self) -> None:
        """End it without a trace; everything else has been tidied up."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _say(self, line: str) -> None:
        if self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):  # somebody killed it: we go on without
            self._process.stdin.write(f"{line}\n".encode())


class GroupProcess:
    """One program at a time, its output appended to a file.

    Shared memory that it leaves is removed; the watchdog knows which group runs.
    """

    def __init__(self, log_path: Path, memory: Path, watchdog: Watchdog) -> None:
        self.log_path, self._memory, self._watchdog = log_path, memory, watchdog
        self._process: subprocess.Popen[bytes] | None = None
        self._launching = threading.Lock()
        self._cancelled = False
        self._log_from = 0
        log_path.touch()

    def launch(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the program, after the one before has been stopped; may raise ``OSError``."""
        self._process, self._cancelled = None, False
        self._log_from = self.log_path.stat().st_size
        # Signals are handled in the main thread. Started from another one, the process is known
        # to ``stop`` even if an interrupt comes just now.
        launcher = ThreadPoolExecutor(1, "server-launch")
        started = launcher.submit(self._start, arguments, environment)
        launcher.shutdown(wait=False)
        started.result()

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with self._launching, self.log_path.open("ab") as stream:
            if self._cancelled:
                return
            self._process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C in the terminal is for us: we stop it
            )
            self._watchdog.guard(self._process.pid)

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""
        assert self._process is not None, "not launched"  # noqa: S101
        return self._process.pid

    def log(self) -> str:
        """What the program has printed since it was launched."""
        with self.log_path.open("rb") as stream:
            stream.seek(self._log_from)
            return stream.read().decode("utf-8", errors="replace")

    def is_alive(self) -> bool:
        """Whether the program runs."""
        process = self._process
        if process is None or process.returncode is not None:
            return False
        # Not collected: as long as it is a zombie, no other process group can take its number.
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def exit_code(self) -> int:
        """Exit code of the program that has ended; negative, the signal that ended it."""
        assert self._process is not None, "not launched"  # noqa: S101
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None  # noqa: S101 (without WNOHANG it waits)
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def stop(self, seconds: float) -> None:
        """End the program, within so many seconds after SIGTERM by itself, and its group."""
        self._cancelled = True
        with self._launching:  # a launch that was interrupted has come to its end, or will not be
            process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            if seconds > 0 and self.is_alive():
                process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + seconds
                while self.is_alive() and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._watchdog.release()
            process.wait()
            for region in self._memory.parent.glob(f"{self._memory.name}*"):
                region.unlink(missing_ok=True)


class Stubs:
    """The processes (stubs) that the server of a process id runs its python models in.

    Where it ``reloads``, models and their stubs may come and go.
    """

    def __init__(self, server: int, repository: Path, *, reloads: bool) -> None:
        self._server, self._reloads = server, reloads
        self._root = repository.absolute()
        self._models: dict[int, str] = {}
        self._since: dict[int, float] = {}

    def lost(self) -> str:
        """What has become of a stub that answers no more; empty if there is none."""
        now, states = time.monotonic(), stub_states(self._server)
        for pid, (state, status) in states.items():
            self._models.setdefault(pid, self._model_of(pid))
            if state not in DEAD + STOPPED:
                self._since.pop(pid, None)
                continue
            seconds = now - self._since.setdefault(pid, now)
            if state in DEAD and seconds >= DEAD_SECONDS:
                return f"the process of {self._models[pid]} {_end(status)}"
            if state in STOPPED and seconds >= STOPPED_SECONDS:
                return f"the process of {self._models[pid]} is stopped (SIGSTOP)"
        gone = self._models.keys() - states.keys()
        if gone and not self._reloads:  # later servers collect it when somebody asks for health
            return f"the process of {self._models[min(gone)]} has ended"
        for pid in gone:
            del self._models[pid]
        return ""

    def _model_of(self, pid: int) -> str:
        """Its model, from the path of the file that it runs."""
        with contextlib.suppress(psutil.Error):
            for path in map(Path, psutil.Process(pid).cmdline()):
                if path.is_relative_to(self._root) and path != self._root:
                    return f"model {path.relative_to(self._root).parts[0]}"
        return "a python model"


def _end(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was ended by {signal_name(os.WTERMSIG(status))}"
    return "has ended"
