"""``tome-export bench``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.format import artifact_values, model_lines, table
from tome_export.cli.options import FILE, StoredWeightsGroup, batch_sizes, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.display import size
from tome_export.runtime.registry import BACKENDS

if TYPE_CHECKING:
    from tome_export.artifact.bench import Bench, BenchProfile


def _names(_context: Any, _param: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(","))


class BenchOptions(StoredWeightsGroup):
    """Measuring."""

    batches: tuple[int, ...] = option(
        "--batch",
        type=batch_sizes,
        multiple=True,
        callback=lambda _context, _param, values: tuple(itertools.chain(*values)),
        metavar="N",
        help="Images per run; repeatable, or 1,8.  [default: 1 and the one it is tuned for]",
    )
    rounds: int = option(default=20, help="Timed runs of each model.")
    warmup: int = option(default=3, help="Untimed runs of each, first.")
    profile: bool = option(default=True, help="Time per part of the model.")
    against: str = option(
        heading="Model",
        default="unmerged",
        metavar="unmerged|ARTIFACT",
        help="What to compare with: the same model without merging, or another artifact.",
    )
    backends: tuple[str, ...] = option(
        "--backend",
        heading="Engine",
        callback=_names,
        metavar="|".join(BACKENDS),
        help="Run on this; repeatable.  [default: ort-cpu and every engine that can run here]",
    )


@grouped_command(
    "bench",
    "Time it against the unmerged model, and show where time goes.",
    example="tome-export bench vit_b16-r13 --batch 1,8 --backend ort-cpu",
)
@click.argument("artifact", type=FILE)
def command(terminal: Terminal, /, artifact: Path, options: BenchOptions) -> None:
    """Measure latency, throughput and memory of ARTIFACT beside another model, in turn."""
    with working(terminal) as progress:
        from tome_export.bench.main import BenchRequest, bench

        result = bench(options.request(BenchRequest, artifact=artifact), progress)
    found = result.bench
    values = {
        **artifact_values(result.artifact),
        **dict(found),
        "unrecorded": result.unrecorded,
    }
    lines = [*model_lines(result.artifact.manifest), "", *_lines(found)]
    terminal.recorded(values, lines, result.unrecorded)


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
