"""Plain values of the serving layer: what is asked for, and a model of a repository."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import UsageError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

MOST = 2**31 - 1
"""Largest number of the options: most are of 32 bits in the server's schema."""

MOST_VERSION = 2**63 - 1
"""Largest version: the server reads the name of a version folder as a signed 64-bit number."""


def is_version(folder: str) -> bool:
    """Whether the server takes a folder of that name for a version."""
    return re.fullmatch(r"[1-9][0-9]{0,18}", folder) is not None and int(folder) <= MOST_VERSION


@dataclass(frozen=True)
class ServeOptions:
    """How an artifact is served.

    Attributes:
        name: Name of the model in the repository; None for the artifact's model and r.
        version: Version folder, at least 1; None for 1, or the version that already has the same
            files.
        preprocess: Also write the models that take encoded images and give labels or features.
        instances: Copies of the model per device; a limited queue takes two or more.
        max_queue_delay_us: How long the server may hold a request back to fill a batch.
        max_queue_size: Requests that may wait; further ones are rejected at once. None sets no
            limit.
        timeout_ms: How long a request may wait in the queue before it is rejected; None for any
            time.
        cuda_graph_batches: Batch sizes recorded as CUDA graphs (TensorRT plans); None for the
            least, tuned and largest batch of the engine.

    Raises:
        UsageError: if a value is out of its range.
    """

    name: str | None = None
    version: int | None = None
    preprocess: bool = False
    instances: int = 1
    max_queue_delay_us: int = 2000
    max_queue_size: int | None = None
    timeout_ms: int | None = None
    cuda_graph_batches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ranges = [
            ("version", self.version, 1, MOST_VERSION),
            ("instances", self.instances, 1, MOST),
            ("queue delay", self.max_queue_delay_us, 0, MOST),
            ("queue size", self.max_queue_size, 1, MOST),
            ("queue timeout", self.timeout_ms, 1, MOST),
            *(("CUDA graph batch", batch, 1, MOST) for batch in self.cuda_graph_batches or ()),
        ]
        for what, value, least, most in ranges:
            if value is not None and not least <= value <= most:
                raise UsageError(f"{what} is {value}; expected {least} to {most}")

    @property
    def limits_queue(self) -> bool:
        """Whether requests may be rejected instead of waiting."""
        return self.max_queue_size is not None or self.timeout_ms is not None


@dataclass(frozen=True)
class ModelFolder:
    """A model of a repository, before it is written.

    Attributes:
        name: Its folder, and its name on the server.
        config: What becomes ``config.pbtxt``.
        files: Path inside the folder (``1/model.onnx``, ``labels.txt``) -> the file to copy, or
            its content.
    """

    name: str
    config: ModelConfig
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
