"""``tome-export query``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, output_options, query_option
from tome_export.cli.output import Terminal, table
from tome_export.cli.progress import working

if TYPE_CHECKING:
    from tome_export.serve.query import ImageAnswer


@click.command("query", short_help="Ask a running server about images.")
@click.argument("url")
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...")
@click.option("--model", metavar="NAME", help="Model to ask.  [default: the router or only one]")
@click.option("--r", type=int, metavar="N", help="Of a router: merge at most N tokens per layer.")
@click.option("--max-ms", type=float, metavar="MS", help="Of a router: be as fast as MS per image.")
@click.option(
    "--protocol",
    type=click.Choice(["grpc", "http"]),
    help="How to ask.  [default: by the URL's scheme, else grpc]",
)
@click.option("--top", type=int, metavar="K", help="Labels per image.  [default: all that come]")
@click.option(
    "--shared-memory",
    is_flag=True,
    help="Hand images over in shared memory; for a server on this machine.",
)
@query_option
@output_options
@click.pass_obj
def command(terminal: Terminal, /, url: str, images: tuple[Path, ...], **given: Any) -> None:
    """Send each IMAGE or video (a file or a folder) to the server at URL and print its labels.

    URL is host:port (gRPC's default port is 8001, HTTP's 8000), also with grpc:// or http://. The
    server must have the model with its preprocessing (tome-export serve --preprocess). Several
    artifacts served together have a router, which --r or --max-ms tells how much to merge.
    """
    with working(terminal) as progress:
        from tome_export.serve.query import QueryRequest, query

        result = query(QueryRequest(url, images, **given), progress)
    values = {
        "server": result.address,
        "protocol": result.protocol,
        "model": result.model,
        "images": [_values(answer) for answer in result.answers],
    }
    lines = [f"Model  {result.model}"]
    for answer in result.answers:
        lines += ["", str(answer.image), *(f"  {line}" for line in _lines(answer))]
    terminal.result(values, lines)


def _values(answer: ImageAnswer) -> dict[str, Any]:
    if answer.labels is not None:
        return {"image": str(answer.image), "labels": [vars(label) for label in answer.labels]}
    return {
        "image": str(answer.image),
        **{name: array.tolist() for name, array in answer.features.items()},
    }


def _lines(answer: ImageAnswer) -> list[str]:
    if answer.labels is not None:
        rows = [(label.label, f"{label.score:.4f}", label.index) for label in answer.labels]
        return table(("label", "score", "index"), rows, "lrr")
    return [
        f"{name} {list(array.shape)}: {', '.join(f'{x:.4f}' for x in array.reshape(-1)[:4])}"
        f"{', ...' * (array.size > 4)}"
        for name, array in answer.features.items()
    ]
