"""A step: parts with a time limit each, in processes of their own, most valuable first."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu import ROOT, rows
from benchmarks.gpu.prepared import COMPUTE_CAPABILITIES, Prepared, PreparedInfo

DEFAULT_PREPARED = ROOT / "out" / "gpu"
DEFAULT_OUT = ROOT / "benchmarks" / "results" / "gpu.json"
INCOMPLETE = 3
NOTHING_MEASURED = 4
SHORTEST_S = 8.0
"""A part is not begun with less time than this: torch alone takes as long to start."""


@dataclass(frozen=True)
class Part:
    """What is run in one process.

    Attributes:
        name: Distinct among all steps.
        function: ``module:function`` in this package, called with a ``Context``.
        expected_s: Seconds it should take with a cold start.
        limit_s: Seconds after which it is ended.
        question: What it answers.
        exact_gpu: Whether it needs a GPU of the very compute capability that was prepared for, as
            ONNX Runtime's machine code does.
    """

    name: str
    function: str
    expected_s: float
    limit_s: float
    question: str
    exact_gpu: bool = False


@dataclass(frozen=True)
class BenchmarkStep:
    """Parts that belong to one command.

    Attributes:
        number: 1, 2 or 3.
        limit_s: Seconds for the whole command, its start included.
        parts: In the order of their worth.
    """

    number: int
    limit_s: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Context:
    """What a part is given.

    Attributes:
        prepared: The folder that was brought.
        device: ``cuda``; ``cpu`` is for trying a part out.
        seconds: Until it is ended.
    """

    prepared: Prepared
    device: Literal["cuda", "cpu"]
    seconds: float


def run_step(
    step: BenchmarkStep,
    left: tuple[Part, ...] = (),
    arguments: list[str] | None = None,
    program: tuple[str, ...] | None = None,
) -> int:
    """The command of a step.

    Args:
        step: Its parts.
        left: Parts of earlier steps, run after these if their rows say that they were not done.
        arguments: Of the command line.
        program: What a part's process runs, if not the step's own module; it calls this function.

    Returns:
        Exit status: 0 all passed, 1 something failed (its row says what), 2 usage, 3 nothing
        failed, but there was no time or no code for some parts, 4 no GPU that it can run on, or no
        prepared folder.
    """
    parts = {part.name: part for part in (*step.parts, *left)}
    options = _options(step, parts, arguments)
    prepared = Prepared(options.prepared)
    if options.worker is not None:
        module, _, name = parts[options.worker].function.partition(":")
        function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
        function(Context(prepared, options.device, options.limit))
        return 0
    end = time.monotonic() + options.limit
    problem = missing(prepared, options.device)
    if problem is not None:
        print(f"nothing was measured: {problem}", file=sys.stderr)
        return NOTHING_MEASURED
    info = prepared.read()
    other_gpu = unfit_gpu(info) if options.device == "cuda" else None
    if other_gpu is not None and all(part.exact_gpu for part in step.parts):
        print(f"nothing was measured: {other_gpu}", file=sys.stderr)
        return NOTHING_MEASURED
    unpacked = prepared.unpack_wheels()
    sys.path.insert(0, str(prepared.site))
    print(f"from the prepared folder: {', '.join(unpacked) or 'no package'}", flush=True)
    results = rows.Results(options.out, options.earlier or options.out)
    wanted = list(step.parts)
    wanted += [part for part in left if part.name not in results.done()]
    if options.only:
        wanted = [part for part in wanted if part.name in options.only]
    environment = {
        **rows.environment(options.commit or _commit(info.commit)),
        "prepared": asdict(info),
    }
    print(f"{environment['gpu']}, driver {environment['driver']}", flush=True)
    results.begin(f"step {step.number}", environment, [part.name for part in wanted])
    program = program or ("-m", f"benchmarks.gpu.step{step.number}")
    for part in wanted:
        if other_gpu is not None and part.exact_gpu:
            _leave_out(part, other_gpu, results)
        else:
            _run_part(part, program, options, end, prepared, results)
    own = [row for row in results.rows if row["run"] == f"step {step.number}"]
    print("\n".join(["", *rows.table(own)]))
    wrong = [row for row in own if rows.failed(row)]
    print(f"{len(own)} rows, {len(wrong)} failed: {options.out}")
    for row in wrong:
        print(f"  {rows.text(row)}")
    undone = [part.name for part in wanted if part.name not in results.done()]
    print(f"left out or cut short: {', '.join(undone) or 'nothing'}")
    return 1 if wrong else INCOMPLETE if undone else 0


def _options(
    step: BenchmarkStep, parts: dict[str, Part], arguments: list[str] | None
) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        unknown = [name for name in found if name not in parts]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, unknown))} is no part; expected some of {', '.join(parts)}"
            )
        return found

    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.step{step.number}",
        description="See benchmarks/gpu/README.md.",
    )
    parser.add_argument("--prepared", type=Path, default=DEFAULT_PREPARED, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=step.limit_s, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="of the JSON rows")
    parser.add_argument("--earlier", type=Path, help="rows of earlier steps, if not in --out")
    parser.add_argument("--only", type=names, metavar="PART,PART")
    parser.add_argument("--commit", help="of this copy, where it has no git history")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=list(parts), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def missing(prepared: Prepared, device: str) -> str | None:
    """What this machine lacks, or None."""
    if device == "cuda" and rows.gpu_state() is None:
        return "nvidia-smi finds no NVIDIA GPU"
    try:
        info = prepared.read()
    except OSError as error:
        return (
            f"{prepared.folder} is not a prepared folder ({error.strerror}); run 'python -m "
            "benchmarks.gpu.prepare' where there are a network and the Triton language"
        )
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if own != info.python and device == "cuda":
        return (
            f"this is Python {own}; {prepared.folder} was prepared for {info.python}: use "
            f"'python -m benchmarks.gpu.prepare --python {own}'"
        )
    return None


def unfit_gpu(info: PreparedInfo) -> str | None:
    """Why ONNX Runtime's code is not for this GPU and what to do, or None if it is."""
    state = rows.gpu_state() or {}
    own, prepared = state.get("compute_cap"), info.compute_capability
    if own == prepared:
        return None
    fix = f"use 'python -m benchmarks.gpu.prepare --compute-capability {own}'"
    if own not in COMPUTE_CAPABILITIES:
        fix = f"there is code for {', '.join(COMPUTE_CAPABILITIES)}; steps 1 and 3 need none"
    return f"this GPU has compute capability {own}; ONNX Runtime was prepared for {prepared}: {fix}"


def _commit(prepared: str) -> str | None:
    """Where there is no history here, the commit that prepared the folder."""
    return None if (ROOT / ".git").exists() else prepared


def _run_part(
    part: Part,
    program: tuple[str, ...],
    options: argparse.Namespace,
    end: float,
    prepared: Prepared,
    results: rows.Results,
) -> None:
    """Run one part and collect its rows as they come.

    A part that fails, or is not done in time, adds a row that says so. One that the whole step's
    limit cuts short has not failed.
    """
    limit_s = min(part.limit_s, end - time.monotonic())
    if limit_s < min(SHORTEST_S, part.limit_s):
        _leave_out(part, "no time was left", results)
        return
    command = [sys.executable, *program, "--worker", part.name]
    command += ["--prepared", str(prepared.folder), "--device", options.device]
    command += ["--limit", f"{limit_s:.1f}"]
    path = [str(prepared.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
    }
    started = time.monotonic()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        timer = threading.Timer(limit_s, _end, [process.pid])
        timer.start()
        try:
            for line in process.stdout or ():
                row = rows.row_from_line(line)
                if row is None:
                    print(line, end="", file=sys.stderr, flush=True)
                else:
                    print(rows.text(results.add(part.name, row)), flush=True)
            status = process.wait()
        finally:
            timer.cancel()
            _end(process.pid)
    seconds = time.monotonic() - started
    about: rows.Row = {"wall_s": seconds, "state": rows.gpu_state()}
    if status != 0:
        ended = seconds >= limit_s
        reason = f"was ended after {limit_s:.0f} s" if ended else "see its traceback"
        if ended and limit_s < part.limit_s:
            about["skipped"] = f"{reason}, when the step's time was over"
        else:
            about["error"] = f"the process ended with status {status}: {reason}"
    print(
        rows.text(results.add(part.name, {"benchmark": "part", "done": status == 0, **about})),
        flush=True,
    )


def _leave_out(part: Part, reason: str, results: rows.Results) -> None:
    """Add the row of a part that is not run, and show it."""
    row = results.add(part.name, {"benchmark": "part", "done": False, "skipped": reason})
    print(rows.text(row), flush=True)


def _end(leader: int) -> None:
    """End a process and all that it started, which share its session."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
