"""A child process that leads a group of its own, ended with all that it started.

A watchdog ends it where this process can no longer do so itself: after SIGKILL, for one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tome_export.errors import ExportError

POLL_SECONDS = 0.02


def signal_name(number: int) -> str:
    """``SIGKILL``, or ``signal 40`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


SHELL = "/bin/sh"

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

    Args:
        folder: To remove, with what is in it.
        memory: How the paths of the shared memory to remove begin.
        seconds: For the server to end by itself after SIGTERM.

    Raises:
        ExportError: if the system cannot start it.
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

    Args:
        log_path: Where standard output and standard error go.
        tidy: Called once the program and its group are gone.
        watchdog: Told which group runs, to end it if this process is killed.
    """

    def __init__(self, log_path: Path, tidy: Callable[[], None], watchdog: Watchdog) -> None:
        self._log_path, self._tidy, self._watchdog = log_path, tidy, watchdog
        self._process: subprocess.Popen[bytes] | None = None
        self._launching = threading.Lock()
        self._cancelled = False
        self._failure: OSError | None = None
        self._log_from = 0
        log_path.touch()

    def launch(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the program, after the one before has been stopped.

        Raises:
            OSError: if the system cannot start it.
        """
        done = threading.Event()

        def work() -> None:
            try:
                with self._launching, self._log_path.open("ab") as stream:
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
            except OSError as error:
                self._failure = error
            finally:
                done.set()

        self._process, self._failure, self._cancelled = None, None, False
        self._log_from = self._log_path.stat().st_size
        # Signals are handled in the main thread. Started from another one, the process is known
        # to ``stop`` even if an interrupt comes just now.
        threading.Thread(target=work, name="server-launch", daemon=True).start()
        # No join: once interrupted, it takes the thread for ended.
        while not done.wait(POLL_SECONDS):
            pass
        if self._failure is not None:
            raise self._failure

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""
        assert self._process is not None, "not launched"  # noqa: S101
        return self._process.pid

    def log(self) -> str:
        """What the program has printed since it was launched."""
        with self._log_path.open("rb") as stream:
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
        """Of the program that has ended; the signal's number, negative, if one ended it."""
        assert self._process is not None, "not launched"  # noqa: S101
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None  # noqa: S101 (without WNOHANG it waits)
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def stop(self, seconds: float) -> None:
        """End the program and its group; does nothing if that is done.

        Args:
            seconds: For the program to end by itself after SIGTERM; 0 kills at once.
        """
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
            self._tidy()
