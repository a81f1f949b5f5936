"""The model of a repository that gives each image to one of several by a calibrated policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.cascade import policy
from tome_export.errors import InputError
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    add_tensor,
    interface_of,
    python_config,
    python_folder,
    take_interface,
)
from tome_export.serve.pipeline_models import pipeline_folders
from tome_export.serve.repository import CASCADE_SETTINGS
from tome_export.serve.routers import ROUTER_INSTANCES
from tome_export.spec import BatchRange

if TYPE_CHECKING:
    from tome_export.artifact import Artifact

CASCADE = "_cascade"
"""What is added to what the names of several models have in common, for a cascade of them."""

OUTPUTS = (("budget", "int32"), ("macs", "int64"))
"""What a cascade gives besides the models' outputs, each ``[B, 1]``."""


def cascade_folder(
    name: str,
    members: Sequence[ModelFolder],
    macs: Sequence[int],
    settings: Mapping[str, Any],
    policy_macs: int,
    options: ServeOptions,
) -> ModelFolder:
    """A model that runs a policy and asks its members.

    Args:
        name: On the server.
        members: By MACs ascending; two or more, of the same inputs and outputs.
        macs: Of each per image.
        settings: The calibrated policy.
        policy_macs: What the policy itself takes per image.
        options: Instances.

    Raises:
        InputError: if inputs or outputs differ.
    """
    first = members[0]
    for member in members:
        if interface_of(member.config) != interface_of(first.config):
            raise InputError(
                f"models {first.name} and {member.name} have different inputs or outputs; a "
                "cascade needs artifacts of one model"
            )
    config = python_config(name, min(one.config.max_batch_size for one in members), options)
    # As for a router: one that waits for a slow model answers nobody else.
    config.instance_group[0].count = max(ROUTER_INSTANCES, options.instances)
    take_interface(config, first.config)
    for tensor, kind in OUTPUTS:
        add_tensor(config.output, tensor, kind, [1])
    listed = [{"model": m.name, "macs": n} for m, n in zip(members, macs, strict=True)]
    content = {**settings, "policy_macs": policy_macs, "members": listed}
    folder = python_folder(config, "cascade", CASCADE_SETTINGS, content, options)
    files = {**folder.files, f"{options.folder}/policy.py": Path(policy.__file__)}
    return ModelFolder(name, config, files)


def cascade_pipeline_folders(
    artifact: Artifact, cascade: ModelFolder, options: ServeOptions
) -> list[ModelFolder]:
    """The models around a cascade that make it one of encoded images.

    Args:
        artifact: A member, for preprocessing and labels.
        cascade: From ``cascade_folder``.
        options: Instances.

    Returns:
        As ``pipeline_folders``; the ensemble gives the cascade's own outputs too.
    """
    batch = BatchRange(1, 1, cascade.config.max_batch_size)
    folders = pipeline_folders(artifact, cascade.name, options, batch)
    ensemble = folders[-1].config
    step = next(s for s in ensemble.ensemble_scheduling.step if s.model_name == cascade.name)
    for tensor, kind in OUTPUTS:
        add_tensor(ensemble.output, tensor, kind, [1])
        step.output_map[tensor] = tensor
    return folders
