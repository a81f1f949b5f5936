"""One HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from tome_export.artifact import Manifest
from tome_export.report.accuracy import accuracy_section
from tome_export.report.contract import CONTRACTS
from tome_export.report.front import front_section
from tome_export.report.headline import headline
from tome_export.report.layers import layers_section
from tome_export.report.origin import origin_section
from tome_export.report.parity import parity_section
from tome_export.report.parts import Section
from tome_export.report.pictures import pictures_section
from tome_export.report.speed import speed_section

if TYPE_CHECKING:
    from jinja2 import Environment

    from tome_export.inspect.groups import MergeMap

NAME = "report.html"
"""What the page is called in an artifact."""

MOST_BYTES = 3_000_000
"""What the page has to stay below."""


@dataclass(frozen=True)
class Content:
    """Everything the page is made from.

    Attributes:
        folder: What the artifact's directory is called.
        manifest: The content of ``build.json``.
        reports: File in the artifact, of those in ``CONTRACTS``, -> its content.
        maps: Merged tokens of each image.
        names: Of the images.
        no_pictures: Why there are no images; None if there are.
    """

    folder: str
    manifest: Manifest
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    maps: Sequence[MergeMap] = ()
    names: Sequence[str] = ()
    no_pictures: str | None = None


def sections_of(content: Content) -> list[Section]:
    """The sections of the page, those without data included."""
    manifest, quoted = content.manifest, shlex.quote(content.folder)
    reports = {CONTRACTS[name][0]: report for name, report in content.reports.items()}
    return [
        layers_section(manifest),
        parity_section(reports.get("check"), quoted),
        speed_section(reports.get("bench"), quoted),
        accuracy_section(reports.get("eval"), quoted),
        pictures_section(content.maps, content.names, manifest, content.no_pictures),
        front_section(reports.get("tune"), manifest),
        origin_section(manifest, reports, content.folder),
    ]


def render(content: Content) -> str:
    """The page as text; the same content always gives the same text."""
    reports = {CONTRACTS[name][0]: report for name, report in content.reports.items()}
    script = template_file("gallery.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            head=headline(content.manifest, reports),
            sections=sections_of(content),
            style=template_file("report.css"),
            script=script,
            script_sha256=digest,
            version=content.manifest.versions.get("tome-export", ""),
        )
    )


def template_file(name: str) -> str:
    """The text of a file among the templates."""
    return (resources.files("tome_export.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """What renders the templates of all pages."""
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
