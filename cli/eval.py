"""``tome-export eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tome_export.cli.format import artifact_values, listed, model_lines, table
from tome_export.cli.options import (
    FILE,
    LabelsGroup,
    StoredWeightsGroup,
    grouped_command,
    integers,
    option,
)
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.display import percent, short_macs

if TYPE_CHECKING:
    from tome_export.artifact.evaluation import (
        CandidateResult,
        Evaluation,
        EvaluationData,
        Share,
        Similarities,
    )

COUNT = click.IntRange(min=1)

SHOWN = 20
"""Most unreadable images that are listed; JSON has all."""


def _names(_context: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    return () if value == "none" else tuple(dict.fromkeys(value.split(",")))


class EvalOptions(LabelsGroup, StoredWeightsGroup):
    """Images."""

    data: tuple[str, ...] = option(
        required=True,
        metavar="FOLDER|FILES|samples",
        help="One sub-folder per class, or images with --labels; .tar shards "
        "('s-{000..010}.tar'); .parquet files; or the samples of the model. Repeatable.",
    )
    limit: int | None = option(type=COUNT, help="Most images, taken evenly from all.")
    r: tuple[int, ...] = option(
        heading="Model",
        type=integers("whole numbers, such as 0,2,4,8"),
        default=(),
        metavar="0,2,4,8",
        help="Also these constant schedules.",
    )
    against: tuple[str, ...] = option(
        heading="Model",
        type=str,
        default="unmerged,torch",
        callback=_names,
        metavar="NAMES|none",
        help="Of unmerged (on the same backend) and torch (merged, fp32).",
    )
    backend: str = option(heading="Engine", default="ort-cpu", help="Runs the models.")
    batch: int | None = option(
        heading="Engine", type=COUNT, help="Images per batch.  [default: the artifact's OPT]"
    )
    workers: int | None = option(
        heading="Engine",
        type=click.IntRange(min=0),
        help="Processes that decode ahead; 0 for none.  [default: one per core]",
    )
    ray: str | None = option(
        heading="Engine", metavar="local|ADDRESS", help="Run on Ray, an actor per device."
    )
    restart: bool = option(heading="Engine", help="Do not go on where it was interrupted.")


@grouped_command(
    "eval",
    "Top-1 and top-5 on labelled images, merged against unmerged.",
    example="tome-export eval vit_b16-r13 --data imagenet/val --r 4,8",
)
@click.argument("artifact", type=FILE)
def command(terminal: Terminal, /, artifact: Path, options: EvalOptions) -> None:
    """Measure the accuracy of ARTIFACT; go on where the same command was interrupted."""
    with working(terminal) as progress:
        from tome_export.evaluate.main import EvalRequest, evaluate

        result = evaluate(options.request(EvalRequest, artifact=artifact), progress)
    evaluation = result.evaluation
    values = {
        **artifact_values(result.artifact),
        **dict(evaluation),
        "unrecorded": result.unrecorded,
    }
    lines = [*model_lines(result.artifact.manifest), "", *_lines(evaluation)]
    if not result.unrecorded:
        lines.append(f"Recorded: {result.artifact.path}/eval.json")
    terminal.recorded(values, lines, result.unrecorded)


def _lines(found: Evaluation) -> list[str]:
    """One row per candidate, how to read it, and what could not be read."""
    data = found.data
    unlabelled = found.classes is not None and not data.labelled
    return [
        f"{data.images} images of {data.source} ({data.kind}), batch {found.batch}",
        *data.notes,
        *(["The images have no labels: only agreement is told"] if unlabelled else []),
        "",
        *_table(found.candidates),
        "",
        *_legend(found),
        *(
            f"NOT FINITE: {c.name} on {c.backend} gave no numbers for {c.not_finite} images"
            for c in found.candidates
            if c.not_finite
        ),
        *_unreadable(data),
    ]


def _table(candidates: Sequence[CandidateResult]) -> list[str]:
    """A row per candidate; columns without a single figure are left out."""
    rows = []
    for one in candidates:
        apart = one.deviation_from_unmerged
        change = one.difference_to_unmerged
        row = {
            "model": one.name,
            "backend": one.backend,
            # One number for a constant schedule, else all of them.
            "r": str(one.r[0]) if len(set(one.r)) == 1 else ",".join(map(str, one.r)),
            "MACs": short_macs(one.macs),
            "top-1": _share(one.top1),
            "top-5": _share(one.top5),
            "difference": "-",
            "agreement": _share(one.agreement_with_unmerged),
            "cosine, mean (min)": _similarity(one.cosine_to_unmerged),
            "correlation, mean (min)": _similarity(one.correlation_to_unmerged),
            "deviation, mean (max)": f"{apart.mean:.4g} ({apart.max:.4g})" if apart else "-",
        }
        if change:
            low, high = 100 * change.low, 100 * change.high
            row["difference"] = f"{100 * change.share:+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append(row)
    headers = [header for header in rows[0] if {row[header] for row in rows} != {"-"}]
    cells = [[row[header] for header in headers] for row in rows]
    return table(headers, cells, "lll" + "r" * (len(headers) - 3))


def _share(found: Share | None) -> str:
    if found is None:
        return "-"
    return f"{percent(found.share)} [{100 * found.low:.2f}, {100 * found.high:.2f}]"


def _similarity(found: Similarities | None) -> str:
    return f"{found.mean:.6f} ({found.min:.6f})" if found else "-"


def _legend(found: Evaluation) -> list[str]:
    candidates, lines = found.candidates, []
    if any(c.top1 or c.agreement_with_unmerged for c in candidates):
        lines.append(f"[low, high]: {percent(found.confidence)} interval ({found.methods.share})")
    if any(c.difference_to_unmerged for c in candidates):
        lines.append(
            "difference: top-1 minus that of unmerged on the same images, in points "
            f"({found.methods.difference})"
        )
    if any(c.agreement_with_unmerged for c in candidates):
        lines.append("agreement: share of images whose answer is that of unmerged")
    if apart := [one for c in candidates if (one := c.deviation_from_unmerged)]:
        lines.append(
            "deviation: of the numbers, or of the probability of a yes, from those of unmerged, "
            f"whose standard deviation over the images is {apart[0].spread:.4g}"
        )
    if any(c.cosine_to_unmerged for c in candidates):
        lines.append("cosine: of an image's features to those of unmerged")
    if any(c.correlation_to_unmerged for c in candidates):
        lines.append("correlation: of an image's map with that of unmerged (Pearson)")
    return lines


def _unreadable(data: EvaluationData) -> list[str]:
    count = data.unreadable_count
    if not count:
        return []
    names = [f"{one.name}: {one.reason}" for one in data.unreadable]
    lines = listed(names, count, SHOWN, "; --json lists all")
    return ["", f"Unreadable and left out: {count}", *lines]
