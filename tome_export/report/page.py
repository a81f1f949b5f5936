"""One HTML file that needs nothing else: its head, its sections, and how they become text."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import tome_export
from tome_export.artifact import Manifest
from tome_export.artifact.bench import Bench
from tome_export.artifact.cascade import Cascade
from tome_export.artifact.evaluation import Evaluation
from tome_export.artifact.parity import ParityFile, ParitySummary
from tome_export.artifact.schedule import TunedSchedule
from tome_export.display import TIMES, counted, fixed, percent, points, span, times
from tome_export.report.accuracy import accuracy_section, candidate
from tome_export.report.front import cascade_section, front_section
from tome_export.report.layers import layers_section
from tome_export.report.origin import origin_section
from tome_export.report.parity import parity_section
from tome_export.report.parts import Section
from tome_export.report.pictures import pictures_section
from tome_export.report.speed import against, speed_section

if TYPE_CHECKING:
    from jinja2 import Environment

    from tome_export.visualize.groups import MergeMap

NAME = "report.html"
"""What the page is called in an artifact."""

MOST_BYTES = 3_000_000
"""What the page has to stay below."""

RANDOM = (
    "This model has learned nothing: sizes, speed and parity are real, its predictions, accuracy "
    "and pictures mean nothing."
)


@dataclass(frozen=True)
class Content:
    """Everything the page is made from.

    Attributes:
        folder: What the artifact's directory is called.
        manifest: The content of ``build.json``.
        parity: That of ``parity.json``; None if there is none, as for the next three.
        bench: That of ``bench.json``.
        evaluation: That of ``eval.json``.
        schedule: That of ``schedule.json``, if a search wrote it.
        maps: Merged tokens of each image.
        names: Of the images.
        no_pictures: Why there are no images; None if there are.
    """

    folder: str
    manifest: Manifest
    parity: ParityFile | None = None
    bench: Bench | None = None
    evaluation: Evaluation | None = None
    schedule: TunedSchedule | None = None
    maps: Sequence[MergeMap] = ()
    names: Sequence[str] = ()
    no_pictures: str | None = None


@dataclass(frozen=True)
class Figure:
    """One of the figures that decide, at the head of the page.

    Attributes:
        name: What it is.
        value: The figure.
        note: What it was found on.
        tone: ``bad`` where something is wrong, ``none`` where there is no figure.
    """

    name: str
    value: str
    note: str
    tone: str = ""


def sections_of(content: Content) -> list[Section]:
    """The sections of the page, those without data included."""
    manifest, quoted = content.manifest, shlex.quote(content.folder)
    tokens = (manifest.tokens_in, *manifest.tokens)
    return [
        layers_section(manifest),
        parity_section(content.parity, quoted),
        speed_section(content.bench, quoted),
        accuracy_section(content.evaluation, quoted),
        pictures_section(content.maps, content.names, tokens, content.no_pictures),
        front_section(content.schedule, manifest),
        origin_section(
            manifest, content.bench, content.evaluation, content.schedule, content.folder
        ),
    ]


def render(content: Content) -> str:
    """The page as text; the same content always gives the same text."""
    manifest = content.manifest
    script = _template_file("gallery.js")
    figures = (
        Figure("MACs, unmerged over merged", times(manifest.macs.ratio), "counted per image"),
        _speed(content.bench),
        _parity(content.parity, manifest.parity),
        _accuracy(content.evaluation),
    )
    return _rendered(
        "report.html.j2",
        model=manifest.model,
        facts=_facts(manifest),
        figures=figures,
        warning=RANDOM if manifest.model.random_weights else None,
        sections=sections_of(content),
        script=script,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def render_cascade(cascade: Cascade) -> str:
    """The page of a cascade as text; the same gives the same."""
    return _rendered(
        "cascade.html.j2",
        model=cascade.model,
        random=cascade.random_weights,
        section=cascade_section(cascade),
    )


def _rendered(template: str, **values: Any) -> str:
    style, version = _template_file("report.css"), tome_export.__version__
    return _environment().get_template(template).render(style=style, version=version, **values)


def _template_file(name: str) -> str:
    return (resources.files("tome_export.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tome_export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # What this package wrote itself: drawings (see plot), styles and scripts.
    environment.filters["ours"] = Markup
    environment.filters["script_json"] = _script_json
    return environment


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(manifest: Manifest) -> dict[str, object]:
    merge, weights = manifest.merge, manifest.model.weights
    schedule, per_layer = merge.schedule, ", ".join(map(str, merge.r))
    listed = schedule.replace(",", ", ") == per_layer
    return {
        "Tokens merged per layer": per_layer if listed else f"{schedule} ({per_layer})",
        "Precision": manifest.precision,
        "Weights": f"{weights.kind}: {weights.source}",
        "Proportional attention": "on" if merge.prop_attn else "off",
        "Merge op": merge.merge_op,
        "Batch": manifest.batch,
    }


def _speed(bench: Bench | None) -> Figure:
    name = "Speed-up, measured"
    if bench is None or not bench.rows:
        return Figure(name, "not measured", "no bench.json", "none")
    backend = bench.rows[0].backend
    rows = [row for row in bench.rows if row.backend == backend]
    found = sorted(row.speedup.p50 for row in rows)
    low, high = times(found[0]), times(found[-1])
    value = high if low == high else span(low.rstrip(TIMES), high)
    batches = ", ".join(str(row.batch) for row in rows)
    return Figure(name, value, f"over {against(bench)}; {backend}, batch {batches}")


def _parity(parity: ParityFile | None, summary: ParitySummary | None) -> Figure:
    name = "Parity with PyTorch"
    checks = (parity and parity.checks) or (summary and (summary,))
    if not checks:
        return Figure(name, "not checked", "no parity.json", "none")
    defects = counted(sum(check.defects for check in checks), "defect")
    note = f"{defects} in {counted(sum(check.decisions for check in checks), 'decision')}"
    if all(check.passed for check in checks):
        return Figure(name, "passed", note)
    return Figure(name, "FAILED", note, "bad")


def _accuracy(evaluation: Evaluation | None) -> Figure:
    merged = candidate(evaluation, "merged") if evaluation else None
    if evaluation is None or merged is None:
        return Figure("Top-1, change by merging", "not evaluated", "no eval.json", "none")
    images = counted(evaluation.data.images, "image")
    if merged.not_finite:
        note = f"of {images} without finite numbers"
        return Figure(
            "Outputs of the merged model", f"{merged.not_finite:,} NOT FINITE", note, "bad"
        )
    if merged.top1:
        share, change = percent(merged.top1.share, 2), merged.difference_to_unmerged
        if change is None:
            return Figure("Top-1, merged", share, f"on {images}")
        note = f"points ({points(change.low)} to {points(change.high)}), to {share} on {images}"
        return Figure("Top-1, change by merging", points(change.share), note)
    if merged.agreement_with_unmerged:
        share = percent(merged.agreement_with_unmerged.share, 2)
        return Figure("As the unmerged model", share, f"of {images}")
    if merged.cosine_to_unmerged:
        cosine = merged.cosine_to_unmerged
        note = f"mean of {images}, smallest {fixed(cosine.min, 4)}"
        return Figure("Cosine to unmerged", fixed(cosine.mean, 4), note)
    if (apart := merged.deviation_from_unmerged) is not None:
        note = f"mean of {images}, largest {apart.max:.4g}; unmerged spreads by {apart.spread:.4g}"
        return Figure("Deviation from unmerged", f"{apart.mean:.4g}", note)
    return Figure("Accuracy", "not known", f"{images} without labels", "none")
