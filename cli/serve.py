"""``tome-export serve``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, output_options
from tome_export.cli.output import Terminal, fields, table
from tome_export.cli.progress import working
from tome_export.cli.serve_options import repository_options, run_options
from tome_export.cli.signals import Interrupted
from tome_export.cli.text import RANDOM, STAND_IN

if TYPE_CHECKING:
    from tome_export.pipeline.serve import ServeResult
    from tome_export.serve.server import RunRequest


@click.command("serve", short_help="Write a model repository for Triton Inference Server.")
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="ARTIFACT...")
@repository_options
@run_options
@output_options
@click.pass_obj
def command(terminal: Terminal, artifacts: tuple[Path, ...], **given: Any) -> None:
    """Write ARTIFACT into a model repository for Triton Inference Server.

    Several artifacts of one model, with different r, come with a router, which chooses by the
    parameter r or max_ms of each request. A server started with --run is ended by Ctrl-C or
    SIGTERM, and the exit code is then 0.
    """
    with working(terminal) as progress:
        from tome_export.cli.serve_options import run_request, serve_request
        from tome_export.pipeline.serve import serve

        server = run_request(given)  # before anything is written
        done = serve(serve_request(artifacts, given), progress)
    if given["run"]:
        _run(terminal, done, server, log=given["log"])
    else:
        how = f"this command with --run, or {done.server.command(done.repository)}"
        terminal.result(done.to_dict(), [*_lines(done), f"Serve it: {how}"])


def _run(terminal: Terminal, done: ServeResult, request: RunRequest, *, log: bool) -> None:
    """Serve until Ctrl-C, which is how this ends well."""
    from tome_export.cli.serve_options import logged_to
    from tome_export.serve.server import running

    with contextlib.ExitStack() as stack:
        if log:  # to a stream of its own: standard error is led away while a library call runs
            request = logged_to(request, stack.enter_context(os.fdopen(os.dup(2), "w")))
        with working(terminal) as progress:
            server = stack.enter_context(running(request, progress))
        addresses = {"http": server.http, "grpc": server.grpc, "metrics": server.metrics}
        lines = [*_lines(done), "", "Ready; Ctrl-C ends it", *fields([*addresses.items()])]
        lines += [STAND_IN] if server.stand_in else []
        given = done.to_dict()
        given["server"] |= {**addresses, "stand_in": server.stand_in}
        terminal.result(given, lines)
        try:
            server.wait()
        except Interrupted:
            sys.stderr.write("Stopping tritonserver\n")


def _lines(done: ServeResult) -> list[str]:
    rows = [(m.name, ", ".join(map(str, m.versions)), m.status) for m in done.models]
    return [
        *([RANDOM] if done.random_weights else []),
        *table(("model", "versions", ""), rows, "lll"),
        *done.notes,
        *([f"KServe manifest: {done.kserve}"] if done.kserve else []),
        f"Repository: {done.repository}; ask for {done.entry}",
    ]
