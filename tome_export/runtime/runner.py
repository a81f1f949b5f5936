"""The one way in which everything that runs is opened and called. Imports nothing heavy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from tome_export.engine import EngineBuilder
    from tome_export.patch import MergedModel
    from tome_export.spec import Precision

Arrays: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"


class Runner(Protocol):
    """A loaded model."""

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch.

        Args:
            inputs: Every input by name, batch first, in host memory.

        Returns:
            Every output by name, batch first, in host memory and not overwritten by a later run.

        Raises:
            InputError: if a name, dtype or shape does not fit the model.
            ExportError: if the model fails.
        """


@dataclass(frozen=True)
class EngineFile:
    """An engine, ready to be loaded.

    Attributes:
        version_compatible: Whether it was built so. Only then the code that comes with such an
            engine may run; it is refused otherwise.
        weights: ONNX model that an engine without weights is given those of; None for any other.
    """

    path: Path
    version_compatible: bool = False
    weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """What a backend makes a runner from: it takes the part that it ``opens``.

    Attributes:
        label: For messages: ``merged``, ``unmerged``, or the path of an artifact.
        graph: The ONNX graph or its file, which takes less memory.
        engines: Ready engines by backend.
        module: The same model in PyTorch, fp32.
    """

    label: str
    precision: Precision
    output_name: str
    graph: onnx.ModelProto | Path | None = None
    engines: Mapping[str, EngineFile] = field(default_factory=dict)
    module: MergedModel | None = None


class Backend(ABC):
    """A way to run models.

    Attributes:
        name: What users and files call it.
        title: What messages call it.
        opens: The part of a ``Runnable`` that it loads.
        builder: What builds the engine that it loads; None unless it opens one.
    """

    name: str
    title: str
    opens: Literal["graph", "engine", "module"] = "graph"
    builder: EngineBuilder | None = None

    @abstractmethod
    def missing(self) -> str | None:
        """One line that says why it cannot run here and what to do; None if it can."""

    @abstractmethod
    def open(self, runnable: Runnable) -> AbstractContextManager[Runner]:
        """Load a model; it is unloaded when the context ends.

        Raises:
            MissingComponentError: if the backend cannot run here.
            InputError: if what it opens is not there, or the engine is of another version.
            ExportError: if it refuses the model.
        """

    def computes(self, precision: Precision) -> Precision:
        """What it computes a model of that precision in: another where that is emulated."""
        return precision

    def on_gpu(self) -> bool:
        """Whether a model's memory is that of a GPU."""
        return True


def infer_in_batches(
    runner: Runner, inputs: Arrays, count: int, size: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Run ``count`` images in batches of exactly ``size``, the last one padded."""
    import numpy as np

    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        part = runner.infer({k: v[index] for k, v in inputs.items()})
        parts.append({k: v[: min(size, count - start)] for k, v in part.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
