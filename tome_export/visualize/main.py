"""``tome-export inspect``: pictures of which patches became one token, decided by the artifact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tome_export.artifact import Artifact, staged, write_json
from tome_export.artifact.pictures import names_of, pictures_of
from tome_export.errors import InputError, UsageError
from tome_export.outlines import LONGER_SIDE
from tome_export.progress import Progress, Silent
from tome_export.runtime.inputs import asked_inputs, inputs_from_file
from tome_export.runtime.merge_maps import merge_maps
from tome_export.spec import PatchGrid
from tome_export.visualize.draw import draw, draw_svg

SUMMARY = "inspect.json"

MAX_SIZE = 8192
"""Most pixels of a picture's longer side that can be asked for."""


@dataclass(frozen=True)
class InspectRequest:
    """What to draw.

    Attributes:
        artifact: The artifact directory.
        images: Image files; video files for a model of videos.
        layer: Index of a layer, ``all`` or ``last``.
        format: ``png`` or ``svg``.
        output: Folder to write; None for ``<artifact's name>-inspect`` in the current one.
        size: Least longer side of a picture, in pixels; None for the usual.
        force: Replace a folder that an earlier inspection wrote.
        query: File of what the model takes besides images; see ``inputs.inputs_from_file``.
    """

    artifact: Path
    images: tuple[Path, ...]
    layer: str = "last"
    format: Literal["png", "svg"] = "png"
    output: Path | None = None
    size: int | None = None
    force: bool = False
    query: Path | None = None


@dataclass(frozen=True)
class Picture:
    """One file that was written.

    Attributes:
        file: Its name in the output folder.
        image: The image file it shows.
        layer: Index of the layer, from 0.
        tokens: Tokens that leave the layer, prefix tokens included.
        groups: Tokens of more than one patch.
        largest: Patches of the largest token.
        patches_in_prefix: Patches merged into a class, distillation or register token.
        dropped: Patches of which nothing is left.
    """

    file: str
    image: str
    layer: int
    tokens: int
    groups: int
    largest: int
    patches_in_prefix: int
    dropped: int


@dataclass(frozen=True)
class InspectResult:
    """What was drawn.

    Attributes:
        artifact: The artifact.
        output: The folder, which also holds ``inspect.json``: the same as data.
        grid: How the model cuts an image into patches.
        pictures: In the order of images, then layers.
    """

    artifact: Artifact
    output: Path
    grid: PatchGrid
    pictures: tuple[Picture, ...]

    def to_dict(self) -> dict[str, Any]:
        """What ``inspect.json`` says: nothing of where the files lie."""
        model = self.artifact.manifest.model
        return {
            "model": model.name,
            "random_weights": model.random_weights,
            "patches": asdict(self.grid),
            "pictures": [asdict(picture) for picture in self.pictures],
        }


def inspect(request: InspectRequest, progress: Progress | None = None) -> InspectResult:
    """Draw the tokens of an artifact on images.

    Raises:
        InputError: if the artifact is damaged or its patches cannot be placed, an image cannot be
            read, there is no such layer, or the output exists and is not to be replaced.
        UsageError: if the layer is no number, the size is out of range, or a query is missing or
            too many.
        MissingComponentError: if ONNX Runtime is not here.
    """
    progress = progress or Silent()
    size = LONGER_SIDE if request.size is None else request.size
    if not 1 <= size <= MAX_SIZE:
        raise UsageError(f"size is {size}; expected 1 to {MAX_SIZE} pixels")
    progress.stage("Verify the artifact")
    artifact = Artifact.open(request.artifact.absolute())
    layers = layers_from_text(request.layer, len(artifact.manifest.merge.r))
    shapes = asked_inputs(artifact.manifest)
    given = inputs_from_file(shapes, request.query, len(request.images))
    output = request.output or Path(f"{artifact.path.resolve().name}-inspect")
    ours = pictures_of(SUMMARY, "inspect")
    with staged(output, force=request.force, replaceable=ours) as folder:
        kind, count = "video" if artifact.manifest.video else "image", len(request.images)
        on = f"{count} {kind}{'s' * (count != 1)}"
        progress.stage(f"Run {artifact.manifest.model.name} on {on}")
        maps = merge_maps(artifact, request.images, progress, given)
        progress.stage("Draw")
        pictures = []
        names = names_of(request.images)
        for index, (path, name, found) in enumerate(zip(request.images, names, maps, strict=True)):
            progress.step(f"{kind}s", index + 1, len(maps))
            for layer in layers:
                file = folder / f"{name}-layer{layer:02d}.{request.format}"
                if request.format == "svg":
                    file.write_text(draw_svg(found, layer, size), encoding="utf-8")
                else:
                    draw(found, layer, size).save(file, optimize=True)
                groups = found.layers[layer]
                pictures.append(
                    Picture(
                        file=file.name,
                        image=str(path),
                        layer=layer,
                        tokens=groups.tokens,
                        groups=len(groups.merged),
                        largest=groups.largest,
                        patches_in_prefix=groups.patches_in_prefix,
                        dropped=groups.dropped,
                    )
                )
        result = InspectResult(artifact, output.absolute(), maps[0].grid, tuple(pictures))
        write_json(folder / SUMMARY, result.to_dict())
    return result


def layers_from_text(text: str, depth: int) -> tuple[int, ...]:
    """Indices of the layers that ``--layer`` names."""
    if text == "all":
        return tuple(range(depth))
    if text == "last":
        return (depth - 1,)
    try:
        layer = int(text)
    except ValueError:
        raise UsageError(f"layer is {text!r}; expected a number, all or last") from None
    if not 0 <= layer < depth:
        raise InputError(
            f"layer is {layer}; the model has {depth} layers, give 0 to {depth - 1}, all or last"
        )
    return (layer,)
