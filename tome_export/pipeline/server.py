"""``tome-export serve --run``: a server on a repository, with what this machine has."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tome_export.engine.gpu import detect
from tome_export.errors import MissingComponentError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.serve.config import CPU
from tome_export.serve.launch import server_options_from_repository
from tome_export.serve.ports import check_ports
from tome_export.serve.repository import models_in
from tome_export.serve.server import READY_SECONDS, RunningServer, start


@dataclass(frozen=True)
class RunRequest:
    """A server to start.

    Attributes:
        repository: What it serves.
        host: Address to listen on.
        http_port: Port; 0 for a free one.
        grpc_port: Likewise.
        metrics_port: Likewise.
        ready_seconds: Most time until it is ready. The first start of an ONNX model on a GPU
            builds TensorRT engines, which takes minutes.
        on_log: Called with each line of the server's log, from another thread; None drops them.

    Raises:
        UsageError: if a port is none or given twice, or the time is none.
    """

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    ready_seconds: float = READY_SECONDS
    on_log: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        check_ports((self.http_port, self.grpc_port, self.metrics_port))
        if not 0 < self.ready_seconds < math.inf:
            raise UsageError(f"ready timeout is {self.ready_seconds:g}; expected seconds above 0")


@contextlib.contextmanager
def running(request: RunRequest, progress: Progress | None = None) -> Iterator[RunningServer]:
    """Run a server on a repository while the block lasts; on a machine without a GPU on the CPU.

    Raises:
        MissingComponentError: if no server is at hand, or a model needs a GPU and there is none.
        InputError: if the server cannot load a model.
        UsageError: if a port is taken.
        ExportError: if it does not start otherwise, or is not ready in time.
    """
    gpus = detect().gpus
    if not gpus:
        _check_runs_on_cpu(request.repository)
    options = server_options_from_repository(request.repository)
    (progress or Silent()).stage("Start tritonserver")
    with start(
        request.repository,
        host=request.host,
        http_port=request.http_port,
        grpc_port=request.grpc_port,
        metrics_port=request.metrics_port,
        config_name=None if gpus else CPU,
        arguments=options.arguments,
        environment=options.environment,
        on_log=request.on_log,
        ready_seconds=request.ready_seconds,
    ) as server:
        yield server


def _check_runs_on_cpu(repository: Path) -> None:
    for name in models_in(repository):
        plans = sorted((repository / name).glob("*/model.plan"))
        if plans:
            raise MissingComponentError(
                f"{plans[0]} is a TensorRT engine and this machine has no GPU that CUDA sees; run "
                "the server on a machine with one, or serve the ONNX model with --format onnx"
            )
