"""Peak memory of a model, measured in a process of its own: this module, run with a JSON argument.

The process loads the model and runs it, then says what it took and waits until it is let go, so
that the driver can be asked what it holds on a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tome_export.bench.environment import nvidia_smi
from tome_export.runtime.registry import backend_of
from tome_export.runtime.runner import EngineFile, Runnable
from tome_export.spec import INPUT_NAME

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
TIMEOUT_S = 600.0
RUNS = 2

_START = """
import sys
# Python looks for modules in the current folder first, where a user may have a torch or an inspect.
if sys.path[:1] == [""]:
    del sys.path[0]
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


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


def forget_peak(clear: Path = CLEAR) -> bool:
    """Let the peak of this process, ``VmHWM``, begin anew; whether the system does so.

    Importing libraries can take more for a moment than what is left of it afterwards.
    """
    try:
        with clear.open("r+") as file:
            file.write("5")
    except OSError:
        return False
    return True


def report(work: Callable[[], object]) -> None:
    """In the process of its own: do the work, print what it took, wait for standard input.

    Args:
        work: Loads and runs the model; what it returns is kept until the end. Libraries must have
            been imported, or they are counted.
    """
    fresh = forget_peak()
    before = resident_bytes("VmRSS")
    kept = work()
    peak = resident_bytes("VmHWM")
    taken = max(0, peak - before) if fresh and before is not None and peak is not None else None
    sys.stdout.write(json.dumps({"peak_bytes": taken}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del kept


def measure(
    module: str, request: Mapping[str, Any], *, gpu: bool, timeout_s: float = TIMEOUT_S
) -> Memory:
    """Run a module that calls ``report`` and read what the model took.

    Args:
        module: Its name; it gets the request as JSON in its first argument.
        request: What to load and run.
        gpu: Whether to count device memory.
        timeout_s: Seconds in which all of it must be done.
    """
    # In a file, not a pipe: whoever fills a pipe that nobody reads waits for ever.
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, module, json.dumps(dict(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            # Whatever libraries print before it is not the answer.
            line = next((text for text in process.stdout or () if text.startswith(_ANSWER)), None)
            device = _device_bytes(process.pid) if gpu and line is not None else None
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if line is None:
            why = f"did not end within {timeout_s:g} s" if late.is_set() else _failure(errors)
            return Memory(None, f"the process that measures memory {why}")
    if gpu:
        hidden = "nvidia-smi does not show this process, as in a container with its own processes"
        return Memory(device, None if device is not None else hidden)
    taken = json.loads(line)["peak_bytes"]
    no_peak = f"{os.uname().sysname} does not tell it here, by {STATUS} and {CLEAR}"
    return Memory(taken, None if taken is not None else no_peak)


_ANSWER = '{"peak_bytes"'


def _failure(errors: Any) -> str:
    errors.seek(0)
    last = (errors.read().strip().splitlines() or ["it ended without a word"])[-1]
    return f"failed: {last}"


def _device_bytes(pid: int) -> int | None:
    """Device memory of a process on all GPUs."""
    rows = nvidia_smi("--query-compute-apps=pid,used_memory") or []
    found = [cells[1] for cells in rows if len(cells) == 2 and cells[0] == str(pid)]
    known = [int(mib) << 20 for mib in found if mib.isdigit()]
    return sum(known) if known else None


def peak_memory(
    name: str, runnable: Runnable, further: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> Memory:
    """Peak memory of a model on a backend, in a fresh process.

    Args:
        name: Of the backend.
        runnable: The model; its graph is a file.
        further: Inputs besides the images: shape of each without the batch.
        shape: ``[B, C, H, W]`` of the images.
    """
    backend = backend_of(name)
    if name == "ort-cpu" and runnable.precision == "bf16":
        return Memory(None, "bfloat16 is emulated in float32 on the CPU")
    request: dict[str, Any] = {"backend": name, "shape": shape, "further": dict(further)}
    request |= {"output_name": runnable.output_name, "precision": runnable.precision}
    if backend.opens == "engine":
        engine = runnable.engines[name]
        request["engine"] = {**asdict(engine), "path": str(engine.path)}
    if backend.opens != "module":
        request["graph"] = str(runnable.graph)
        return measure(__name__, request, gpu=backend.on_gpu())
    import torch

    from tome_export.onnx.export import in_precision

    if runnable.module is None:
        return Memory(None, "the model is not at hand in PyTorch")
    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
        # What is stored is in its precision, and need not be copied to get there.
        request |= {"module": f"{folder}/module.pt", "precision": "fp32"}
        request["classes_of"] = sorted(
            {type(part).__module__ for part in runnable.module.modules()}
        )
        try:
            torch.save(in_precision(runnable.module, runnable.precision), request["module"])
        # Models of a user's own function may hold what cannot be stored.
        except Exception as error:
            return Memory(None, f"the PyTorch model cannot be stored: {error}")
        return measure(__name__, request, gpu=backend.on_gpu())


def main(argument: str) -> None:
    """Measure the model of a request of ``peak_memory``; libraries are imported ahead of it."""
    import numpy as np

    from tome_export.runtime.inputs import unit_inputs

    request = json.loads(argument)
    name = request["backend"]
    images = np.zeros(request["shape"], np.float32)
    further = unit_inputs(request["further"], len(images))
    runnable = Runnable(
        label="it",
        precision=request["precision"],
        output_name=request["output_name"],
        graph=Path(request["graph"]) if "graph" in request else None,
        engines={name: _engine(request["engine"])} if "engine" in request else {},
    )
    backend = backend_of(name)
    backend.missing()
    for module in request.get("classes_of", ()):
        importlib.import_module(module)

    def work() -> object:
        loaded = runnable
        if "module" in request:
            import torch

            loaded = replace(runnable, module=torch.load(request["module"], weights_only=False))
        context = backend.open(loaded)
        runner = context.__enter__()
        for _ in range(RUNS):
            runner.infer({**further, INPUT_NAME: images})
        return context, runner

    report(work)


def _engine(values: Mapping[str, Any]) -> EngineFile:
    return EngineFile(Path(values["path"]), values["version_compatible"])


if __name__ == "__main__":
    main(sys.argv[1])
