"""``tome-export query``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from tome_export.cli.format import answer_lines, answer_values
from tome_export.cli.options import FILE, QueryGroup, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.spec import ImageSize


class QueryOptions(QueryGroup):
    """Model."""

    model: str | None = option(
        metavar="NAME", help="Model to ask.  [default: the router or only one]"
    )
    r: int | None = option(metavar="N", help="Of a router: merge at most N tokens per layer.")
    max_ms: float | None = option(metavar="MS", help="Of a router: be as fast as MS per image.")
    size: ImageSize | None = option(
        type=ImageSize.parse,
        metavar="HxW",
        help="Of a router of several image sizes: the one for all images.  [default: for each "
        "image the one that wastes least of it]",
    )
    protocol: Literal["grpc", "http"] | None = option(
        heading="Server", help="How to ask.  [default: by the URL's scheme, else grpc]"
    )
    shared_memory: bool = option(
        heading="Server", help="Hand images over in shared memory; for a server on this machine."
    )
    top: int | None = option(
        heading="Output", metavar="K", help="Labels per image.  [default: all that come]"
    )


@grouped_command(
    "query",
    "Ask a running server about images.",
    example="tome-export query localhost:8001 cat.jpg --top 5",
)
@click.argument("url")
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...")
def command(
    terminal: Terminal, /, url: str, images: tuple[Path, ...], options: QueryOptions
) -> None:
    """Send each IMAGE or video (a file or a folder) to the server at URL and print its labels.

    URL is host:port (gRPC's default port is 8001, HTTP's 8000), also with grpc:// or http://. The
    server must have the model with its preprocessing (tome-export serve --preprocess). Several
    artifacts served together have a router, which --r or --max-ms tells how much to merge, and
    --size for which image size.
    """
    with working(terminal) as progress:
        from tome_export.serve.query import QueryRequest, query

        result = query(options.request(QueryRequest, url=url, images=images), progress)
    values = {
        "server": result.address,
        "protocol": result.protocol,
        "model": result.model,
        "images": [answer_values(answer) for answer in result.answers],
    }
    lines = [f"Model  {result.model}"]
    for answer in result.answers:
        lines += ["", str(answer.image), *(f"  {line}" for line in answer_lines(answer))]
    terminal.result(values, lines)
