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


@click.command("serve", short_help="Write a model repository for Triton Inference Server.")
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="ARTIFACT...")
@repository_options
@run_options
@output_options
@click.pass_obj
def command(terminal: Terminal, artifacts: tuple[Path, ...], **given: Any) -> None:
    """Write ARTIFACT into a model repository for Triton Inference Server.

    Several artifacts of one model, with different r, come with a router, which chooses by the
    parameter r or max_ms of each request.
    """
    with working(terminal) as progress:
        from tome_export.cli.serve_options import serve_request
        from tome_export.pipeline.serve import serve

        done = serve(serve_request(artifacts, given), progress)
    if given["run"]:
        _run(terminal, done, given)
        return
    plainly = f"tritonserver --model-repository={done.repository}"
    more = f"Serve it: this command with --run, or {plainly}"
    terminal.result(done.to_dict(), [*_lines(done), more])


def _run(terminal: Terminal, done: ServeResult, given: dict[str, Any]) -> None:
    """Serve until Ctrl-C, which is how this ends well."""
    from tome_export.cli.serve_options import run_request
    from tome_export.pipeline.server import running

    with contextlib.ExitStack() as stack:
        # Of its own, because standard error is led away while a library call runs.
        log = stack.enter_context(os.fdopen(os.dup(2), "w")) if given["log"] else None
        with working(terminal) as progress:
            server = stack.enter_context(running(run_request(given, log), progress))
        addresses = {"http": server.http, "grpc": server.grpc, "metrics": server.metrics}
        lines = [*_lines(done), "", "Ready; Ctrl-C ends it", *fields([*addresses.items()])]
        lines += [STAND_IN] if server.stand_in else []
        values = {"server": {**addresses, "stand_in": server.stand_in}}
        terminal.result(done.to_dict() | values, lines)
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
