"""``tome-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, output_options
from tome_export.cli.output import Terminal, size, table
from tome_export.cli.progress import working
from tome_export.cli.text import model_lines
from tome_export.runtime.registry import BACKENDS

if TYPE_CHECKING:
    from tome_export.artifact.bench import Bench, BenchProfile


def _names(_context: Any, _param: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(","))


def _numbers(context: Any, param: Any, values: tuple[str, ...]) -> tuple[int, ...]:
    names = _names(context, param, values)
    return tuple(int(click.INT(text, param, context)) for text in names)


@click.command("bench", short_help="Time it against the unmerged model, and show where time goes.")
@click.argument("artifact", type=FILE)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    callback=_numbers,
    metavar="N",
    help="Images per run; repeatable, or 1,8.  [default: 1 and the one it is tuned for]",
)
@click.option(
    "--against",
    default="unmerged",
    show_default=True,
    metavar="unmerged|ARTIFACT",
    help="What to compare with: the same model without merging, or another artifact.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    callback=_names,
    metavar="|".join(BACKENDS),
    help="Run on this; repeatable.  [default: ort-cpu and every engine that can run here]",
)
@click.option("--rounds", default=20, show_default=True, help="Timed runs of each model.")
@click.option("--warmup", default=3, show_default=True, help="Untimed runs of each, first.")
@click.option(
    "--weights", metavar="PATH", help="Where the weights are now, if not where they were."
)
@click.option("--profile/--no-profile", default=True, help="Time per part of the model.")
@output_options
@click.pass_obj
def command(terminal: Terminal, /, artifact: Path, **options: Any) -> None:
    """Measure latency, throughput and memory of ARTIFACT beside another model, in turn."""
    with working(terminal) as progress:
        from tome_export.bench.main import BenchRequest, bench

        result = bench(BenchRequest(artifact, **options), progress)
    found, manifest = result.bench, result.artifact.manifest
    values = {
        "artifact": str(result.artifact.path),
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        **dict(found),
        "unrecorded": result.unrecorded,
    }
    terminal.recorded(values, [*model_lines(manifest), "", *_lines(found)], result.unrecorded)


def _lines(found: Bench) -> list[str]:
    """Results, then the profiles, then what a user should know."""
    machine = found.environment
    lines = [
        f"Machine: {machine.cpu}, {machine.cores} cores{f', {machine.gpu}' if machine.gpu else ''}",
        f"Against: {found.against}, {found.rounds} rounds after {found.warmup} to warm up, on "
        f"{found.images}",
        "Latency is the median of the rounds, speed-up that of their ratios [20th to 80th "
        "percentile]",
        "",
        *_rows(found),
    ]
    for profile in found.profile:
        lines += ["", *_profile(profile)]
    return [*lines, *([""] if found.notes else []), *found.notes]


def _rows(found: Bench) -> list[str]:
    """One line per backend and batch."""
    cells = []
    for row in found.rows:
        merged, against, speedup = row.merged, row.against, row.speedup
        memory = (merged.peak_memory_bytes, against.peak_memory_bytes)
        cells.append(
            (
                row.backend,
                row.batch,
                f"{merged.latency_ms.p50:.2f}",
                f"{against.latency_ms.p50:.2f}",
                f"{merged.throughput:.1f}",
                f"{against.throughput:.1f}",
                f"{speedup.p50:.2f} [{speedup.p20:.2f}-{speedup.p80:.2f}]",
                f"{found.macs_ratio:.2f}",
                f"{100 * row.share_of_macs_limit:.0f} %",
                *("-" if count is None else size(count) for count in memory),
            )
        )
    headers = ["backend", "batch", "merged ms", "against ms", "images/s", "against", "speed-up"]
    headers += ["MACs ratio", "of limit", "memory", "against"]
    return table(headers, cells, "l" + "r" * (len(headers) - 1))


def _profile(profile: BenchProfile) -> list[str]:
    """Time by group of both models, and the share of merging."""
    sides = (profile.merged, profile.against)
    cells = []
    for group in dict.fromkeys(group for side in sides for group in side.groups_ms):
        row = [group]
        for side in sides:
            ms = side.groups_ms.get(group)
            row += ["-", "-"] if ms is None else [f"{ms:.2f}", f"{100 * ms / side.total_ms:.1f}"]
        cells.append(row)
    total = [text for side in sides for text in (f"{side.total_ms:.2f}", "100.0")]
    between = [text for side in sides for text in (f"{side.run_ms - side.total_ms:.2f}", "")]
    cells += [["all nodes", *total], ["between nodes", *between]]
    merging = sum(profile.merged.groups_ms.get(group, 0.0) for group in ("match", "merge"))
    return [
        f"Where the time goes, {profile.backend}, batch {profile.batch}:",
        *table(("group", "merged ms", "%", "against ms", "%"), cells, "lrrrr"),
        f"match + merge: {100 * merging / profile.merged.total_ms:.1f} % of the time",
        f"{100 * profile.attributed_share:.1f} % of the nodes' time is in named groups; between "
        "nodes is what a profiled run takes beside them, the profiler's own time included",
    ]
