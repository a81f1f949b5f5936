"""The section on tokens and multiply-accumulates per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tome_export.artifact import Manifest
from tome_export.artifact.manifest import Layer
from tome_export.display import counted, fixed, macs, macs_unit
from tome_export.report.parts import Section, Table, Text
from tome_export.report.plot import BLUE, GREY, Form, chart, legend, panels, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Tokens and MACs per layer"


def layers_section(manifest: Manifest) -> Section:
    """Tokens in and out, r and MACs of every layer, drawn and as a table."""
    layers, total = [_whole(layer) for layer in manifest.layers], manifest.macs
    what = "video" if manifest.video else "image"
    first, last = layers[0].tokens_in, layers[-1].tokens_out
    lead = (
        f"{counted(first, 'token')} enter the first layer, {counted(last, 'token')} leave the "
        f"last. One {what} costs {macs(total.merged)}, unmerged {macs(total.unmerged)}, a "
        f"ratio of {total.ratio:.2f}. MACs are multiply-accumulates of matrix products."
    )
    caption = (
        f"Tokens that leave each layer, from {first} down to {last}, and MACs of each layer in "
        "the merged and the unmerged model."
    )
    scale, unit = macs_unit(max(layer.macs_unmerged for layer in layers))
    rows = [
        (
            *(index, one.tokens_in, one.r, one.tokens_out),
            *(fixed(count / scale) for count in (one.macs_unmerged, one.macs)),
        )
        for index, one in enumerate(layers)
    ]
    headers = ("layer", "tokens in", "r", "tokens out", f"unmerged {unit}", f"merged {unit}")
    drawing = chart("layers", caption, lambda form: _draw(form, layers, what))
    table = Table("Tokens and MACs of every layer", headers, rows)
    return Section("layers", TITLE, (Text(lead), drawing, table))


def _whole(layer: Layer) -> Layer:
    """A layer of a video tower with the tokens of all its clips; any other as it is."""
    if layer.clips is None or layer.joined is None or layer.cross is None:
        return layer
    counts = {
        "tokens_in": layer.clips * layer.joined * layer.tokens_in,
        "r": layer.clips * (layer.cross + layer.r),
        "tokens_out": layer.clips * layer.tokens_out,
    }
    return layer.model_copy(update=counts)


def _draw(form: Form, layers: list[Layer], what: str) -> Figure:
    figure, (tokens, cost) = panels(form, 2, 2.9, narrow_height=2.35)
    index, before = np.arange(len(layers)), layers[0].tokens_in
    tokens.axhline(before, color=GREY, linestyle=(0, (4, 2)), label="unmerged")
    after = [layer.tokens_out for layer in layers]
    tokens.plot(index, after, color=BLUE, marker="o", label="merged")
    tokens.set_ylim(0, before * 1.08)
    tokens.set_ylabel("tokens after the layer")
    scale, unit = macs_unit(max(layer.macs_unmerged for layer in layers))
    cost.bar(index - 0.21, [one.macs_unmerged / scale for one in layers], 0.38, color=GREY)
    cost.bar(index + 0.21, [one.macs / scale for one in layers], 0.38, color=BLUE)
    cost.set_ylabel(f"{unit} per {what}")
    for axes in (tokens, cost):
        whole_numbers(axes, form, len(layers))
    legend(figure, tokens, form)
    return figure
