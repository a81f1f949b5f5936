"""``tome-export serve``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tome_export.cli.options import FILE, grouped, output_options, self_test_option
from tome_export.cli.output import Terminal, fields, table
from tome_export.cli.progress import working
from tome_export.cli.signals import Interrupted
from tome_export.cli.text import RANDOM, STAND_IN

if TYPE_CHECKING:
    from tome_export.serve.main import ServeRequest, ServeResult
    from tome_export.serve.server import RunRequest

Options = TypeVar("Options")


class Batches(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """Batch sizes such as ``1,8,32``."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...]:
        """A tuple of numbers."""
        try:
            return value if isinstance(value, tuple) else tuple(map(int, value.split(",")))
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
        "max_queue_delay_us",
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
        "timeout_ms",
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
    self_test_option,
)

run_options = grouped(
    click.option("--run", is_flag=True, help="Start tritonserver on the repository, until Ctrl-C."),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--http-port", default=8000, show_default=True, help="0: any free one."),
    click.option("--grpc-port", default=8001, show_default=True, help="0: any free one."),
    click.option("--metrics-port", default=8002, show_default=True, help="0: any free one."),
    click.option(
        "--ready-timeout",
        "ready_seconds",
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="Longest wait for the server; its first start on a GPU may build engines.",
    ),
    click.option("--log", is_flag=True, help="Show the server's log."),
)


@click.command("serve", short_help="Write a model repository for Triton Inference Server.")
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="ARTIFACT...")
@repository_options
@run_options
@output_options
@click.pass_obj
def command(terminal: Terminal, /, artifacts: tuple[Path, ...], **given: Any) -> None:
    """Write ARTIFACT into a model repository for Triton Inference Server.

    Several artifacts of one model, with different r, come with a router, which chooses by the
    parameter r or max_ms of each request. A server started with --run is ended by Ctrl-C or
    SIGTERM, and the exit code is then 0.
    """
    with working(terminal) as progress:
        from tome_export.serve.main import serve
        from tome_export.serve.server import RunRequest

        # Before anything is written.
        server = _from_options(
            RunRequest, {**given, "repository": given["repository"].absolute(), "on_log": None}
        )
        done = serve(_request(artifacts, given), progress)
    if given["run"]:
        _run(terminal, done, server, log=given["log"])
    else:
        how = f"this command with --run, or {done.server.command(done.repository)}"
        terminal.result(done.to_dict(), [*_lines(done), f"Serve it: {how}"])


def _from_options(kind: Callable[..., Options], given: dict[str, Any]) -> Options:
    """A dataclass whose fields have the names of options."""
    known = {field.name for field in fields_of(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if name in known})


def _request(artifacts: tuple[Path, ...], given: dict[str, Any]) -> ServeRequest:
    from tome_export.serve.main import KServeOptions, ServeOptions, ServeRequest

    if given["storage_uri"] is not None and given["kserve"] is None:
        raise click.UsageError("--storage-uri is for the manifest of --kserve FILE; give both")
    if given["log"] and not given["run"]:
        raise click.UsageError("--log shows the log of a server; give --run too")
    made = {
        "artifacts": artifacts,
        "options": _from_options(ServeOptions, given),
        "kserve_options": KServeOptions(given["storage_uri"]),
    }
    return _from_options(ServeRequest, {**given, **made})


def _run(terminal: Terminal, done: ServeResult, request: RunRequest, *, log: bool) -> None:
    """Serve until Ctrl-C, which is how this ends well once the server is ready."""
    from tome_export.serve.server import running

    ready = False
    try:
        with contextlib.ExitStack() as stack:
            if log:  # to a stream of its own: standard error is led away while a library call runs
                stream = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
                request = replace(request, on_log=lambda line: print(line, file=stream))
            with working(terminal) as progress:
                server = stack.enter_context(running(request, progress))
            addresses = {"http": server.http, "grpc": server.grpc, "metrics": server.metrics}
            lines = [*_lines(done), "", "Ready; Ctrl-C ends it", *fields([*addresses.items()])]
            lines += [STAND_IN] if server.stand_in else []
            given = done.to_dict()
            given["server"] |= {**addresses, "stand_in": server.stand_in}
            ready = True
            try:
                terminal.result(given, lines)
                server.wait(_say)
            except Interrupted:
                _say("Stopping tritonserver")
    except Interrupted:  # once more, while the server ends
        if not ready:
            raise


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _lines(done: ServeResult) -> list[str]:
    rows = [(m.name, ", ".join(map(str, m.versions)), m.status) for m in done.models]
    return [
        *([RANDOM] if done.random_weights else []),
        *table(("model", "versions", ""), rows, "lll"),
        *done.notes,
        *([done.self_test] if done.self_test else []),
        *([f"KServe manifest: {done.kserve}"] if done.kserve else []),
        f"Repository: {done.repository}; ask for {done.entry}",
    ]
