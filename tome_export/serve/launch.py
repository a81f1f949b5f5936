"""What a server must be started with for the models of a repository to load and compute right."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tome_export.serve.config import VERSION_COMPATIBLE
from tome_export.serve.repository import config_of, models_in


@dataclass(frozen=True)
class Launch:
    """Arguments and environment.

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


def launch_of(repository: Path) -> Launch:
    """Read from the configs what the models of a repository need.

    - A version-compatible engine brings a runtime of its own, code that the TensorRT backend runs
      only if it is told that all engines of the server are trusted.
    - ONNX Runtime's TensorRT accelerator has no key for TF32, which TensorRT's builder allows by
      default; NVIDIA's libraries read one variable that forbids it.

    Raises:
        InputError: if a config is damaged.
    """
    configs = [config_of(repository / name) for name in models_in(repository)]
    arguments, environment = [], {}
    if any(config.parameters[VERSION_COMPATIBLE].string_value == "true" for config in configs):
        arguments.append("--backend-config=tensorrt,version-compatible=true")
    listed = (c.optimization.execution_accelerators.gpu_execution_accelerator for c in configs)
    if any(accelerator.name == "tensorrt" for found in listed for accelerator in found):
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    return Launch(tuple(arguments), environment)
