"""Make the pictures of docs/gallery.

    python scripts/gallery.py             # both pictures
    python scripts/gallery.py --groups    # first run the models again: a minute on two cores

``merged_tokens.png`` is drawn from ``merged_tokens.json``, which ``--groups`` writes: what the
exported graphs of the models decided. ``speed.svg`` is drawn from ``benchmarks/results/cpu.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.data.preprocess import load_images
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES
from tome_export.models.facts import DATA
from tome_export.runtime.merge_maps import (
    LayerGroups,
    MergeMap,
    grid_from_manifest,
    image_from_pixels,
    merge_maps,
)
from tome_export.spec import PatchGrid
from tome_export.visualize.draw import draw

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"
GROUPS, TOKENS, SPEED = (
    GALLERY / f"{name}" for name in ("merged_tokens.json", "merged_tokens.png", "speed.svg")
)
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"

PANEL, GAP, LEFT, LINE = 320, 12, 12, 30
"""Pixels of a panel's side, between panels, to their left, and of a line of text."""

INK, PAPER = (25, 25, 25), (255, 255, 255)
DIGEST = "Inputs-SHA256"


@dataclass(frozen=True)
class Example:
    """A model, images, and the layers after which to show them."""

    model: str
    r: int
    weights: str
    said: str
    images: tuple[str, ...]
    layers: tuple[int, ...]


EXAMPLES = (
    Example("vit_digits", 8, "pretrained", "trained weights", ("digit.png",), (1, 3, 5)),
    Example("vit_b16", 16, "random", "random weights", ("chelsea.jpg", "coffee.jpg"), (2, 5, 11)),
)


def groups_of(example: Example, artifact: Artifact) -> dict[str, Any]:
    """What the artifact's graph decides on an example's images."""
    grid = grid_from_manifest(artifact.manifest, artifact.path)
    maps = merge_maps(artifact, [DATA / name for name in example.images])
    return {
        "model": example.model,
        "r": example.r,
        "weights": example.said,
        "depth": len(maps[0].layers),
        "grid": [grid.rows, grid.cols, grid.height, grid.width],
        "images": {
            name: [
                {
                    "layer": layer,
                    "tokens": found.layers[layer].tokens,
                    "ids": found.layers[layer].ids.ravel().tolist(),
                }
                for layer in example.layers
            ]
            for name, found in zip(example.images, maps, strict=True)
        },
    }


def run_models() -> list[dict[str, Any]]:
    """Build each example's model and run it."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for example in EXAMPLES:
            request = BuildRequest(
                example.model,
                Path(folder) / example.model,
                schedule=Schedule(example.r),
                weights=example.weights,
                engine="none",
                check=False,
            )
            results.append(groups_of(example, build(request)))
    return results


def tokens_picture(examples: list[dict[str, Any]]) -> Image.Image:
    """Original and merged tokens of every image, one row each under its model's heading."""
    rows = sum(len(example["images"]) for example in examples)
    width = 2 * LEFT + 4 * PANEL + 3 * GAP
    height = GAP + rows * (PANEL + LINE + GAP) + len(examples) * (LINE + GAP)
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    y = GAP
    for example in examples:
        heading = f"{example['model']}, {example['weights']}, r = {example['r']}"
        pen.text((LEFT, y), heading, INK, font(22, bold=True))
        y += LINE + GAP // 2
        for name, layers in example["images"].items():
            for column, (picture, caption) in enumerate(panels(example, name, layers)):
                x = LEFT + column * (PANEL + GAP)
                page.paste(picture, (x, y))
                pen.text((x, y + PANEL + 4), caption, INK, font(18))
            y += PANEL + LINE + GAP
        y += GAP // 2
    return page


def panels(
    example: dict[str, Any], name: str, layers: list[dict[str, Any]]
) -> list[tuple[Image.Image, str]]:
    """Pictures of one row with their captions."""
    preprocessing = RECIPES[example["model"]].preprocessing
    image = image_from_pixels(load_images([DATA / name], preprocessing)[0], preprocessing)
    grid = PatchGrid(*example["grid"])
    untouched = np.arange(grid.patches).reshape(grid.rows, grid.cols)
    entries = [
        (LayerGroups(0, grid.patches, untouched, 0), f"{grid.patches} patches and a class token")
    ]
    entries += [
        (
            LayerGroups(
                entry["layer"], entry["tokens"], np.reshape(entry["ids"], untouched.shape), 0
            ),
            f"after layer {entry['layer'] + 1} of {example['depth']}: {entry['tokens']} tokens",
        )
        for entry in layers
    ]
    # Drawn twice as large and made smaller, so that every panel has the same size.
    found = MergeMap(image, grid, tuple(groups for groups, _ in entries))
    return [
        (draw(found, index, 2 * PANEL).resize((PANEL, PANEL), Image.Resampling.BOX), caption)
        for index, (_, caption) in enumerate(entries)
    ]


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that matplotlib brings: the same on every machine."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def tokens_png(examples: list[dict[str, Any]]) -> bytes:
    """The file of ``tokens_picture``, with the digest of what it is drawn from."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text(DIGEST, tokens_digest(examples))
    # A palette makes the photographs a third of their size.
    picture = tokens_picture(examples).quantize(256, Image.Quantize.MEDIANCUT)
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True, pnginfo=notes)
    return buffer.getvalue()


def tokens_digest(examples: list[dict[str, Any]]) -> str:
    """Digest of the recorded groups and the image files."""
    digest = hashlib.sha256(json.dumps(examples, sort_keys=True).encode())
    for example in examples:
        for name in example["images"]:
            digest.update((DATA / name).read_bytes())
    return digest.hexdigest()


def speed_svg(results: dict[str, Any]) -> str:
    """Speed-up of the merged model at each batch size, against what the saved MACs allow."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    where, rows = results["environment"], sorted(results["rows"], key=lambda row: row["batch"])
    model, r, limit = (rows[0][key] for key in ("model", "r", "macs_ratio"))
    series = (
        ("onnxruntime", f"ONNX Runtime {where['versions']['onnxruntime']}", "#0072b2", "white"),
        ("torch", f"PyTorch {where['versions']['torch']}", "#e69f00", "black"),
    )
    with mpl.rc_context({"svg.hashsalt": "tome-export"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        bar = 0.36
        for index, (library, label, colour, ink) in enumerate(series):
            places = [n + (index - 0.5) * bar for n in range(len(rows))]
            values = [row["speedup"][library] for row in rows]
            shown = axes.bar(places, values, bar * 0.94, label=label, color=colour)
            # Inside, where no line crosses them.
            axes.bar_label(shown, [f"{value:.2f}" for value in values], padding=-16, color=ink)
        axes.axhline(limit, color="#555555", linestyle="--", linewidth=1, zorder=0)
        axes.axhline(1, color="#555555", linestyle=":", linewidth=1, zorder=0)
        right = len(rows) - 0.42
        style: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": 9, "color": "#333333"}
        axes.text(right, limit, f"MACs ratio\n{limit:.2f}", **style)
        axes.text(right, 1, "unmerged", **style)
        axes.set_xlim(-0.5, right - 0.02)
        axes.set_ylim(0, max(limit, *(max(row["speedup"].values()) for row in rows)) * 1.3)
        axes.set_xticks(range(len(rows)), [str(row["batch"]) for row in rows])
        axes.set_xlabel("batch size (images)")
        axes.set_ylabel("speed-up over the unmerged model (times)")
        title = f"{model}, r = {r}, fp32, {where['cores']} cores of {where['cpu']}"
        axes.set_title(title, fontsize=11, loc="left")
        axes.legend(loc="upper left", frameon=False, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Description": f"{DIGEST} {speed_digest(results)}"},
        )
    return buffer.getvalue()


def speed_digest(results: dict[str, Any]) -> str:
    """Digest of the rows and where they were measured."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", action="store_true", help="run the models again")
    if parser.parse_args().groups:
        GROUPS.write_text(json.dumps(run_models(), separators=(",", ":")) + "\n")
    TOKENS.write_bytes(tokens_png(json.loads(GROUPS.read_text())))
    SPEED.write_text(speed_svg(json.loads(RESULTS.read_text())))
    for file in (TOKENS, SPEED):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
