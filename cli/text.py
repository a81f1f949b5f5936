"""Manifests and parity reports as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tome_export.artifact import Manifest
from tome_export.cli.output import fields, macs, number, percent, size, table
from tome_export.merge.entropy import effective_tokens

RANDOM = (
    "RANDOM WEIGHTS: this model has learned nothing; sizes, speed and parity are real, its "
    "predictions mean nothing"
)

STAND_IN = (
    "Stand-in: this server has no ONNX Runtime backend; our python stand-in runs the ONNX models "
    "on the CPU, so their speed is not that of the backend"
)


COLUMNS = {"tokens in": "tokens_in", "r": "r", "tokens out": "tokens_out"}

VIDEO_COLUMNS = {
    "tokens in": "tokens_in",
    "joined": "joined",
    "across": "cross",
    "clips": "clips",
    "r": "r",
    "tokens out": "tokens_out",
}

VIDEO_NOTE = "Tokens of one clip; all clips together: {} in front of the first layer, {} in the end"


def artifact_lines(manifest: Manifest, path: Path) -> list[str]:
    """All a person wants to know of a build."""
    return [
        *model_lines(manifest),
        "",
        *layer_lines(manifest),
        "",
        *summary_lines(manifest.parity),
        *engine_lines(manifest),
        "",
        *file_lines(manifest, path),
    ]


def warning_lines(manifest: Manifest) -> list[str]:
    """What must not be overlooked."""
    return [RANDOM] if manifest.model.random_weights else []


def model_lines(manifest: Manifest) -> list[str]:
    """Model, weights and how it merges."""
    model, merge = manifest.model, manifest.merge
    weights = model["weights"]
    prop_attn = "on" if merge["prop_attn"] else "off"
    return [
        *warning_lines(manifest),
        *fields(
            [
                ("Model", f"{model['name']}: {model['description']}"),
                ("Weights", f"{weights['kind']}: {weights['source']}"),
                ("Merging", f"{merge['schedule']}, proportional attention {prop_attn}"),
                ("Merge op", merge_op(manifest)),
                ("Precision", manifest.precision),
                ("Batch", manifest.batch),
            ]
        ),
        *([f"  {merge['note']}"] if merge.get("note") else []),
    ]


def merge_op(manifest: Manifest) -> str:
    """How the merge is written into the graph, and for which GPUs its kernels are compiled."""
    plugins = manifest.plugins
    name = str(manifest.merge.merge_op)
    if not plugins:
        return name
    return f"{name}, kernels for compute capability {', '.join(plugins['compute_capabilities'])}"


def layer_lines(manifest: Manifest) -> list[str]:
    """Tokens, r and MACs of each layer, and the ratio."""
    video = manifest.video is not None
    columns = VIDEO_COLUMNS if video else COLUMNS
    rows = [
        (
            index,
            *(layer[key] for key in columns.values()),
            macs(layer["macs_unmerged"]),
            macs(layer["macs"]),
        )
        for index, layer in enumerate(manifest.layers)
    ]
    total = manifest.macs
    each = [] if not video else [VIDEO_NOTE.format(manifest.tokens_in, manifest.tokens[-1])]
    return [
        *table(("layer", *columns, "MACs unmerged", "MACs merged"), rows),
        *each,
        f"MACs per {'video' if video else 'image'}: {macs(total['unmerged'])} unmerged, "
        f"{macs(total['merged'])} merged, ratio {total['ratio']:.2f}",
    ]


def subject(parity: Mapping[str, Any]) -> str:
    """What parity was checked on: ``image`` or ``video``."""
    return str(parity.get("subject", "image"))  # artifacts of before do not say


def summary_lines(parity: Mapping[str, Any] | None) -> list[str]:
    """A parity report in short."""
    if parity is None:
        return ["Parity: not checked"]
    output, led = parity["output"], parity["led_output"]
    verdict = "passed" if parity["passed"] else "FAILED"
    defects = parity["defects"]
    explained = max(0, parity["disagreements"] - defects)
    top1 = output["top1_agreement"]  # None for features
    agreement = "" if top1 is None else f"top-1 agreement {percent(top1)}, "
    return [
        f"Parity {verdict}: {parity['candidate']}, {parity['precision']}, {parity['images']} "
        f"{subject(parity)}s against PyTorch fp32",
        f"  merge decisions {parity['decisions']}, disagreements {parity['disagreements']} "
        f"({explained} explained by rounding, {defects} defects)",
        f"  cosine {number(output['cosine'], '.7f')}, {agreement}"
        f"output error {number(output['max_abs'], '.2e')}",
        f"  output error on the reference's plans {number(led['max_abs'], '.2e')} of "
        f"{number(parity['led_allowed'], '.2e')} allowed",
    ]


def parity_lines(report: Mapping[str, Any]) -> list[str]:
    """A whole parity report, layer by layer."""
    rows = [
        (
            f"{layer['layer']} across" if layer.get("across") else layer["layer"],
            layer["decisions"],
            layer["disagreements"],
            layer["defects"] + layer["op_defects"],
            number(layer["largest_margin"], ".1e"),
            number(layer["margin_bound"], ".1e"),
            number(layer["score_error"], ".1e"),
            number(layer["score_error_allowed"], ".1e"),
            layer["images_diverged"],
        )
        for layer in report["layers"]
    ]
    headers = (
        "layer",
        "decisions",
        "differ",
        "defects",
        "margin",
        "bound",
        "score error",
        "allowed",
        f"{subject(report)}s diverging",
    )
    failures = [f"  failed: {reason}" for reason in report["failures"]]
    lines = table(headers, rows) if rows else ["no layer merges"]
    return [*summary_lines(report), *failures, "", *lines]


def engine_lines(manifest: Manifest) -> list[str]:
    """The engines, or why there is none."""
    engines = manifest.engines
    if not engines:
        return [f"Engine: none; {manifest.engine_note}"]
    lines = []
    for name, engine in engines.items():
        targets = ", ".join(engine["targets"])
        lines.append(
            f"Engine: {engine['file']}, {name} {engine['version']}, batch {engine['batch']}, "
            f"for compute capability {targets}, built in {engine['build_seconds']:.1f} s"
        )
        lines += [f"  {note}" for note in engine["notes"]]
    return lines


def file_lines(manifest: Manifest, path: Path) -> list[str]:
    """Files with their sizes, and where they are."""
    folders: dict[str, int] = {}
    for name, record in manifest.files.items():
        folder, slash, _ = name.partition("/")
        folders[folder + slash] = folders.get(folder + slash, 0) + record["bytes"]
    rows = [(name, size(total)) for name, total in folders.items()]
    return [*table(("file", "size"), rows, "lr"), f"Artifact: {path}"]


def accuracy_lines(accuracy: Mapping[str, Any] | None) -> list[str]:
    """Top-1 on labelled images."""
    if accuracy is None:
        return []
    return [
        f"Top-1 on {accuracy['images']} labelled test images: unmerged "
        f"{percent(accuracy['unmerged'])} (PyTorch fp32), merged {percent(accuracy['merged'])} "
        f"({accuracy['backend']})"
    ]


UNDER = 10
"""Most images that are listed as merged too much."""


def entropy_lines(entropy: Mapping[str, Any]) -> list[str]:
    """How evenly images are spread over their tokens, and those of which too little is left."""
    patches = entropy["patches"]

    def shown(value: float) -> str:
        return f"{value:.4f} ({effective_tokens(value, patches):.1f} tokens)"

    lines = [
        f"Token-size entropy: least {shown(entropy['least'])}, 5th percentile "
        f"{shown(entropy['p5'])}, median {shown(entropy['median'])}; 1 is {patches} tokens"
    ]
    under = entropy["under"]
    if under:
        lines.append(f"Under {entropy['asked']:g}:")
        lines += [f"  {name}: {shown(value)}" for name, value in under[:UNDER]]
        lines += [f"  and {len(under) - UNDER} more"] if len(under) > UNDER else []
    return lines
