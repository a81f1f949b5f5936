"""Make the pictures of docs/gallery.

    python scripts/gallery.py                  # both pictures
    python scripts/gallery.py --record OUT     # first run the model again: minutes on two cores

``merged_tokens.jpg`` is drawn from ``merged_tokens.json``, which ``--record`` writes: what the
exported graphs of a trained model decided and gave. OUT is the folder that
``scripts/trained_dinov2.py`` makes. ``speed.svg`` is drawn from ``benchmarks/results/cpu.json``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import tome_export
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
RECORD, TOKENS, SPEED = (
    GALLERY / f"{name}" for name in ("merged_tokens.json", "merged_tokens.jpg", "speed.svg")
)
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"

PANEL, GAP, LEFT, LINE = 280, 10, 10, 28
"""Pixels of a panel's side, between panels, to their left, and of a line of text."""

MAP_SIDE = 148
"""Pixels of a side that a saliency map is recorded with: enough for a panel."""

INK, PAPER = (25, 25, 25), (255, 255, 255)
DIGEST = "Inputs-SHA256"

MODEL, R = "dinov2_s14_saliency_518", 100
IMAGES = ("chelsea.jpg", "rocket.jpg", "camera.jpg")
LAYERS = (5, 11)
"""Layers behind which tokens are shown."""


def record(unmerged: Artifact, merged: Artifact) -> dict[str, Any]:
    """What two artifacts of a saliency model decide and give on the images."""
    manifest = merged.manifest
    grid = grid_from_manifest(manifest, merged.path)
    paths = [DATA / name for name in IMAGES]
    pixels = load_images(paths, RECIPES[MODEL].preprocessing)
    found = merge_maps(merged, pixels)
    saliency = []
    for artifact in (unmerged, merged):
        with tome_export.load(artifact.path) as model:
            saliency.append(model(paths).map[:, 0])
    return {
        "model": MODEL,
        "r": R,
        "weights": manifest.model.weights.kind,
        "macs": [manifest.macs.unmerged, manifest.macs.merged],
        "depth": len(found[0].layers),
        "grid": [grid.rows, grid.cols, grid.height, grid.width],
        "images": {
            name: {
                "layers": [
                    {
                        "layer": layer,
                        "tokens": found[index].layers[layer].tokens,
                        "ids": found[index].layers[layer].ids.ravel().tolist(),
                    }
                    for layer in LAYERS
                ],
                "saliency": [png_text(maps[index]) for maps in saliency],
                "difference": float(np.abs(saliency[0][index] - saliency[1][index]).mean()),
            }
            for index, name in enumerate(IMAGES)
        },
    }


def run_models(trained: Path) -> dict[str, Any]:
    """Build the model unmerged and merged, with trained weights, and run it."""
    with tempfile.TemporaryDirectory() as folder:
        unmerged, merged = (
            build(
                BuildRequest(
                    MODEL,
                    Path(folder) / str(r),
                    schedule=Schedule(r),
                    weights=str(trained / "saliency.safetensors"),
                    engine="none",
                    check=False,
                )
            )
            for r in (0, R)
        )
        return record(unmerged, merged)


def png_text(values: NDArray[np.float32]) -> str:
    """A map ``[H, W]`` of 0 to 1 as a small grey PNG, in text."""
    image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tokens_picture(recorded: dict[str, Any]) -> Image.Image:
    """One row for each image: itself, its tokens, and the saliency map unmerged and merged."""
    rows = [panels(recorded, name) for name in recorded["images"]]
    width = 2 * LEFT + len(rows[0]) * (PANEL + GAP) - GAP
    page = Image.new("RGB", (width, LINE + GAP + len(rows) * (PANEL + LINE + GAP)), PAPER)
    pen = ImageDraw.Draw(page)
    before, after = recorded["macs"]
    heading = (
        f"{recorded['model']}, trained weights, r = {recorded['r']}: "
        f"{before / 1e9:.1f} G to {after / 1e9:.1f} G MACs"
    )
    pen.text((LEFT, GAP), heading, INK, font(20, bold=True))
    for row, entries in enumerate(rows):
        y = LINE + 2 * GAP + row * (PANEL + LINE + GAP)
        for column, (picture, caption) in enumerate(entries):
            x = LEFT + column * (PANEL + GAP)
            page.paste(picture, (x, y))
            pen.text((x, y + PANEL + 4), caption, INK, font(15))
    return page


def panels(recorded: dict[str, Any], name: str) -> list[tuple[Image.Image, str]]:
    """Pictures of one row with their captions."""
    preprocessing = RECIPES[recorded["model"]].preprocessing
    image = image_from_pixels(load_images([DATA / name], preprocessing)[0], preprocessing)
    entry, grid = recorded["images"][name], PatchGrid(*recorded["grid"])
    photograph = Image.fromarray(image).resize((PANEL, PANEL), Image.Resampling.BOX)
    found = [(photograph, f"{grid.patches} patches, a class token")]
    groups = tuple(
        LayerGroups(
            each["layer"], each["tokens"], np.reshape(each["ids"], (grid.rows, grid.cols)), 0
        )
        for each in entry["layers"]
    )
    for index, group in enumerate(groups):
        # Drawn larger and made smaller, so that every panel has the same size.
        picture = draw(MergeMap(image, grid, groups), index, 2 * PANEL)
        caption = f"layer {group.layer + 1} of {recorded['depth']}: {group.tokens} tokens"
        found.append((picture.resize((PANEL, PANEL), Image.Resampling.BOX), caption))
    captions = "saliency, unmerged", f"merged, mean difference {entry['difference']:.3f}"
    for text, caption in zip(entry["saliency"], captions, strict=True):
        found.append((heat_map(text, photograph), caption))
    return found


def heat_map(text: str, photograph: Image.Image) -> Image.Image:
    """A recorded map in colours over a grey photograph."""
    import matplotlib as mpl

    with Image.open(io.BytesIO(base64.b64decode(text))) as small:
        values = np.asarray(small.resize(photograph.size, Image.Resampling.BILINEAR))
    colours = Image.fromarray(mpl.colormaps["inferno"](values, bytes=True)[..., :3])
    return Image.blend(photograph.convert("L").convert("RGB"), colours, 0.65)


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that matplotlib brings: the same on every machine."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def tokens_jpeg(recorded: dict[str, Any]) -> bytes:
    """The file of ``tokens_picture``, with the digest of what it is drawn from."""
    buffer = io.BytesIO()
    tokens_picture(recorded).save(
        buffer,
        "jpeg",
        quality=80,
        subsampling=0,
        optimize=True,
        comment=f"{DIGEST} {tokens_digest(recorded)}",
    )
    return buffer.getvalue()


def tokens_digest(recorded: dict[str, Any]) -> str:
    """Digest of what was recorded and of the image files."""
    digest = hashlib.sha256(json.dumps(recorded, sort_keys=True).encode())
    for name in recorded["images"]:
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
    parser.add_argument("--record", type=Path, metavar="OUT", help="run the trained model again")
    if trained := parser.parse_args().record:
        RECORD.write_text(json.dumps(run_models(trained), separators=(",", ":")) + "\n")
    TOKENS.write_bytes(tokens_jpeg(json.loads(RECORD.read_text())))
    SPEED.write_text(speed_svg(json.loads(RESULTS.read_text())))
    for file in (TOKENS, SPEED):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
