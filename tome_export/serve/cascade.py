"""A calibrated cascade in a model repository: its members, then the model that asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tome_export.artifact import Artifact
from tome_export.artifact.cascade import Policy, ServedCascade
from tome_export.cascade.calibrate import Costs
from tome_export.progress import Progress
from tome_export.serve.client import ROUTER
from tome_export.serve.config import ModelFolder, ServeOptions, check_packages
from tome_export.serve.main import ServeRequest, serve, why_untested
from tome_export.serve.repository import (
    cascade_there,
    check_ours,
    check_repository,
    versions_of,
)
from tome_export.serve.source import check_free_name, plain_name, source_from_artifact


@dataclass(frozen=True)
class CascadeServing:
    """Where a cascade is to be served, and how.

    Attributes:
        repository: The model repository.
        members: Artifacts, the one of the fewest MACs first.
        name: What the names of the models begin with; None for the model's.
        preprocess: Write also a pipeline that takes encoded images.
        force: Replace existing models.
        self_test: As of ``ServeRequest``.
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
        from tome_export.serve.cascades import CASCADE

        base = self.name or plain_name(self.members[-1].manifest.model.name)
        return f"{base}{CASCADE}"

    def check(self) -> None:
        """Find out before the calibration whether its result can be served.

        Raises:
            UsageError: if the name is none that a user may choose.
            InputError: if the repository is no place for one, a folder of its name is not ours or
                holds another calibration and is not to be replaced.
            MissingComponentError: if the server's schema is not installed, or what a self-test
                needs that was asked for.
        """
        check_packages()
        repository = check_repository(self.repository)
        if self.name is not None:
            check_free_name(self.name)
        model = repository / self.model
        for end in ("", "_preprocess", "_postprocess", "_pipeline") if self.preprocess else ("",):
            folder = model.with_name(f"{model.name}{end}")
            if folder.exists():
                check_ours(folder)
        if versions_of(model) and not self.force:
            raise cascade_there(model)
        sources = [(one, source_from_artifact(one)) for one in self.members]
        if self.self_test:
            why_untested(sources, self.self_test)

    def serve(self, costs: Costs, policy: Policy, progress: Progress) -> ServedCascade:
        """Write the members as ``tome-export serve`` does, and the cascade with them, or nothing.

        Raises:
            InputError: if the repository cannot take them, or a model fails the self-test.
            ExportError: if the self-test's server does not start.
        """
        from tome_export.serve.cascades import cascade_folder, cascade_pipeline_folders

        def cascade_of(folders: Sequence[ModelFolder]) -> list[ModelFolder]:
            settings, options = policy.model_dump(mode="json"), ServeOptions()
            made = cascade_folder(
                self.model, folders, costs.members, settings, costs.policy, options
            )
            if not self.preprocess:
                return [made]
            return [made, *cascade_pipeline_folders(self.members[-1], made, options)]

        paths = tuple(one.path for one in self.members)
        options = ServeOptions(name=self.name)
        asking = ServeRequest(
            paths, self.repository, options, force=self.force, self_test=self.self_test
        )
        done = serve(asking, progress, cascade_of)
        names = [model.name for model in done.models]
        first = names.index(self.model)
        asked = (name for name in names[:first] if not name.endswith(ROUTER))
        models = (*asked, *names[first:])
        notes = (*done.notes, done.self_test) if done.self_test else done.notes
        return ServedCascade(
            repository=str(done.repository), models=models, entry=models[-1], notes=notes
        )
