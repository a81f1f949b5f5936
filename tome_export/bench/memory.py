"""Peak memory of a model, measured in a process of its own that loads and runs it."""

from __future__ import annotations

import importlib
import io
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tome_export.runtime.environment import nvidia_smi
from tome_export.runtime.process import COMMAND, answers, request
from tome_export.runtime.registry import ORT_CPU, backend_of
from tome_export.runtime.runner import Runnable
from tome_export.spec import INPUT_NAME

if TYPE_CHECKING:
    from tome_export.patch import MergedModel

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
TIMEOUT_S = 600.0
RUNS = 2


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


def peak_memory(
    name: str,
    runnable: Runnable,
    further: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...],
    dtype: str = "float32",
) -> Memory:
    """Peak memory of a model on a backend, in a fresh process, on pixel values of a shape and type.

    ``further`` has the shapes of other inputs without the batch.
    """
    if name == ORT_CPU and runnable.precision == "bf16":
        return Memory(None, "bfloat16 is emulated in float32 on the CPU")
    backend, module = backend_of(name), runnable.module
    sent = Runnable(
        label=runnable.label,
        precision=runnable.precision,
        output_name=runnable.output_name,
        graph=runnable.graph,
        engines=dict(runnable.engines),
    )
    if backend.opens != "module":
        return measure(_prepared, (name, sent, dict(further), shape, dtype), gpu=backend.on_gpu())
    if module is None:
        return Memory(None, "the model is not at hand in PyTorch")
    import torch

    from tome_export.onnx.export import in_precision

    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
        file = Path(folder) / "module.pt"
        imports = sorted({type(part).__module__ for part in module.modules()})
        try:
            torch.save(in_precision(module, runnable.precision), file)
        # Models of a user's own function may hold what cannot be stored.
        except Exception as error:
            return Memory(None, f"the PyTorch model cannot be stored: {error}")
        # What is stored is in its precision, and need not be copied to get there.
        sent = replace(sent, precision="fp32")
        arguments = (name, sent, dict(further), shape, dtype, file, imports)
        return measure(_prepared, arguments, gpu=backend.on_gpu())


def _prepared(
    name: str,
    runnable: Runnable,
    further: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...],
    dtype: str,
    module: Path | None = None,
    imports: Sequence[str] = (),
) -> Callable[[], object]:
    """What loads a model and runs it; libraries are imported ahead."""
    import numpy as np

    from tome_export.runtime.inputs import unit_inputs

    inputs: dict[str, Any] = unit_inputs(further, shape[0])
    inputs[INPUT_NAME] = np.zeros(shape, dtype)
    backend = backend_of(name)
    backend.missing()
    for one in imports:
        importlib.import_module(one)

    def work() -> object:
        loaded = runnable
        if module is not None:
            import torch

            stored = cast("MergedModel", torch.load(module, weights_only=False))
            loaded = replace(runnable, module=stored)
        context = backend.open(loaded)
        runner = context.__enter__()
        for _ in range(RUNS):
            runner.infer(inputs)
        return context, runner

    return work


def measure(
    prepare: Callable[..., Callable[[], object]],
    arguments: Sequence[object],
    *,
    gpu: bool,
    timeout_s: float = TIMEOUT_S,
) -> Memory:
    """Measure what a call takes in a fresh process.

    ``prepare`` is a function of a module, and its arguments can be pickled; it imports libraries
    and returns what is measured. What that returns is kept until the end.
    """
    task = request(_measured, prepare, tuple(arguments), gpu)
    who = "the process that measures memory"
    try:
        done = subprocess.run(
            COMMAND, input=task, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Memory(None, f"{who} did not end within {timeout_s:g} s")
    errors = done.stderr.decode(errors="replace").strip().splitlines()
    failed = Memory(None, f"{who} failed: {errors[-1] if errors else 'it ended without a word'}")
    return next(answers(io.BytesIO(done.stdout)), failed)


def _measured(
    prepare: Callable[..., Callable[[], object]], arguments: Sequence[object], gpu: bool
) -> Iterator[Memory]:
    work = prepare(*arguments)
    # Importing libraries can take more for a moment than what is left of it afterwards.
    fresh = forget_peak()
    before = resident_bytes("VmRSS")
    kept = work()
    peak = resident_bytes("VmHWM")
    if gpu:
        found = _device_bytes(os.getpid())
        hidden = "nvidia-smi does not show this process, as in a container with its own processes"
        yield Memory(found, None if found is not None else hidden)
    elif fresh and before is not None and peak is not None:
        yield Memory(max(0, peak - before))
    else:
        yield Memory(None, f"{platform.system()} does not tell it here, by {STATUS} and {CLEAR}")
    del kept


def resident_bytes(field: str, status: Path = STATUS) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process; None on systems without them.

    psutil gives no peak on Linux, and ``ru_maxrss`` is a parent's handed on to its programs.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else int(kib) * 1024


def forget_peak(clear: Path = CLEAR) -> bool:
    """Let the peak of this process, ``VmHWM``, begin anew; whether the system does so."""
    try:
        with clear.open("r+") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _device_bytes(pid: int) -> int | None:
    rows = nvidia_smi("--query-compute-apps=pid,used_memory") or []
    found = [cells[1] for cells in rows if len(cells) == 2 and cells[0] == str(pid)]
    known = [int(mib) << 20 for mib in found if mib.isdigit()]
    return sum(known) if known else None
