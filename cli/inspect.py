"""``tome-export inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tome_export.cli.format import table, warning_lines
from tome_export.cli.options import FILE, QueryGroup, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working

if TYPE_CHECKING:
    from tome_export.visualize.main import InspectResult


class InspectOptions(QueryGroup):
    """Pictures."""

    layer: str = option(default="last", metavar="N|all|last", help="From 0.")
    format: Literal["png", "svg"] = option(default="png")
    size: int | None = option(metavar="PIXELS", help="Least longer side.  [default: 448]")
    output: Path | None = option(
        "-o",
        "--output",
        heading="Output",
        metavar="FOLDER",
        help="[default: ./<artifact's name>-inspect]",
    )
    force: bool = option(heading="Output", help="Replace the pictures of an earlier run.")


@grouped_command(
    "inspect",
    "Draw which patches became one token.",
    example="tome-export inspect vit_b16-r13 cat.jpg --layer all",
)
@click.argument("artifact", type=FILE)
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGE...")
def command(
    terminal: Terminal, /, artifact: Path, images: tuple[Path, ...], options: InspectOptions
) -> None:
    """Draw on each IMAGE, or video, which of its patches are one token of ARTIFACT after a layer.

    A token of several patches is filled with their mean colour and outlined; a colour of outline
    marks one token among those it touches. Patches that are a token by themselves show the image,
    dropped ones are dark and hatched. Of a video all frames are drawn, row by row; a token may have
    patches in several of them.
    """
    with working(terminal) as progress:
        from tome_export.visualize.main import InspectRequest, inspect

        request = options.request(InspectRequest, artifact=artifact, images=images)
        result = inspect(request, progress)
    where = {"artifact": str(result.artifact.path), "output": str(result.output)}
    terminal.result(where | result.to_dict(), _lines(result))


def _lines(result: InspectResult) -> list[str]:
    manifest, grid = result.artifact.manifest, result.grid
    dropped = ["dropped"] if any(p.dropped for p in result.pictures) else []
    rows = [
        (p.file, p.layer, p.tokens, p.groups, p.largest, *(p.dropped for _ in dropped))
        for p in result.pictures
    ]
    headers = ("file", "layer", "tokens", "groups", "largest group", *dropped)
    merges = [] if any(manifest.merge.r) else ["No layer merges: every patch is a token."]
    video = manifest.video
    what, frames = ("video", manifest.input.shape[1]) if video else ("image", 1)
    prefix = frames * manifest.merge.prefix
    lost = max(p.patches_in_prefix for p in result.pictures)
    return [
        *warning_lines(manifest),
        *table(headers, rows, "lrrrr" + "r" * len(dropped)),
        *merges,
        f"Patches: {grid.rows} x {grid.cols}, of {grid.height} x {grid.width} pixels each; a group "
        "is a token of more than one",
        *(["Dropped patches are dark and hatched: nothing is left of them"] if dropped else []),
        f"Prefix tokens (class, distillation, registers) are not in the {what}: {prefix} of the "
        f"tokens, with {lost or 'no'} patches merged into them",
        f"Pictures: {result.output}",
    ]
