"""Plain values of the serving layer: what is asked for, and a model of a repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import UsageError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


@dataclass(frozen=True)
class ServeOptions:
    """How an artifact is served.

    Attributes:
        name: Name of the model in the repository; None for the artifact's model and r.
        version: Version folder, at least 1; None for 1, or the version that already has the same
            files.
        preprocess: Also write the models that take encoded images and give labels or features.
        instances: Copies of the model per device.
        max_queue_delay_us: How long the server may hold a request back to fill a batch.
        max_queue_size: Requests that may wait; further ones are rejected at once.
        timeout_ms: How long a request may wait in the queue before it is rejected.
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
    max_queue_size: int = 256
    timeout_ms: int = 5000
    cuda_graph_batches: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        least = {
            "version": (self.version, 1),
            "instances": (self.instances, 1),
            "queue delay": (self.max_queue_delay_us, 0),
            "queue size": (self.max_queue_size, 1),
            "queue timeout": (self.timeout_ms, 1),
        }
        for what, (value, expected) in least.items():
            if value is not None and value < expected:
                raise UsageError(f"{what} is {value}; expected {expected} or more")
        for batch in self.cuda_graph_batches or ():
            if batch < 1:
                raise UsageError(f"CUDA graph batch is {batch}; expected 1 or more")


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
