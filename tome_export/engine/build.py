"""An engine from a graph, with the plugins that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.artifact import MODEL
from tome_export.engine import EngineOptions
from tome_export.engine.plugins import check_plugin_layers, register_plugins
from tome_export.progress import Progress

if TYPE_CHECKING:
    from tome_export.artifact.manifest import EngineInfo
    from tome_export.engine import EngineBuilder
    from tome_export.engine.plugins import Plugins


def build_engine(
    backend: EngineBuilder,
    artifact: Path,
    options: EngineOptions,
    progress: Progress,
    folder: Path | None = None,
    *,
    plugins: Plugins | None = None,
    model: Path | None = None,
) -> EngineInfo:
    """Build from ``artifact/model.onnx`` into ``folder`` (by default the artifact itself).

    Args:
        backend: That builds it.
        artifact: Directory with the model, and the kernels if it has plugin nodes.
        options: How to build.
        progress: Told the notes.
        folder: Where the engine goes.
        plugins: Those of the model; None if it has none.
        model: Another graph to build from.

    Raises:
        InputError: if no kernel of the artifact runs on this machine's GPU.
        MissingComponentError: if the backend cannot build here.
        ExportError: if it refuses the model.
    """
    if plugins:
        register_plugins(backend, artifact, plugins.kernels, options)
    output = (folder or artifact) / backend.file_name
    info = backend.build(model or artifact / MODEL, options, output, progress)
    if plugins:
        check_plugin_layers(info, plugins.nodes)
    for note in info.notes:
        progress.detail(note)
    return info
