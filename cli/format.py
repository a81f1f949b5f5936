"""Tables, manifests, parity reports and answers of models as lines of text."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tome_export.display import number, percent, short_macs, size

if TYPE_CHECKING:
    from pathlib import Path

    from tome_export.artifact import Artifact, Manifest
    from tome_export.artifact.parity import ParityReport, ParitySummary
    from tome_export.data.answers import ImageAnswer

RANDOM = (
    "RANDOM WEIGHTS: this model has learned nothing; sizes, speed and parity are real, its "
    "predictions mean nothing"
)

STAND_IN = (
    "Stand-in: this server has no ONNX Runtime backend; our python stand-in runs the ONNX models "
    "on the CPU, so their speed is not that of the backend"
)

VIDEO_NOTE = "Tokens of one clip; all clips together: {} in front of the first layer, {} in the end"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], sides: str = "") -> list[str]:
    """Lines of a table; sides are ``l`` or ``r`` per column, all ``r`` where they are empty."""
    return _aligned([headers, *rows], sides or "r" * len(headers))


def fields(values: Mapping[str, str]) -> list[str]:
    """Lines of ``name  value``, values aligned."""
    return _aligned([*values.items()], "ll")


def _aligned(rows: Sequence[Sequence[object]], sides: str) -> list[str]:
    """The same text on a terminal and in a pipe: a table is as wide as it is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for side in sides:
        grid.add_column(justify="left" if side == "l" else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=io.StringIO(), width=1 << 16, color_system=None)
    with console.capture() as shown:
        console.print(grid)
    return [line.rstrip() for line in shown.get().split("\n")[:-1]]


def listed(names: Sequence[str], total: int, most: int, rest: str = "") -> list[str]:
    """Indented lines of the first names, and how many of all are left out."""
    more = [f"and {total - most} more{rest}"] if total > most else []
    return [f"  {line}" for line in (*names[:most], *more)]


def artifact_values(artifact: Artifact) -> dict[str, Any]:
    """What every JSON result on an artifact begins with."""
    model = artifact.manifest.model
    return {
        "artifact": str(artifact.path),
        "model": model.name,
        "random_weights": model.random_weights,
    }


def artifact_lines(manifest: Manifest, path: Path) -> list[str]:
    """All a person wants to know of a build."""
    return [
        *model_lines(manifest),
        "",
        *_layer_lines(manifest),
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
    model, merge, output = manifest.model, manifest.merge, manifest.output
    scores = {"softmax": ", softmax", "sigmoid": ", sigmoid", "none": ", numbers (regression)"}
    form = scores[manifest.activation] if manifest.activation else ""
    form += f": {manifest.form.note}" if manifest.form.note else ""
    merge_op: str = merge.merge_op
    if manifest.plugins is not None:
        capabilities = ", ".join(manifest.plugins.compute_capabilities)
        merge_op += f", kernels for compute capability {capabilities}"
    prop_attn = "on" if merge.prop_attn else "off"
    facts = {
        "Model": f"{model.name}: {model.description}",
        "Weights": f"{model.weights.kind}: {model.weights.source}",
        "Output": f"{output.name} {list(output.shape[1:])}{form}",
        "Merging": f"{merge.schedule}, proportional attention {prop_attn}",
        "Merge op": merge_op,
        "Precision": manifest.precision,
        "Batch": str(manifest.batch),
    }
    note = [f"  {merge.note}"] if merge.note else []
    return [*warning_lines(manifest), *fields(facts), *note]


def _layer_lines(manifest: Manifest) -> list[str]:
    video, total = manifest.video is not None, manifest.macs
    rows = [
        (
            index,
            one.tokens_in,
            *((one.joined, one.cross, one.clips) if video else ()),
            one.r,
            one.tokens_out,
            short_macs(one.macs_unmerged),
            short_macs(one.macs),
        )
        for index, one in enumerate(manifest.layers)
    ]
    joined = ("joined", "across", "clips") if video else ()
    headers = ("layer", "tokens in", *joined, "r", "tokens out", "MACs unmerged", "MACs merged")
    return [
        *table(headers, rows),
        *([VIDEO_NOTE.format(manifest.tokens_in, manifest.tokens[-1])] if video else []),
        f"MACs per {'video' if video else 'image'}: {short_macs(total.unmerged)} unmerged, "
        f"{short_macs(total.merged)} merged, ratio {total.ratio:.2f}",
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


def answer_values(answer: ImageAnswer) -> dict[str, Any]:
    """What a model says of an image, as data."""
    if answer.labels is not None:
        return {"image": str(answer.image), "labels": [vars(label) for label in answer.labels]}
    return {
        "image": str(answer.image),
        **{name: array.tolist() for name, array in answer.features.items()},
    }


def answer_lines(answer: ImageAnswer) -> list[str]:
    """Labels with their scores, or the first numbers of features."""
    if answer.labels is not None:
        rows = [(label.label, f"{label.score:.4f}", label.index) for label in answer.labels]
        return table(("label", "score", "index"), rows, "lrr")
    return [
        f"{name} {list(array.shape)}: {', '.join(f'{x:.4f}' for x in array.reshape(-1)[:4])}"
        f"{', ...' * (array.size > 4)}"
        for name, array in answer.features.items()
    ]
