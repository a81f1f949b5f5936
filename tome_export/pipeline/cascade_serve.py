"""A calibrated cascade in a model repository: its members, then the model that asks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tome_export.artifact import Artifact
from tome_export.artifact.cascade import Policy, ServedCascade
from tome_export.cascade.calibrate import Costs
from tome_export.pipeline.serve import ServeRequest, serve
from tome_export.progress import Progress
from tome_export.serve.client import ROUTER
from tome_export.serve.config import ModelFolder, ServeOptions, check_packages
from tome_export.serve.repository import (
    cascade_there,
    check_ours,
    check_repository,
    versions_of,
)
from tome_export.serve.source import check_free_name, plain_name, source_from_artifact

if TYPE_CHECKING:
    from tome_export.pipeline.cascade import CascadeRequest


def check_served(request: CascadeRequest, members: Sequence[Artifact]) -> None:
    """Find out before the calibration whether its result can be served.

    Raises:
        UsageError: if the name is none that a user may choose.
        InputError: if the repository is no place for one, a folder of its name is not ours or
            holds another calibration and is not to be replaced.
        MissingComponentError: if the server's schema is not installed.
    """
    check_packages()
    assert request.repository is not None  # noqa: S101 (asked for by the caller)
    repository = check_repository(request.repository)
    if request.name is not None:
        check_free_name(request.name)
    model = repository / _name(request, members)
    for end in ("", "_preprocess", "_postprocess", "_pipeline") if request.preprocess else ("",):
        folder = model.with_name(f"{model.name}{end}")
        if folder.exists():
            check_ours(folder)
    if versions_of(model) and not request.force:
        raise cascade_there(model)
    for one in members:
        source_from_artifact(one)


def serve_cascade(
    request: CascadeRequest,
    members: Sequence[Artifact],
    costs: Costs,
    policy: Policy,
    progress: Progress,
) -> ServedCascade:
    """Write the members as ``tome-export serve`` does, and the cascade with them, or nothing.

    Raises:
        InputError: if the repository cannot take them.
    """
    from tome_export.serve.cascades import Member, cascade_folder, cascade_pipeline_folders

    assert request.repository is not None  # noqa: S101 (asked for by the caller)

    def cascade_of(folders: Sequence[ModelFolder]) -> list[ModelFolder]:
        asked = [
            Member(folder.name, count, folder.config)
            for folder, count in zip(folders, costs.members, strict=True)
        ]
        settings = policy.model_dump(mode="json")
        name = _name(request, members)
        made = cascade_folder(name, asked, settings, costs.policy, ServeOptions())
        if not request.preprocess:
            return [made]
        return [made, *cascade_pipeline_folders(members[-1], made, ServeOptions())]

    paths = tuple(one.path for one in members)
    options = ServeOptions(name=request.name)
    asking = ServeRequest(paths, request.repository, options, force=request.force)
    done = serve(asking, progress, cascade_of)
    names = [model.name for model in done.models]
    first = names.index(_name(request, members))
    asked = (name for name in names[:first] if not name.endswith(ROUTER))
    models = (*asked, *names[first:])
    return ServedCascade(
        repository=str(done.repository), models=models, entry=models[-1], notes=done.notes
    )


def _name(request: CascadeRequest, members: Sequence[Artifact]) -> str:
    from tome_export.serve.cascades import CASCADE

    base = request.name or plain_name(members[-1].manifest.model.name)
    return f"{base}{CASCADE}"
