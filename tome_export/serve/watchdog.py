"""What ends the server when this process can no longer do so itself: after SIGKILL, for one."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from tome_export.errors import ExportError

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
