"""Engines of TensorRT and TensorRT-RTX on a GPU, run with polygraphy's TrtRunner.

TrtRunner does device buffers, streams and dynamic output shapes for both libraries, and is what
NVIDIA's own tools compare engines with; writing that again would be untested on every machine
without a GPU. Two of its habits are dealt with here: it serves either TensorRT or TensorRT-RTX
per process, fixed when it is imported, and it looks for the CUDA runtime where system packages
put it, but not where the wheels of CUDA 13 do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tome_export.engine.builder import EngineBuilder, runtime_for
from tome_export.engine.messages import Messages, collect
from tome_export.engine.tensorrt import TensorRT as TensorRTBuilder
from tome_export.engine.tensorrt_rtx import TensorRTRTX as TensorRTRTXBuilder
from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.runtime.runner import Arrays, Backend, EngineFile, Runnable, Runner

if TYPE_CHECKING:
    import numpy as np

_POLYGRAPHY_TRT = "polygraphy.backend.trt"
_SILENT = 100  # above polygraphy's CRITICAL: its exceptions say what its log would


class EngineBackend(Backend):
    """Runs the engines of one library."""

    opens = "engine"
    builder: EngineBuilder

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        run = self.builder.can_run()
        return None if run.available else run.reason

    @contextmanager
    def open(self, runnable: Runnable) -> Iterator[Runner]:
        """See ``Backend.open``."""
        reason = self.missing()
        if reason is not None:
            raise MissingComponentError(reason)
        engine = runnable.engines.get(self.name)
        if engine is None:
            raise InputError(
                f"{runnable.label} has no {self.name} engine; build one with tome-export engine"
            )
        with _load(self.builder.module(), engine) as runner:
            yield runner


class TensorRT(EngineBackend):
    """Runs what TensorRT built on this kind of GPU."""

    name = "tensorrt"
    title = "TensorRT"
    builder = TensorRTBuilder()


class TensorRTRTX(EngineBackend):
    """Runs what was built anywhere; kernels are finished on the GPU at the first run."""

    name = "tensorrt-rtx"
    title = "TensorRT-RTX"
    builder = TensorRTRTXBuilder()


class _PolygraphyRunner:
    """An active TrtRunner that checks its inputs first."""

    def __init__(self, trt: ModuleType, engine: Any, runner: Any) -> None:
        self._trt = trt
        self._runner = runner
        self._limits: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                least, _, most = engine.get_tensor_profile_shape(name, 0)
                dtype = trt.nptype(engine.get_tensor_dtype(name))
                self._limits[name] = (tuple(least), tuple(most), dtype)

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See ``Runner.infer``."""
        import numpy as np
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        if set(inputs) != set(self._limits):
            raise InputError(
                f"inputs are {sorted(inputs)}; the engine takes {sorted(self._limits)}"
            )
        feed = {}
        for name, (least, most, dtype) in self._limits.items():
            array = np.ascontiguousarray(inputs[name])
            fits = len(array.shape) == len(least) and all(
                low <= size <= high
                for low, size, high in zip(least, array.shape, most, strict=True)
            )
            if array.dtype != dtype or not fits:
                raise InputError(
                    f"input {name!r} is {array.dtype} {array.shape}; the engine takes "
                    f"{np.dtype(dtype)} from {least} to {most}"
                )
            feed[name] = array
        with collect(self._trt) as (_, messages), G_LOGGER.verbosity(_SILENT):
            try:
                outputs = self._runner.infer(feed, check_inputs=False)
            except PolygraphyException as error:
                reason = messages.first_errors() if messages.errors else error
                raise ExportError(f"the engine failed to run: {reason}") from error
        # TrtRunner returns views of buffers that its next call overwrites.
        return {name: np.array(value, copy=True) for name, value in outputs.items()}


@contextmanager
def _load(trt: ModuleType, engine_file: EngineFile) -> Iterator[Runner]:
    engine_path = engine_file.path
    if not engine_path.is_file():
        raise InputError(f"no engine at {engine_path}; build one with tome-export engine")
    _prepare_polygraphy(trt)
    from polygraphy.backend.trt import TrtRunner
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    with collect(trt) as (logger, messages), G_LOGGER.verbosity(_SILENT):
        runtime = runtime_for(trt, logger, version_compatible=engine_file.version_compatible)
        engine = runtime.deserialize_cuda_engine(engine_path.read_bytes())
        if engine is None:
            raise InputError(
                f"{engine_path.name} cannot be loaded by {trt.__name__} {trt.__version__} on this "
                f"GPU: {messages.first_errors()}; build it here with tome-export engine"
            )
        if engine_file.weights is not None:
            _refit(trt, engine, logger, messages, engine_file)
        runner = TrtRunner(engine)
        try:
            runner.activate()
        except PolygraphyException as error:
            raise ExportError(f"{engine_path.name} cannot be started: {error}") from error
    try:
        yield _PolygraphyRunner(trt, engine, runner)
    finally:
        with G_LOGGER.verbosity(_SILENT):
            runner.deactivate()


def _refit(trt: ModuleType, engine: Any, logger: Any, messages: Messages, file: EngineFile) -> None:
    """Give an engine the weights of its ONNX model."""
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not (parser.refit_from_file(str(file.weights)) and refitter.refit_cuda_engine()):
        raise InputError(
            f"{file.path.name} does not take the weights of {file.weights}: "
            f"{messages.first_errors()}; build it again with tome-export engine"
        )


def _prepare_polygraphy(trt: ModuleType) -> None:
    """Point polygraphy to this library and to the CUDA runtime."""
    from polygraphy import config
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    wanted = trt.__name__ == "tensorrt_rtx"
    if _POLYGRAPHY_TRT in sys.modules and wanted != config.USE_TENSORRT_RTX:
        raise MissingComponentError(
            f"this process has already run an engine of the other library than {trt.__name__}; "
            "run the two in separate commands"
        )
    config.USE_TENSORRT_RTX = wanted
    before = os.environ.get("LD_LIBRARY_PATH")
    folders = [*filter(None, [before]), *(str(folder) for folder in _cuda_wheel_folders())]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
    try:
        with G_LOGGER.verbosity(_SILENT):
            from polygraphy import cuda

            cuda.wrapper()
    except (OSError, PolygraphyException) as error:
        raise MissingComponentError(
            "the CUDA runtime library (libcudart) was not found: pip install nvidia-cuda-runtime"
        ) from error
    finally:
        if before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = before


def _cuda_wheel_folders() -> list[Path]:
    """Folders with a CUDA runtime among the installed wheels, newest CUDA first."""
    spec = importlib.util.find_spec("nvidia")
    if spec is None or spec.submodule_search_locations is None:
        return []
    roots = [Path(location) for location in spec.submodule_search_locations]
    found = {lib.parent for root in roots for lib in root.glob("*/lib/libcudart.so*")}
    return sorted(found, reverse=True)
