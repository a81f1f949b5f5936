"""A calibrated cascade in a model repository: its members, then the model that asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.artifact import Artifact
from tome_export.cascade.outcome import Settings
from tome_export.errors import InputError
from tome_export.pipeline.progress import Progress
from tome_export.pipeline.serve import ServeRequest, serve
from tome_export.serve.config import check_packages, config_from_text
from tome_export.serve.repository import CONFIG, check_repository, models_in, write
from tome_export.serve.source import check_free_name, plain_name, source_from_artifact
from tome_export.serve.spec import ServeOptions
from tome_export.serve.validate import validate

if TYPE_CHECKING:
    from tome_export.pipeline.cascade import CascadeRequest


@dataclass(frozen=True)
class ServedCascade:
    """What is in the repository now.

    Attributes:
        repository: Its directory.
        models: Names of all that belongs to the cascade, each after those that it needs.
        entry: The one a client asks.
        notes: What a user should know.
    """

    repository: Path
    models: tuple[str, ...]
    entry: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "repository": str(self.repository),
            "models": list(self.models),
            "entry": self.entry,
            "notes": list(self.notes),
        }


def check_served(members: Sequence[Artifact], repository: Path, name: str | None) -> None:
    """Find out before the calibration whether its result can be served.

    Raises:
        UsageError: if the name is none that a user may choose.
        InputError: if the repository is no place for one, or a member takes one batch size only.
        MissingComponentError: if the server's schema is not installed.
    """
    check_packages()
    check_repository(repository)
    if name is not None:
        check_free_name(name)
    for one in members:
        batch = source_from_artifact(one).batch
        if batch.is_static:
            raise InputError(
                f"{one.path} takes batches of exactly {batch.max}, and a cascade asks for as many "
                "images as need it; rebuild the artifact with a batch range such as 1:8:32"
            )


def serve_cascade(
    request: CascadeRequest,
    members: Sequence[Artifact],
    macs: Sequence[int],
    policy_macs: int,
    settings: Settings,
    progress: Progress,
) -> ServedCascade:
    """Write the members as ``tome-export serve`` does, then the cascade.

    Raises:
        InputError: if the repository cannot take them.
    """
    from tome_export.serve.cascades import (
        CASCADE,
        Member,
        cascade_folder,
        cascade_pipeline_folders,
    )

    assert request.repository is not None  # noqa: S101 (asked for by the caller)
    repository = check_repository(request.repository)
    paths = tuple(one.path for one in members)
    options = ServeOptions(name=request.name)
    done = serve(ServeRequest(paths, repository, options, force=request.force), progress)
    names = [model.name for model in done.models[: len(members)]]
    configs = [repository / name / CONFIG for name in names]
    asked = [
        Member(name, count, config_from_text(path.read_text(), str(path)))
        for name, count, path in zip(names, macs, configs, strict=True)
    ]
    base = request.name or plain_name(members[-1].manifest["model"]["name"])
    folders = [cascade_folder(f"{base}{CASCADE}", asked, settings, policy_macs, ServeOptions())]
    if request.preprocess:
        folders += cascade_pipeline_folders(members[-1], folders[0], ServeOptions())
    known = {*models_in(repository), *(folder.name for folder in folders)}
    for folder in folders:
        validate(folder, models=known)
    written = write(repository, folders, force=request.force)
    models = (*names, *(model.name for model in written))
    return ServedCascade(repository, models, models[-1], done.notes)
