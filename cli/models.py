"""``tome-export models``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tome_export.cli.format import fields, table
from tome_export.cli.options import ImageSizeGroup, grouped_command
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.display import short_macs

if TYPE_CHECKING:
    from tome_export.models.catalog import ModelDetails

HEADERS = ("name", "input", "tokens", "depth", "MACs", "r", "MACs ratio", "output", "family")


@grouped_command(
    "models", "List the models, or describe one.", example="tome-export models vit_b16"
)
@click.argument("name", required=False)
def command(terminal: Terminal, /, name: str | None, options: ImageSizeGroup) -> None:
    """List the models that have a recipe, or describe NAME.

    r is the recommended number of tokens to merge per layer, MACs ratio what it saves.
    """
    with working(terminal):
        from tome_export.models.catalog import catalog, details

        if options.image_size is not None and name is None:
            raise click.UsageError("--image-size is for one model; give its NAME")
        found = details(name, options.image_size) if name else None
        models = [] if name else catalog()
    if found is not None:
        terminal.result(found.document(), _details(found))
        return
    rows = [
        (
            model.name,
            _input(model),
            model.tokens,
            model.depth,
            short_macs(model.macs),
            model.recommended_r,
            f"{model.macs_ratio:.2f}",
            model.output,
            model.family,
        )
        for model in models
    ]
    lines = table(HEADERS, rows, "llrrrrrll")
    more = (
        "Also timm:<name>, hf:<folder or hub name>, open_clip:<arch>[/<weights>], "
        "torchvision:<name>[.<weights>], module:function. One in detail: tome-export models NAME"
    )
    descriptions = fields({model.name: model.description for model in models})
    listed = {"models": [model.row() for model in models]}
    terminal.result(listed, [*lines, "", *descriptions, "", more])


def _input(model: ModelDetails) -> str:
    return "x".join(map(str, model.input_size))


def _details(model: ModelDetails) -> list[str]:
    used = model.preprocessing
    tokens = ", ".join(str(layer.tokens_out) for layer in model.layers)
    facts = {
        "Name": ", ".join([model.name, *model.aliases]),
        "Model": model.description,
        "Family": model.family,
        "timm name": model.timm_name or "none",
        "Input": f"{_input(model)}, mean {list(used.mean)}, std {list(used.std)}",
        "Resize": f"{used.resize}, {used.interpolation}, crop {used.crop_pct:g}",
        "Output": f"{model.output}, of kind {model.output_kind}",
        "Tokens": f"{model.tokens}, {model.prefix} of them prefix tokens",
        "Depth": str(model.depth),
        "r": f"{model.recommended_r} ({model.recommended_r_source})",
        "Merged": f"tokens after each layer {tokens}",
        "MACs": f"{short_macs(model.macs)}, merged {short_macs(model.macs_merged)}",
        "MACs ratio": f"{model.macs_ratio:.2f}",
        "Weights": model.weights,
        "Licence": model.licence or "not stated",
    }
    return fields(facts)
