"""An artifact as a function of images: ``tome_export.load``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tome_export.artifact import Artifact
from tome_export.errors import InputError, UsageError
from tome_export.progress import Silent
from tome_export.runtime.model import check_engine, model_from_artifact, open_runner
from tome_export.runtime.registry import backend_of, require
from tome_export.runtime.runner import infer_in_batches
from tome_export.spec import INPUT_NAME

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class LoadedArtifact:
    """The model of an artifact, loaded on a backend; a context manager that unloads it.

    Attributes:
        artifact: The artifact, whose manifest says what the model takes and gives.
    """

    def __init__(self, path: Path, backend: str) -> None:
        if backend_of(backend).opens == "module":
            raise UsageError(
                f"backend is {backend!r}, which runs no artifact; choose one that runs graphs or "
                "engines, such as 'ort-cpu'"
            )
        require((backend,))
        self.artifact = Artifact.open(path.absolute())
        check_engine(self.artifact, backend)
        self._batch = self.artifact.manifest.batch_on(backend)
        loaded = model_from_artifact(self.artifact, str(path))
        self._stack = ExitStack()
        self._runner = self._stack.enter_context(open_runner(backend, loaded, Silent()))

    def __call__(self, pixel_values: Array, **inputs: Array) -> dict[str, Array]:
        """Run any number of images, in batches of at most the largest that the model takes.

        Args:
            pixel_values: ``[B, C, H, W]`` float32, preprocessed as the manifest says;
                ``[B, F, C, H, W]`` for a model of videos.
            **inputs: Further inputs by name, batch first.

        Returns:
            Every output by name, batch first.

        Raises:
            InputError: if there is no image, or a name, dtype or shape does not fit the model.
            ExportError: if the model fails.
        """
        count = len(pixel_values)
        if count == 0:
            raise InputError("pixel_values holds no image; give one or more")
        size = min(self._batch.max, max(self._batch.min, count))
        return infer_in_batches(self._runner, {INPUT_NAME: pixel_values, **inputs}, count, size)

    def close(self) -> None:
        """Unload the model."""
        self._stack.close()

    def __enter__(self) -> LoadedArtifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
