"""The result of ``tome-export eval`` as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tome_export.artifact import Manifest
from tome_export.cli.output import macs, percent, table
from tome_export.cli.text import model_lines

SHOWN = 20
"""Most unreadable images that are listed; JSON has all."""


def eval_lines(values: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Model, one row per candidate, how to read it, and what could not be read."""
    data = values["data"]
    lines = [
        *model_lines(manifest),
        "",
        f"{data['images']} images of {data['source']} ({data['kind']}), batch {values['batch']}",
        *data["notes"],
        *(["The images have no labels: only agreement is told"] if _unlabelled(values) else []),
        "",
        *_table(values),
        "",
        *_legend(values),
        *_not_finite(values),
        *_unreadable(data),
    ]
    if values["unrecorded"]:
        return [*lines, f"The result was not recorded: {values['unrecorded']}"]
    return [*lines, f"Recorded: {values['artifact']}/eval.json"]


def _unlabelled(values: Mapping[str, Any]) -> bool:
    return values["classes"] is not None and not values["data"]["labelled"]


def _table(values: Mapping[str, Any]) -> list[str]:
    columns = {
        "top1": "top-1",
        "top5": "top-5",
        "difference_to_unmerged": "difference",
        "agreement_with_unmerged": "agreement",
        "cosine_to_unmerged": "cosine, mean (min)",
    }
    candidates = values["candidates"]
    shown = [name for name in columns if any(c[name] for c in candidates)]
    rows = [
        (
            c["name"],
            c["backend"],
            _r(c["r"]),
            macs(c["macs"]),
            *(_cell(name, c[name]) for name in shown),
        )
        for c in candidates
    ]
    headers = ("model", "backend", "r", "MACs", *(columns[name] for name in shown))
    return table(headers, rows, "lll" + "r" * (len(headers) - 3))


def _r(layers: list[int]) -> str:
    """One number for a constant schedule, else all of them."""
    return str(layers[0]) if len(set(layers)) == 1 else ",".join(map(str, layers))


def _cell(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if name == "cosine_to_unmerged":
        return f"{found['mean']:.6f} ({found['min']:.6f})"
    if name == "difference_to_unmerged":
        share, low, high = (100 * found[key] for key in ("share", "low", "high"))
        return f"{share:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{percent(found['share'])} [{100 * found['low']:.2f}, {100 * found['high']:.2f}]"


def _legend(values: Mapping[str, Any]) -> list[str]:
    def told(*names: str) -> bool:
        return any(candidate[name] for candidate in values["candidates"] for name in names)

    level = percent(values["confidence"])
    lines = []
    if told("top1", "agreement_with_unmerged"):
        lines.append(f"[low, high]: {level} interval ({values['methods']['share']})")
    if told("difference_to_unmerged"):
        lines.append(
            "difference: top-1 minus that of unmerged on the same images, in points "
            f"({values['methods']['difference']})"
        )
    if told("agreement_with_unmerged"):
        lines.append("agreement: share of images whose best class is that of unmerged")
    if told("cosine_to_unmerged"):
        lines.append("cosine: of an image's features to those of unmerged")
    return lines


def _not_finite(values: Mapping[str, Any]) -> list[str]:
    return [
        f"NOT FINITE: {c['name']} on {c['backend']} gave no numbers for {c['not_finite']} images"
        for c in values["candidates"]
        if c["not_finite"]
    ]


def _unreadable(data: Mapping[str, Any]) -> list[str]:
    count = data["unreadable_count"]
    if not count:
        return []
    shown = [f"  {entry['name']}: {entry['reason']}" for entry in data["unreadable"][:SHOWN]]
    more = [f"  and {count - SHOWN} more; --json lists all"] if count > SHOWN else []
    return ["", f"Unreadable and left out: {count}", *shown, *more]
