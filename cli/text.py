"""Manifests and parity reports as lines of text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tome_export.cli.output import fields, macs, number, percent, size, table

if TYPE_CHECKING:
    from pathlib import Path

    from tome_export.artifact import Manifest
    from tome_export.artifact.parity import ParityReport, ParitySummary

RANDOM = (
    "RANDOM WEIGHTS: this model has learned nothing; sizes, speed and parity are real, its "
    "predictions mean nothing"
)

STAND_IN = (
    "Stand-in: this server has no ONNX Runtime backend; our python stand-in runs the ONNX models "
    "on the CPU, so their speed is not that of the backend"
)


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
    prop_attn = "on" if merge.prop_attn else "off"
    return [
        *warning_lines(manifest),
        *fields(
            [
                ("Model", f"{model.name}: {model.description}"),
                ("Weights", f"{model.weights.kind}: {model.weights.source}"),
                ("Output", output_text(manifest)),
                ("Merging", f"{merge.schedule}, proportional attention {prop_attn}"),
                ("Merge op", merge_op(manifest)),
                ("Precision", manifest.precision),
                ("Batch", str(manifest.batch)),
            ]
        ),
        *([f"  {merge.note}"] if merge.note else []),
    ]


def output_text(manifest: Manifest) -> str:
    """What the model gives, what makes scores of it, and why it is taken for that."""
    note, scores = manifest.form.note, manifest.activation
    given = f"{manifest.output.name} {list(manifest.output.shape[1:])}"
    how = {"softmax": ", softmax", "sigmoid": ", sigmoid", "none": ", numbers (regression)"}
    return given + (how[scores] if scores else "") + (f": {note}" if note else "")


def merge_op(manifest: Manifest) -> str:
    """How the merge is written into the graph, and for which GPUs its kernels are compiled."""
    name = manifest.merge.merge_op
    if manifest.plugins is None:
        return name
    return (
        f"{name}, kernels for compute capability {', '.join(manifest.plugins.compute_capabilities)}"
    )


def layer_lines(manifest: Manifest) -> list[str]:
    """Tokens, r and MACs of each layer, and the ratio."""
    video, total = manifest.video is not None, manifest.macs
    more = ("joined", "across", "clips") if video else ()
    rows = [
        (
            index,
            one.tokens_in,
            *((one.joined, one.cross, one.clips) if video else ()),
            one.r,
            one.tokens_out,
            macs(one.macs_unmerged),
            macs(one.macs),
        )
        for index, one in enumerate(manifest.layers)
    ]
    headers = ("layer", "tokens in", *more, "r", "tokens out", "MACs unmerged", "MACs merged")
    return [
        *table(headers, rows),
        *([VIDEO_NOTE.format(manifest.tokens_in, manifest.tokens[-1])] if video else []),
        f"MACs per {'video' if video else 'image'}: {macs(total.unmerged)} unmerged, "
        f"{macs(total.merged)} merged, ratio {total.ratio:.2f}",
    ]


def summary_lines(parity: ParitySummary | None) -> list[str]:
    """A parity report in short."""
    if parity is None:
        return ["Parity: not checked"]
    output, led, defects = parity.output, parity.led_output, parity.defects
    top1 = output.top1_agreement  # None for features
    agreement = "" if top1 is None else f"top-1 agreement {percent(top1)}, "
    return [
        f"Parity {'passed' if parity.passed else 'FAILED'}: {parity.candidate}, "
        f"{parity.precision}, {parity.images} {parity.subject}s against PyTorch fp32",
        f"  merge decisions {parity.decisions}, disagreements {parity.disagreements} "
        f"({max(0, parity.disagreements - defects)} explained by rounding, {defects} defects)",
        f"  cosine {number(output.cosine, '.7f')}, {agreement}"
        f"output error {number(output.max_abs, '.2e')}",
        f"  output error on the reference's plans {number(led.max_abs, '.2e')} of "
        f"{number(parity.led_allowed, '.2e')} allowed",
    ]


def parity_lines(report: ParityReport) -> list[str]:
    """A whole parity report, layer by layer."""
    rows = [
        (
            f"{one.layer} across" if one.across else one.layer,
            one.decisions,
            one.disagreements,
            one.defects + one.op_defects,
            number(one.largest_margin, ".1e"),
            number(one.margin_bound, ".1e"),
            number(one.score_error, ".1e"),
            number(one.score_error_allowed, ".1e"),
            one.images_diverged,
        )
        for one in report.layers
    ]
    headers = ["layer", "decisions", "differ", "defects", "margin", "bound", "score error"]
    headers += ["allowed", f"{report.subject}s diverging"]
    failures = [f"  failed: {reason}" for reason in report.failures]
    lines = table(headers, rows) if rows else ["no layer merges"]
    return [*summary_lines(report.summary()), *failures, "", *lines]


def engine_lines(manifest: Manifest) -> list[str]:
    """The engines, or why there is none."""
    if not manifest.engines:
        return [f"Engine: none; {manifest.engine_note}"]
    lines = []
    for name, engine in manifest.engines.items():
        lines.append(
            f"Engine: {engine.file}, {name} {engine.version}, batch {engine.batch}, for compute "
            f"capability {', '.join(engine.targets)}, built in {engine.build_seconds:.1f} s"
        )
        lines += [f"  {note}" for note in engine.notes]
    return lines


def file_lines(manifest: Manifest, path: Path) -> list[str]:
    """Files with their sizes, and where they are."""
    folders: Counter[str] = Counter()
    for name, record in manifest.files.items():
        folder, slash, _ = name.partition("/")
        folders[folder + slash] += record.bytes
    rows = [(name, size(total)) for name, total in folders.items()]
    return [*table(("file", "size"), rows, "lr"), f"Artifact: {path}"]
