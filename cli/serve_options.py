"""Options of ``tome-export serve``, and what they become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from tome_export.cli.options import FILE, grouped

if TYPE_CHECKING:
    from tome_export.pipeline.serve import ServeRequest
    from tome_export.serve.server import RunRequest


class Batches(click.ParamType):
    """Batch sizes such as ``1,8,32``."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, ...]:
        """A tuple of numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of batch sizes such as 1,8,32", param, context)


repository_options = grouped(
    click.option("--repository", type=FILE, required=True, metavar="DIR", help="Written to."),
    click.option("--name", help="Of the model.  [default: <model>_r<r>]"),
    click.option(
        "--version",
        type=int,
        help="Version of the model.  [default: 1, or the one that has these files]",
    ),
    click.option(
        "--format",
        "format_",
        type=click.Choice(["auto", "engine", "onnx"]),
        default="auto",
        show_default=True,
        help="auto: the TensorRT engine where there is one, else the ONNX model.",
    ),
    click.option(
        "--preprocess",
        is_flag=True,
        help="Also a pipeline from JPEG or PNG bytes to labels or features.",
    ),
    click.option(
        "--instances",
        default=1,
        show_default=True,
        help="Copies of the model per device; at least 2 where its queue is limited.",
    ),
    click.option(
        "--max-queue-delay",
        default=2000,
        show_default=True,
        metavar="MICROSECONDS",
        help="Longest wait for a batch to fill.",
    ),
    click.option(
        "--max-queue-size",
        type=int,
        help="Requests that may wait; more are rejected. Takes 2 instances or more, as "
        "tritonserver lets a few wait for 500 ms where one has a limited queue.  [default: no "
        "limit]",
    ),
    click.option(
        "--queue-timeout",
        type=int,
        metavar="MILLISECONDS",
        help="Longest wait in the queue; then the request is rejected. Takes 2 instances or more, "
        "too.  [default: no limit]",
    ),
    click.option(
        "--cuda-graph-batches",
        type=Batches(),
        help="Batch sizes recorded as CUDA graphs (TensorRT).  [default: 1, OPT and MAX]",
    ),
    click.option("--kserve", type=FILE, metavar="FILE", help="Also write a KServe manifest."),
    click.option(
        "--storage-uri",
        metavar="URI",
        help="Where the cluster finds the repository.  [default: pvc://<model>]",
    ),
    click.option("--force", is_flag=True, help="Replace a version that has other files."),
)

run_options = grouped(
    click.option("--run", is_flag=True, help="Start tritonserver on the repository, until Ctrl-C."),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--http-port", default=8000, show_default=True, help="0: any free one."),
    click.option("--grpc-port", default=8001, show_default=True, help="0: any free one."),
    click.option("--metrics-port", default=8002, show_default=True, help="0: any free one."),
    click.option(
        "--ready-timeout",
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="Longest wait for the server; its first start on a GPU may build engines.",
    ),
    click.option("--log", is_flag=True, help="Show the server's log."),
)


def serve_request(artifacts: tuple[Path, ...], given: dict[str, Any]) -> ServeRequest:
    """What ``tome-export serve`` was asked for.

    Raises:
        UsageError: if a value is out of its range, or options do not go together.
    """
    from tome_export.pipeline.serve import KServeOptions, ServeOptions, ServeRequest

    if given["storage_uri"] is not None and given["kserve"] is None:
        raise click.UsageError("--storage-uri is for the manifest of --kserve FILE; give both")
    if given["log"] and not given["run"]:
        raise click.UsageError("--log shows the log of a server; give --run too")
    options = ServeOptions(
        name=given["name"],
        version=given["version"],
        preprocess=given["preprocess"],
        instances=given["instances"],
        max_queue_delay_us=given["max_queue_delay"],
        max_queue_size=given["max_queue_size"],
        timeout_ms=given["queue_timeout"],
        cuda_graph_batches=given["cuda_graph_batches"],
    )
    return ServeRequest(
        artifacts,
        given["repository"],
        options,
        given["format_"],
        given["force"],
        given["kserve"],
        KServeOptions(given["storage_uri"]),
    )


def run_request(given: dict[str, Any]) -> RunRequest:
    """The server that ``--run`` starts.

    Raises:
        UsageError: if a value is out of its range.
    """
    from tome_export.serve.server import RunRequest

    return RunRequest(
        given["repository"].absolute(),
        given["host"],
        given["http_port"],
        given["grpc_port"],
        given["metrics_port"],
        given["ready_timeout"],
    )


def logged_to(request: RunRequest, log: TextIO) -> RunRequest:
    """The same, with the server's log on a stream."""

    def show(line: str) -> None:
        log.write(f"{line}\n")
        log.flush()

    return replace(request, on_log=show)
