"""Running parity on an engine: the shipped one, and one built from the instrumented twin."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import Artifact
from tome_export.engine import EngineOptions
from tome_export.engine.select import BACKENDS
from tome_export.pipeline.kernels import check_plugin_layers, plugins_of, register_plugins
from tome_export.progress import Progress
from tome_export.runtime.runner import Runner
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    import onnx


class EngineRunnerFactory:
    """Makes runners: of the artifact's own engine for its own graph, else of a new engine.

    Attributes:
        name: Of the candidate, for the report.
    """

    def __init__(self, artifact: Artifact, backend: str, progress: Progress) -> None:
        record = artifact.manifest["engines"][backend]
        self._shipped = artifact.path / record["file"]
        self._compatible = bool(record.get("version_compatible"))
        self._options = EngineOptions(batch=BatchRange.parse(record["batch"]))
        self._artifact = artifact
        self._backend = next(b for b in BACKENDS if b.name == backend)
        self._progress = progress
        self.name = f"{record['file']} on {backend}"

    @contextlib.contextmanager
    def __call__(self, model: onnx.ModelProto) -> Iterator[Runner]:
        """Load the shipped engine, or build and load one of an instrumented graph."""
        from tome_export.onnx.files import save
        from tome_export.onnx.twin import is_twin

        if not is_twin(model):
            compatible = self._compatible
            with self._backend.runner(self._shipped, version_compatible=compatible) as runner:
                yield runner
            return
        with tempfile.TemporaryDirectory(prefix="tome-export-") as folder:
            path, engine = Path(folder) / "twin.onnx", Path(folder) / self._backend.file_name
            save(model, path)
            self._progress.detail("building an engine of the instrumented twin")
            plugins = plugins_of(self._artifact.manifest)
            if plugins:
                register_plugins(self._backend, self._artifact.path, plugins.kernels, self._options)
            info = self._backend.build(path, self._options, engine, self._progress)
            if plugins:
                check_plugin_layers(info, plugins.nodes)
            with self._backend.runner(engine) as runner:
                yield runner
