"""``tome-export query``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tome_export.cli.format import table
from tome_export.cli.options import FILE, QueryGroup, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working

if TYPE_CHECKING:
    from tome_export.serve.query import ImageAnswer


class QueryOptions(QueryGroup):
    """Model."""

    model: str | None = option(
        metavar="NAME", help="Model to ask.  [default: the router or only one]"
    )
    r: int | None = option(metavar="N", help="Of a router: merge at most N tokens per layer.")
    max_ms: float | None = option(metavar="MS", help="Of a router: be as fast as MS per image.")
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
    artifacts served together have a router, which --r or --max-ms tells how much to merge.
    """
    with working(terminal) as progress:
        from tome_export.serve.query import QueryRequest, query

        result = query(options.request(QueryRequest, url=url, images=images), progress)
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
