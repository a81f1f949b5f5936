"""A calibrated cascade in a repository: a model that runs its policy and asks its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tome_export.artifact import Artifact
from tome_export.artifact.cascade import Cascade, ServedCascade
from tome_export.progress import Progress
from tome_export.serve import names
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    check_packages,
    front_config,
    python_folder,
    tensor_values,
)
from tome_export.serve.ensemble import pipeline_folders
from tome_export.serve.main import ServeRequest, serve, why_untested
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.repository import (
    CASCADE_SETTINGS,
    cascade_exists,
    check_ours,
    check_repository,
    versions_of,
)
from tome_export.spec import Preprocessing

OUTPUTS = (("budget", "int32"), ("macs", "int64"))
"""What a cascade gives besides the models' outputs, each ``[B, 1]``."""


@dataclass(frozen=True)
class CascadeServeRequest:
    """Where a cascade is to be served, and how.

    Attributes:
        repository: The model repository.
        members: Artifacts, the one of the fewest MACs first.
        name: What the names of the models begin with; None for the model's.
        preprocess: Write also a pipeline that takes encoded images.
        force: Replace existing models.
        self_test: Have a server answer first; see ``ServeRequest``.
    """

    repository: Path
    members: tuple[Artifact, ...]
    name: str | None = None
    preprocess: bool = False
    force: bool = False
    self_test: bool | None = False

    @property
    def model(self) -> str:
        """Name of the model that asks the members."""
        return (
            f"{self.name or names.plain_name(self.members[-1].manifest.model.name)}{names.CASCADE}"
        )


def check_cascade(request: CascadeServeRequest) -> None:
    """Find out before the calibration whether its result can be served."""
    check_packages()
    model = check_repository(request.repository) / request.model
    if request.name is not None:
        names.check_chosen_name(request.name)
    around = (names.PREPROCESS, names.POSTPROCESS, names.PIPELINE) if request.preprocess else ()
    for folder in (model, *(model.with_name(f"{model.name}{end}") for end in around)):
        if folder.exists():
            check_ours(folder)
    if versions_of(model) and not request.force:
        raise cascade_exists(model)
    files = [model_file_from_artifact(one) for one in request.members]
    if request.self_test:
        why_untested(files, request.self_test)


def serve_cascade(
    request: CascadeServeRequest, result: Cascade, policy_file: Path, progress: Progress
) -> ServedCascade:
    """Write the members as ``tome-export serve`` does, and the cascade with them, or nothing.

    The model runs its policy with a copy of ``policy_file``.
    """
    options = ServeOptions()

    def further(members: Sequence[ModelFolder]) -> list[ModelFolder]:
        pixels = request.members[-1].manifest.preprocessing
        cascade = cascade_folder(request.model, members, result, policy_file, options, pixels)
        if not request.preprocess:
            return [cascade]
        most = cascade.config.max_batch_size
        around = pipeline_folders(request.members[-1], cascade.name, options, most, OUTPUTS)
        return [cascade, *around]

    serving = ServeRequest(
        tuple(one.path for one in request.members),
        request.repository,
        ServeOptions(name=request.name),
        force=request.force,
        self_test=request.self_test,
    )
    done = serve(serving, progress, further)
    models = [model.name for model in done.models]
    first = models.index(request.model)
    members = (name for name in models[:first] if not name.endswith(names.ROUTER))
    return ServedCascade(
        repository=str(done.repository),
        models=(*members, *models[first:]),
        entry=models[-1],
        notes=(*done.notes, *filter(None, [done.self_test])),
    )


def cascade_folder(
    name: str,
    members: Sequence[ModelFolder],
    result: Cascade,
    policy_file: Path,
    options: ServeOptions,
    preprocessing: Preprocessing | None = None,
) -> ModelFolder:
    """A model that runs a calibrated policy and asks its members, those of fewer MACs first.

    ``preprocessing`` says in which form they take pixel values; None for ``float32``.
    """
    config = front_config(
        "cascade",
        name,
        {member.name: member.config for member in members},
        options,
        [tensor_values(tensor, dtype, [1]) for tensor, dtype in OUTPUTS],
    )
    settings = {
        **result.settings.model_dump(mode="json"),
        "policy_macs": result.policy_macs,
        "members": [
            {"model": member.name, "macs": one.macs}
            for member, one in zip(members, result.members, strict=True)
        ],
    }
    if preprocessing is not None and preprocessing.form != "float32":
        settings["pixels"] = asdict(preprocessing)
    return python_folder(config, "cascade", CASCADE_SETTINGS, settings, options, [policy_file])
