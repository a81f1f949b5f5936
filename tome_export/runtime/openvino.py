"""OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.runtime.ort import graph_of
from tome_export.runtime.runner import Arrays, Backend, Runnable, Runner
from tome_export.spec import Precision

if TYPE_CHECKING:
    import numpy as np


class OpenVino(Backend):
    """Computes in float32 whatever the precision of the graph: on many CPUs bfloat16 is default."""

    name = "openvino"
    title = "OpenVINO CPU"

    def missing(self) -> str | None:
        """See ``Backend.missing``."""
        try:
            with _unreported():
                import openvino  # noqa: F401
        except ModuleNotFoundError:
            return "openvino is not installed; install tome-export[openvino]"
        except (ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            return f"openvino does not load ({reason}); reinstall it with pip install openvino"
        return None

    @contextlib.contextmanager
    def open(self, runnable: Runnable) -> Iterator[Runner]:
        """See ``Backend.open``."""
        reason = self.missing()
        if reason is not None:
            raise MissingComponentError(reason)
        import openvino
        from openvino.properties import hint

        settings = {
            hint.inference_precision(): openvino.Type.f32,
            hint.execution_mode(): hint.ExecutionMode.ACCURACY,
            hint.performance_mode(): hint.PerformanceMode.LATENCY,
        }
        graph = graph_of(runnable)
        with contextlib.ExitStack() as stack:
            if isinstance(graph, Path):
                loadable: bytes | str = str(graph)
            else:
                from tome_export.onnx.files import serialized

                loadable = stack.enter_context(serialized(graph))
            try:
                core = _core()
                compiled = core.compile_model(core.read_model(loadable), "CPU", settings)
            except RuntimeError as error:
                raise ExportError(_refusal(openvino.__version__, error)) from error
            del graph, loadable
            yield _OpenVinoRunner(compiled)

    def computes(self, precision: Precision) -> Precision:  # noqa: ARG002
        """See ``Backend.computes``."""
        return "fp32"

    def on_gpu(self) -> bool:
        """See ``Backend.on_gpu``."""
        return False


class _OpenVinoRunner:
    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._count = len(compiled.inputs)
        self._names = {name for port in compiled.inputs for name in port.get_names()}

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """See ``Runner.infer``."""
        # One that is missing would be that of the run before.
        if len(inputs) != self._count or not set(inputs) <= self._names:
            raise InputError(f"inputs are {sorted(inputs)}; the model takes {sorted(self._names)}")
        try:
            results = self._request.infer(dict(inputs))
        except RuntimeError as error:
            raise ExportError(f"openvino failed to run the model: {_line(error)}") from error
        return {name: value for port, value in results.items() for name in port.get_names()}


@functools.cache
def _core() -> Any:
    """The only one of this process.

    Each has a stack of its own for signals, and on its end puts back the one that it found: of two
    that end in the order in which they were made, the second puts back that of the first, which is
    gone, and the next Ctrl-C is a segmentation fault.
    """
    import openvino

    return openvino.Core()


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Import OpenVINO as where its reporter, a package of its own, is not installed.

    With it, the import alone writes an identifier into the home folder and asks Google Analytics
    to count it; no variable forbids that. Who has opted in with ``opt_in_out`` is let be.
    """
    reporter = "openvino_telemetry"
    opted_in = False
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        opted_in = (Path.home() / "intel" / reporter).read_text().strip() == "1"
    if opted_in or reporter in sys.modules:
        yield
        return
    sys.modules[reporter] = None  # type: ignore[assignment]  # makes its import fail
    try:
        yield
    finally:
        del sys.modules[reporter]


def _refusal(version: str, error: Exception) -> str:
    who = f"openvino {version.partition('-')[0]}"
    unknown = re.search(r"No conversion rule found for operations: ([^\n]+)", str(error))
    if unknown is None:
        return f"{who} cannot load the model: {_line(error)}"
    return (
        f"{who} has no operators {unknown[1]}; build the artifact with --merge-op matmul, which "
        "has standard ones"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
