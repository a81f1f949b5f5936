"""Peak memory of a model, measured in a process of its own.

The process loads the model and runs it, then says what it took and waits until it is let go, so
that the driver can be asked what it holds on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.bench.environment import nvidia_smi

STATUS = Path("/proc/self/status")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Memory:
    """What a model takes.

    Attributes:
        peak_bytes: On the CPU the peak of resident memory from loading to the last run, above
            what the process had with its libraries imported: weights, the runtime's own copies,
            activations. On a GPU all device memory of the process, the CUDA context included, as
            the driver gives it after the last run. None where it is not known.
        reason: Why it is not known; None if it is.
    """

    peak_bytes: int | None
    reason: str | None = None


def resident_bytes(field: str, status: Path = STATUS) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process; None on systems without them.

    Not ``ru_maxrss``: Linux hands a parent's peak on to the programs it starts.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else int(kib) * 1024


def report(work: Callable[[], object]) -> None:
    """In the process of its own: do the work, print what it took, wait for standard input.

    Args:
        work: Loads and runs the model; what it returns is kept until the end.
    """
    before = resident_bytes("VmRSS")
    kept = work()
    peak = resident_bytes("VmHWM")
    taken = None if before is None or peak is None else max(0, peak - before)
    sys.stdout.write(json.dumps({"peak_bytes": taken}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del kept


def measure(module: str, request: Mapping[str, Any], *, gpu: bool) -> Memory:
    """Run a module that calls ``report`` and read what the model took.

    Args:
        module: Its name; it gets the request as JSON in its first argument.
        request: What to load and run.
        gpu: Whether to count device memory.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(dict(request))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stdin = process.stdout, process.stdin
        if stdout is None or stdin is None:
            return Memory(None, "the process that measures memory has no pipes")
        # Whatever libraries print before it is not the answer.
        line = next((text for text in stdout if text.startswith('{"peak_bytes"')), None)
        device = _device_bytes(process.pid) if gpu and line is not None else None
        _, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    if line is None:
        last = (error.strip().splitlines() or ["it ended without a word"])[-1]
        return Memory(None, f"the process that measures memory failed: {last}")
    if gpu:
        hidden = "nvidia-smi does not show this process, as in a container with its own processes"
        return Memory(device, None if device is not None else hidden)
    taken = json.loads(line)["peak_bytes"]
    return Memory(taken, None if taken is not None else f"{os.uname().sysname} has no {STATUS}")


def _device_bytes(pid: int) -> int | None:
    """Device memory of a process on all GPUs."""
    rows = nvidia_smi("--query-compute-apps=pid,used_memory") or []
    found = [cells[1] for cells in rows if len(cells) == 2 and cells[0] == str(pid)]
    known = [int(mib) << 20 for mib in found if mib.isdigit()]
    return sum(known) if known else None
