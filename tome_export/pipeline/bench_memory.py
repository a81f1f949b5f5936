"""The process in which a model's memory is measured: this module, run with one JSON argument."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tome_export.bench.memory import Memory, measure, report
from tome_export.engine.select import BACKENDS as ENGINES
from tome_export.pipeline.backends import ORT_CPU, ORT_CUDA, TORCH, Subject
from tome_export.spec import INPUT_NAME

RUNS = 2


def peak_memory(name: str, subject: Subject, batch: int, shape: list[int], folder: Path) -> Memory:
    """Peak memory of a model on a backend, in a fresh process.

    Args:
        name: Of the backend.
        subject: The model; with an engine for the backend if that needs one.
        batch: Images per run.
        shape: Of one image.
        folder: For the PyTorch model on its way to the process.
    """
    from tome_export.artifact import MODEL

    if name == ORT_CPU and subject.precision == "bf16":
        return Memory(None, "bfloat16 is emulated in float32 on the CPU")
    gpu = name not in (ORT_CPU, TORCH)
    if name == TORCH:
        import torch

        from tome_export.onnx.export import in_precision

        gpu = torch.cuda.is_available()
        file = folder / "module.pt"
        precision: Any = subject.precision
        if subject.module is None:
            return Memory(None, "the model is not at hand in PyTorch")
        try:
            torch.save(in_precision(subject.module, precision), file)
        # Models of a user's own function may hold what cannot be stored.
        except Exception as error:
            return Memory(None, f"the PyTorch model cannot be stored: {error}")
        modules = sorted({type(part).__module__ for part in subject.module.modules()})
    else:
        file = subject.folder / MODEL if name in (ORT_CPU, ORT_CUDA) else subject.engines[name]
        modules = []
    request: dict[str, Any] = {
        "backend": name,
        "file": str(file),
        "shape": [batch, *shape],
        "modules": modules,
        "version_compatible": name in subject.version_compatible,
    }
    request |= {"output": subject.output_name, "further": dict(subject.further)}
    return measure(__name__, request, gpu=gpu)


def main(argument: str) -> None:
    """Measure one model.

    Args:
        argument: JSON: ``backend``, ``file``, ``shape`` of the images, shapes of the ``further``
            inputs by name, name of the ``output``, ``modules`` that the classes of a PyTorch
            model come from, and whether an engine is ``version_compatible``.
    """
    request = json.loads(argument)
    name, file = request["backend"], Path(request["file"])

    import numpy as np

    from tome_export.runtime.inputs import unit_inputs

    images = np.zeros(request["shape"], np.float32)
    further = unit_inputs(request["further"], len(images))
    compatible = request["version_compatible"]
    open_runner = _opener(name, file, request["output"], version_compatible=compatible)
    for module in request["modules"]:
        importlib.import_module(module)

    def work() -> object:
        runner = open_runner()
        for _ in range(RUNS):
            runner.infer({**further, INPUT_NAME: images})
        return runner

    report(work)


def _opener(name: str, file: Path, output_name: str, *, version_compatible: bool) -> Any:
    """What loads the model; libraries are imported here, ahead of the measurement."""
    if name in (ORT_CPU, ORT_CUDA):
        from tome_export.runtime import ort

        provider: ort.Provider = "cpu" if name == ORT_CPU else "cuda"
        ort.missing(provider)
        return lambda: ort.OrtRunner(file, provider)
    if name == TORCH:
        import torch

        from tome_export.runtime.torch_runner import TorchRunner

        return lambda: TorchRunner(torch.load(file, weights_only=False), output_name)
    engine = next(engine for engine in ENGINES if engine.name == name)
    engine.can_run()

    def load() -> Any:
        context = engine.runner(file, version_compatible=version_compatible)
        runner = context.__enter__()
        _OPEN.append(context)
        return runner

    return load


_OPEN: list[Any] = []
"""Contexts that stay open until the process ends."""

if __name__ == "__main__":
    main(sys.argv[1])
