"""What a server must be started with for the models of a repository to load and compute right."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.serve.config import KEPT_VERSIONS, VERSION_COMPATIBLE
from tome_export.serve.repository import config_of, is_ours, models_in, versions_of

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from tome_export.serve.spec import ModelFolder


@dataclass(frozen=True)
class ServerOptions:
    """Arguments and environment of a server.

    Attributes:
        arguments: Of tritonserver.
        environment: Variables by name.
    """

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, repository: Path) -> str:
        """The server's command line, for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        argument = f"--model-repository={shlex.quote(str(repository))}"
        return " ".join([*variables, "tritonserver", argument, *self.arguments])


def server_options_from_repository(
    repository: Path, folders: Sequence[ModelFolder] = (), removed: Collection[str] = ()
) -> ServerOptions:
    """What our own models of a repository need; other people's are not looked at.

    - A version-compatible engine brings a runtime of its own, code that the TensorRT backend runs
      only if it is told that all engines of the server are trusted.
    - ONNX Runtime's TensorRT accelerator has no key for TF32, which TensorRT's builder allows by
      default; NVIDIA's libraries read one variable that forbids it.

    Args:
        repository: The directory.
        folders: What will be written into it.
        removed: Names of the models that will be removed from it.

    Raises:
        InputError: if a config of ours is damaged.
    """
    new = {folder.name: folder for folder in folders}
    there = [
        name
        for name in models_in(repository)
        if name not in {*new, *removed} and is_ours(repository / name)
    ]
    arguments, environment = [], {}
    if any(_has_version_compatible(repository / name, new.get(name)) for name in (*there, *new)):
        arguments.append("--backend-config=tensorrt,version-compatible=true")
    configs = [config_of(repository / name) for name in there]
    configs += [folder.config for folder in folders]
    if any(name == "tensorrt" for config in configs for name in _accelerators(config)):
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    return ServerOptions(tuple(arguments), environment)


def _has_version_compatible(model: Path, folder: ModelFolder | None) -> bool:
    """Whether a served version of a model, with what will be written into it, is such an engine."""
    new = {name.split("/")[0] for name in folder.files} if folder else set()
    versions = {*map(str, versions_of(model)), *filter(str.isdecimal, new)}
    return any(
        f"{version}/{VERSION_COMPATIBLE}" in folder.files
        if folder and version in new
        else (model / version / VERSION_COMPATIBLE).is_file()
        for version in sorted(versions, key=int)[-KEPT_VERSIONS:]
    )


def _accelerators(config: ModelConfig) -> Iterator[str]:
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        yield accelerator.name
