"""``tome-export serve``."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tome_export.cli.format import RANDOM, STAND_IN, fields, table
from tome_export.cli.options import FILE, Group, SelfTestGroup, batch_sizes, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.signals import Interrupted

if TYPE_CHECKING:
    from tome_export.serve.load import Analysis
    from tome_export.serve.main import ServeResult
    from tome_export.serve.server import RunRequest


class QueueGroup(Group):
    """Engine."""

    instances: int = option(
        default=1, help="Copies of the model per device; at least 2 where its queue is limited."
    )
    threads: int | None = option(
        help="Of each copy of an ONNX model on a CPU; one thread waits for no other, and leaves "
        "other cores to the decoders.  [default: as many as cores]"
    )
    max_queue_delay_us: int = option(
        "--max-queue-delay",
        default=2000,
        metavar="MICROSECONDS",
        help="Longest wait for a batch to fill.",
    )
    max_queue_size: int | None = option(
        help="Requests that may wait; more are rejected. Takes 2 instances or more, as "
        "tritonserver lets a few wait for 500 ms where one has a limited queue.  [default: no "
        "limit]"
    )
    timeout_ms: int | None = option(
        "--queue-timeout",
        metavar="MILLISECONDS",
        help="Longest wait in the queue; then the request is rejected. Takes 2 instances or more, "
        "too.  [default: no limit]",
    )
    cuda_graph_batches: tuple[int, ...] | None = option(
        type=batch_sizes,
        metavar="N,N,...",
        help="Batch sizes recorded as CUDA graphs (TensorRT).  [default: 1, OPT and MAX]",
    )


class RunGroup(Group):
    """Server."""

    run: bool = option(help="Start tritonserver on the repository, until Ctrl-C.")
    log: bool = option(help="Show the server's log.")
    host: str = option(default="127.0.0.1", help="Address to listen on.")
    http_port: int = option(default=8000, help="0: any free one.")
    grpc_port: int = option(default=8001, help="0: any free one.")
    metrics_port: int = option(default=8002, help="0: any free one.")
    ready_seconds: float = option(
        "--ready-timeout",
        default=60.0,
        metavar="SECONDS",
        help="Longest wait for the server; its first start on a GPU may build engines.",
    )


class ServeCommandOptions(QueueGroup, RunGroup, SelfTestGroup):
    """Output."""

    repository: Path = option(required=True, metavar="DIR", help="Written to.")
    format: Literal["auto", "engine", "onnx"] = option(
        default="auto", help="auto: the TensorRT engine where there is one, else the ONNX model."
    )
    force: bool = option(help="Replace a version that has other files.")
    kserve: Path | None = option(metavar="FILE", help="Also write a KServe manifest.")
    storage_uri: str | None = option(
        metavar="URI", help="Where the cluster finds the repository.  [default: pvc://<model>]"
    )
    name: str | None = option(heading="Model", help="Of the model.  [default: <model>_r<r>]")
    version: int | None = option(
        heading="Model", help="Version of the model.  [default: 1, or the one that has these files]"
    )
    preprocess: bool = option(
        heading="Model", help="Also a pipeline from JPEG or PNG bytes to labels or features."
    )
    scaled_decoding: bool = option(
        heading="Model",
        help="With --preprocess: decode large JPEG files at a half, quarter or eighth of their "
        "size. Faster; pixels differ a little.",
    )
    dali: bool = option(
        heading="Model",
        help="With --preprocess: decode on the GPU, by the server's DALI backend. For files that "
        "are trusted; see docs/serving-throughput.md.",
    )
    decoders: int | None = option(
        heading="Model",
        help="With --preprocess: processes that decode.  [default: as many as cores, up to 16]",
    )
    analyze: float | None = option(
        heading="Engine",
        metavar="MILLISECONDS",
        help="Measure on this machine, and write in place of those given, the instances, threads "
        "and queue delay that answer the most images per second with a 99th percentile of the "
        "latencies of at most so long.",
    )


@grouped_command(
    "serve",
    "Write a model repository for Triton Inference Server.",
    example="tome-export serve vit_b16-r13 --repository models --preprocess --run",
)
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="ARTIFACT...")
def command(
    terminal: Terminal, /, artifacts: tuple[Path, ...], options: ServeCommandOptions
) -> None:
    """Write ARTIFACT into a model repository for Triton Inference Server.

    Several artifacts of one model, with different r or image sizes, come with a router. It chooses
    by the image itself, and by the parameters size, and r or max_ms, of each request. A server
    started with --run is ended by Ctrl-C or SIGTERM, and the exit code is then 0.
    """
    if options.storage_uri is not None and options.kserve is None:
        raise click.UsageError("--storage-uri is for the manifest of --kserve FILE; give both")
    if options.log and not options.run:
        raise click.UsageError("--log shows the log of a server; give --run too")
    with working(terminal) as progress:
        from tome_export.serve.analyze import serve_analyzed
        from tome_export.serve.main import KServeOptions, ServeOptions, ServeRequest, serve
        from tome_export.serve.server import RunRequest

        # Before anything is written, as it refuses what cannot be.
        server = options.request(RunRequest, repository=options.repository.absolute())
        request = options.request(
            ServeRequest,
            artifacts=artifacts,
            options=options.request(ServeOptions),
            kserve_options=options.request(KServeOptions),
        )
        if options.analyze is None:
            done = serve(request, progress)
        else:
            done = serve_analyzed(request, options.analyze, progress)
    if options.run:
        _run(terminal, done, server, log=options.log)
    else:
        how = f"this command with --run, or {done.server.command(done.repository)}"
        terminal.result(done.to_dict(), [*_lines(done), f"Serve it: {how}"])


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
            lines = [*_lines(done), "", "Ready; Ctrl-C ends it", *fields(addresses)]
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
        *([] if done.analysis is None else [*_analysis_lines(done.analysis), ""]),
        *table(("model", "versions", ""), rows, "lll"),
        *done.notes,
        *([done.self_test] if done.self_test else []),
        *([f"KServe manifest: {done.kserve}"] if done.kserve else []),
        f"Repository: {done.repository}; ask for {done.entry}",
    ]


def _analysis_lines(analysis: Analysis) -> list[str]:
    head = ("instances", "threads", "queue delay", "requests at once", "images/s", "p50", "p99", "")
    rows = [
        (
            str(one.setting.instances),
            "all" if one.setting.threads is None else str(one.setting.threads),
            f"{one.setting.max_queue_delay_us} us",
            str(one.load.concurrency),
            f"{one.load.images_per_second:.1f}",
            f"{one.load.latency_ms['p50']:.1f} ms",
            f"{one.load.latency_ms['p99']:.1f} ms",
            "chosen" if one.setting == analysis.chosen else "" if one.fits else "too slow",
        )
        for one in analysis.results
    ]
    return [*table(head, rows, "rrrrrrrl"), *analysis.notes]
