"""The learned parts of reducers and compressors, kept in the artifact: it needs no other file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tome_export.errors import InputError

if TYPE_CHECKING:
    from tome_export.artifact import Artifact
    from tome_export.patch import MergedModel

REDUCER, COMPRESSOR = "reducer.safetensors", "compressor.safetensors"
"""Files of an artifact, each in the layout that its option ``weights`` reads."""

Part = TypeVar("Part")


def write_learned(model: MergedModel, folder: Path) -> None:
    """Write what was read from files, float32; random weights and none need no file."""
    from safetensors.torch import save_file

    parts: tuple[tuple[str, Any, Any], ...] = (
        (REDUCER, model.settings.reducer, model.reducer),
        (COMPRESSOR, model.settings.compressor, model.compressor),
    )
    for name, options, module in parts:
        if module is None or getattr(options, "weights", None) == "random":
            continue
        state = {key: value.contiguous() for key, value in module.state_dict().items()}
        if state:
            save_file(state, folder / name)


def with_own_weights(part: Part, artifact: Artifact, name: str) -> Part:
    """A reducer or compressor that reads an artifact's own file, which is all that it may read."""
    if name in artifact.manifest.files:
        return replace(part, weights=str(artifact.path / name))  # type: ignore[type-var]
    if (source := getattr(part, "weights", None)) not in (None, "random"):
        raise InputError(
            f"{artifact.path} lists no {name}, and its weights are from {source}; rebuild the "
            "artifact or copy it whole"
        )
    return part
