"""``tome-export inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, output_options, query_option
from tome_export.cli.output import Terminal, table
from tome_export.cli.progress import working
from tome_export.cli.text import warning_lines

if TYPE_CHECKING:
    from tome_export.visualize.main import InspectResult


@click.command("inspect", short_help="Draw which patches became one token.")
@click.argument("artifact", type=FILE)
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGE...")
@click.option("--layer", default="last", show_default=True, metavar="N|all|last", help="From 0.")
@click.option("--format", "form", type=click.Choice(["png", "svg"]), default="png")
@click.option(
    "-o", "--output", type=FILE, metavar="FOLDER", help="[default: ./<artifact's name>-inspect]"
)
@click.option("--size", type=int, metavar="PIXELS", help="Least longer side.  [default: 448]")
@click.option("--force", is_flag=True, help="Replace the pictures of an earlier run.")
@query_option
@output_options
@click.pass_obj
def command(
    terminal: Terminal, /, artifact: Path, images: tuple[Path, ...], **options: Any
) -> None:
    """Draw on each IMAGE, or video, which of its patches are one token of ARTIFACT after a layer.

    A token of several patches is filled with their mean colour and outlined; a colour of outline
    marks one token among those it touches. Patches that are a token by themselves show the image,
    dropped ones are dark and hatched. Of a video all frames are drawn, row by row; a token may have
    patches in several of them.
    """
    with working(terminal) as progress:
        from tome_export.visualize.main import InspectRequest, inspect

        options["format"] = options.pop("form")
        result = inspect(InspectRequest(artifact, images, **options), progress)
    where = {"artifact": str(result.artifact.path), "output": str(result.output)}
    terminal.result(where | result.to_dict(), _lines(result))


def _lines(result: InspectResult) -> list[str]:
    manifest, grid = result.artifact.manifest, result.grid
    drops = any(p.dropped for p in result.pictures)
    rows = [
        (p.file, p.layer, p.tokens, p.groups, p.largest, *([p.dropped] if drops else []))
        for p in result.pictures
    ]
    headers = (
        "file",
        "layer",
        "tokens",
        "groups",
        "largest group",
        *(["dropped"] if drops else []),
    )
    merges = [] if any(manifest.merge.r) else ["No layer merges: every patch is a token."]
    video = manifest.video
    what, frames = ("video", manifest.input.shape[1]) if video else ("image", 1)
    prefix = frames * manifest.merge.prefix
    lost = max(p.patches_in_prefix for p in result.pictures)
    return [
        *warning_lines(manifest),
        *table(headers, rows, "lrrrr" + "r" * drops),
        *merges,
        f"Patches: {grid.rows} x {grid.cols}, of {grid.height} x {grid.width} pixels each; a group "
        "is a token of more than one",
        *(["Dropped patches are dark and hatched: nothing is left of them"] if drops else []),
        f"Prefix tokens (class, distillation, registers) are not in the {what}: {prefix} of the "
        f"tokens, with {lost or 'no'} patches merged into them",
        f"Pictures: {result.output}",
    ]
