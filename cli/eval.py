"""``tome-export eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, grouped, order_option, output_options
from tome_export.cli.output import Terminal, macs, percent, table
from tome_export.cli.progress import working
from tome_export.cli.text import model_lines

if TYPE_CHECKING:
    from tome_export.artifact.evaluation import (
        CandidateResult,
        Cosines,
        Deviations,
        Difference,
        Evaluation,
        EvaluationData,
        Share,
    )

COUNT = click.IntRange(min=1)

SHOWN = 20
"""Most unreadable images that are listed; JSON has all."""


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Whole numbers with commas between them."""

    name = "0,2,4,8"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, ...]:
        """Each number once, in order."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, such as 0,2,4,8", param, context)


def _names(_context: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    return () if value == "none" else tuple(dict.fromkeys(value.split(",")))


eval_options = grouped(
    click.option(
        "--data",
        multiple=True,
        required=True,
        metavar="FOLDER|FILES|samples",
        help="One sub-folder per class, or images with --labels; .tar shards "
        "('s-{000..010}.tar'); .parquet files; or the samples of the model. Repeatable.",
    ),
    click.option("--labels", type=FILE, help="Lines of 'relative/path,class' for a folder."),
    order_option,
    click.option("--limit", type=COUNT, help="Most images, taken evenly from all."),
    click.option("--batch", type=COUNT, help="Images per batch.  [default: the artifact's OPT]"),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        help="Processes that decode ahead; 0 for none.  [default: one per core]",
    ),
    click.option("--r", type=Numbers(), default=(), help="Also these constant schedules."),
    click.option("--backend", default="ort-cpu", show_default=True, help="Runs the models."),
    click.option(
        "--against",
        default="unmerged,torch",
        show_default=True,
        callback=_names,
        metavar="NAMES|none",
        help="Of unmerged (on the same backend) and torch (merged, fp32).",
    ),
    click.option("--weights", metavar="PATH", help="Where the weights are now."),
    click.option("--ray", metavar="local|ADDRESS", help="Run on Ray, an actor per device."),
    click.option("--restart", is_flag=True, help="Do not go on where it was interrupted."),
)


@click.command("eval", short_help="Top-1 and top-5 on labelled images, merged against unmerged.")
@click.argument("artifact", type=FILE)
@eval_options
@output_options
@click.pass_obj
def command(terminal: Terminal, /, **options: Any) -> None:
    """Measure the accuracy of ARTIFACT; go on where the same command was interrupted."""
    artifact: Path = options.pop("artifact")
    with working(terminal) as progress:
        from tome_export.evaluate.main import EvalRequest, evaluate

        result = evaluate(EvalRequest(artifact, **options), progress)
    manifest = result.artifact.manifest
    values = {
        "artifact": str(result.artifact.path),
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        **dict(result.evaluation),
        "unrecorded": result.unrecorded,
    }
    lines = [*model_lines(manifest), "", *_lines(result.evaluation)]
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
    columns = {
        "top-1": [_share(c.top1) for c in candidates],
        "top-5": [_share(c.top5) for c in candidates],
        "difference": [_difference(c.difference_to_unmerged) for c in candidates],
        "agreement": [_share(c.agreement_with_unmerged) for c in candidates],
        "cosine, mean (min)": [_cosines(c.cosine_to_unmerged) for c in candidates],
        "deviation, mean (max)": [_deviations(c.deviation_from_unmerged) for c in candidates],
    }
    shown = {header: cells for header, cells in columns.items() if set(cells) != {"-"}}
    rows = [
        (
            one.name,
            one.backend,
            # One number for a constant schedule, else all of them.
            str(one.r[0]) if len(set(one.r)) == 1 else ",".join(map(str, one.r)),
            macs(one.macs),
            *(cells[index] for cells in shown.values()),
        )
        for index, one in enumerate(candidates)
    ]
    return table(("model", "backend", "r", "MACs", *shown), rows, "lll" + "r" * (1 + len(shown)))


def _share(found: Share | None) -> str:
    if found is None:
        return "-"
    return f"{percent(found.share)} [{100 * found.low:.2f}, {100 * found.high:.2f}]"


def _difference(found: Difference | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found.share:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _cosines(found: Cosines | None) -> str:
    return "-" if found is None else f"{found.mean:.6f} ({found.min:.6f})"


def _deviations(found: Deviations | None) -> str:
    return "-" if found is None else f"{found.mean:.4g} ({found.max:.4g})"


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
    return lines


def _unreadable(data: EvaluationData) -> list[str]:
    count = data.unreadable_count
    if not count:
        return []
    shown = [f"  {one.name}: {one.reason}" for one in data.unreadable[:SHOWN]]
    more = [f"  and {count - SHOWN} more; --json lists all"] if count > SHOWN else []
    return ["", f"Unreadable and left out: {count}", *shown, *more]
