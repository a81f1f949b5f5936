"""The section on tokens and multiply-accumulates per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.artifact import Manifest
from tome_export.report.numbers import counted, fixed, macs, macs_unit
from tome_export.report.parts import Drawing, Section, Table, Text
from tome_export.report.plot import BLUE, GREY, Form, chart, legend, panels, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Tokens and MACs per layer"


def layers_section(manifest: Manifest) -> Section:
    """Tokens in and out, r and MACs of every layer, drawn and as a table."""
    layers, total = manifest.layers or [], manifest.macs
    if not layers or not total:
        return Section("layers", TITLE, (Text("This artifact does not say."),))
    what = "video" if manifest.video else "image"
    layers = [_whole(layer) for layer in layers]
    first, last = layers[0]["tokens_in"], layers[-1]["tokens_out"]
    lead = (
        f"{counted(first, 'token')} enter the first layer, {counted(last, 'token')} leave the "
        f"last. One {what} costs {macs(total['merged'])}, unmerged {macs(total['unmerged'])}, a "
        f"ratio of {total['ratio']:.2f}. MACs are multiply-accumulates of matrix products."
    )
    caption = (
        f"Tokens that leave each layer, from {first} down to {last}, and MACs of each layer in "
        "the merged and the unmerged model."
    )
    scale, unit = macs_unit(max(layer["macs_unmerged"] for layer in layers))
    rows = [
        (
            index,
            layer["tokens_in"],
            layer["r"],
            layer["tokens_out"],
            fixed(layer["macs_unmerged"] / scale),
            fixed(layer["macs"] / scale),
        )
        for index, layer in enumerate(layers)
    ]
    headers = ("layer", "tokens in", "r", "tokens out", f"unmerged {unit}", f"merged {unit}")
    return Section(
        "layers",
        TITLE,
        (
            Text(lead),
            Drawing(chart("layers", caption, lambda form: _draw(form, layers, what))),
            Table("Tokens and MACs of every layer", headers, rows),
        ),
    )


def _whole(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of a video tower with the tokens of all its clips; any other as it is."""
    if "clips" not in layer:
        return dict(layer)
    clips = layer["clips"]
    counts = {
        "tokens_in": clips * layer["joined"] * layer["tokens_in"],
        "r": clips * (layer["cross"] + layer["r"]),
        "tokens_out": clips * layer["tokens_out"],
    }
    return {**layer, **counts}


def _draw(form: Form, layers: list[dict[str, Any]], what: str) -> Figure:
    figure, (tokens, cost) = panels(form, 2, 2.9, narrow_height=2.35)
    index = np.arange(len(layers))
    before = layers[0]["tokens_in"]
    tokens.axhline(before, color=GREY, linestyle=(0, (4, 2)), label="unmerged")
    tokens.plot(
        index,
        [layer["tokens_out"] for layer in layers],
        color=BLUE,
        marker="o",
        label="merged",
    )
    tokens.set_ylim(0, before * 1.08)
    tokens.set_ylabel("tokens after the layer")
    scale, unit = macs_unit(max(layer["macs_unmerged"] for layer in layers))
    for offset, key, colour in ((-0.21, "macs_unmerged", GREY), (0.21, "macs", BLUE)):
        heights = [layer[key] / scale for layer in layers]
        cost.bar(index + offset, heights, 0.38, color=colour)
    cost.set_ylabel(f"{unit} per {what}")
    for axes in (tokens, cost):
        whole_numbers(axes, form, len(layers))
    legend(figure, tokens, form)
    return figure
