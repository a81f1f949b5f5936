"""One HTML file that needs nothing else: its sections, and how templates become text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import tome_export
from tome_export import display
from tome_export.artifact import Manifest
from tome_export.artifact.bench import Bench
from tome_export.artifact.cascade import Cascade
from tome_export.artifact.evaluation import Evaluation
from tome_export.artifact.files import utf8
from tome_export.artifact.manifest import Layer
from tome_export.artifact.parity import ParityFile
from tome_export.artifact.schedule import TunedSchedule
from tome_export.display import NONE, percent, scored, span
from tome_export.report import charts
from tome_export.report.commands import compared_with, reproducing_commands
from tome_export.report.gallery import gallery_from_maps
from tome_export.report.plot import chart_svgs

if TYPE_CHECKING:
    from jinja2 import Environment

    from tome_export.runtime.merge_maps import MergeMap

NAME = "report.html"
"""What the page is called in an artifact."""

MOST_BYTES = 3_000_000
"""What the page has to stay below."""


@dataclass(frozen=True)
class Content:
    """Everything the page is made from: the documents of an artifact, and maps of named images.

    ``folder`` is what the artifact's directory is called, ``no_pictures`` why there are no images.
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
class Section:
    """A part of the page, written by the template of its name; ``command`` adds data it lacks."""

    name: str
    title: str
    command: str | None = None
    adds: str = ""


def sections_of(content: Content) -> list[Section]:
    """The sections of the page, those without data included."""
    folder, model = shlex.quote(content.folder), content.manifest.model.name
    bench, evaluation, schedule = content.bench, content.evaluation, content.schedule
    if content.manifest.model.image_size is not None:
        model = f"{model} --image-size {content.manifest.model.image_size}"
    return [
        Section("layers", "Tokens and MACs per layer"),
        Section(
            "parity",
            "Parity with PyTorch, layer by layer",
            None if content.parity else f"tome-export check {folder}",
            "the comparison with PyTorch, decision by decision",
        ),
        Section(
            "speed",
            "Latency and throughput",
            None if bench and bench.rows else f"tome-export bench {folder}",
            "latency, throughput and where the time goes",
        ),
        Section(
            "accuracy",
            "Accuracy",
            None
            if evaluation and evaluation.candidates
            else f"tome-export eval {folder} --data FOLDER",
            "top-1 and top-5 accuracy on your images",
        ),
        Section("pictures", "Which patches became one token"),
        Section(
            "front",
            "Pareto front",
            None if schedule and schedule.front else f"tome-export tune {model}",
            "the schedules worth a look, in a file that 'build --schedule' takes",
        ),
        Section("origin", "Versions, files and how to make this again"),
    ]


def render(content: Content) -> str:
    """The page as text; the same content always gives the same text."""
    manifest, bench, evaluation = content.manifest, content.bench, content.evaluation
    measured = {"bench": bench, "eval": evaluation, "tune": content.schedule}
    tokens = (manifest.tokens_in, *manifest.tokens)
    return _rendered(
        "report.html.j2",
        **vars(content),
        sections=sections_of(content),
        layers=[_whole(layer) for layer in manifest.layers],
        against=compared_with(bench) if bench else None,
        gallery=gallery_from_maps(content.maps, content.names, tokens),
        commands=reproducing_commands(manifest, bench, evaluation, content.folder),
        machines={command: one.environment for command, one in measured.items() if one},
        page_name=NAME,
    )


def render_cascade(cascade: Cascade) -> str:
    """The page of a cascade as text; the same gives the same."""
    return _rendered("cascade.html.j2", cascade=cascade)


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


def _rendered(template: str, **values: Any) -> str:
    version = tome_export.__version__
    return _environment().get_template(template).render(version=version, **values)


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
        extensions=["jinja2.ext.do"],
    )
    formats = ("counted", "fixed", "macs", "milliseconds", "percent", "points", "scored", "size")
    environment.filters |= {name: getattr(display, name) for name in (*formats, "small", "times")}
    environment.filters |= {
        # What this package wrote itself: drawings, styles and scripts.
        "ours": Markup,
        "one_line": lambda text: Markup(" ").join(text.split()),
        "upper_first": lambda text: text[:1].upper() + text[1:],
        "file_name": lambda path: utf8(path.rstrip("/").rpartition("/")[2] or path).decode(),
        "interval": _interval,
        "short_interval": lambda share: span(f"{100 * share.low:.2f}", percent(share.high, 2)),
        "value_of": lambda key, values: values[key],
        "share_of": _share_of,
        "script_json": _script_json,
        "sha256": _sha256,
    }
    environment.globals |= {
        "charts": charts,
        "chart_svgs": chart_svgs,
        "file": _template_file,
        "macs_unit": display.macs_unit,
        "span": span,
        "NONE": NONE,
    }
    return environment


@cache
def _template_file(name: str) -> str:
    return (resources.files("tome_export.report") / "templates" / name).read_text(encoding="utf-8")


def _interval(share: Any, metric: str = "top1") -> str:
    """The limits of a share of images, or of what ``metric`` counts of them."""
    return span(scored(share.low, metric, 2), scored(share.high, metric, 2))


def _share_of(error: float, allowed: float | None) -> str:
    share = error / allowed if allowed and math.isfinite(allowed) else math.nan
    return percent(share if math.isfinite(share) else None, 1)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
