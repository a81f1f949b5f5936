"""Draw docs/reducers.svg: accuracy against MACs of all reducers on vit_digits.

    python scripts/reducers_plot.py [--output FILE]

From benchmarks/results/reducers.json, which benchmarks/reducers.py writes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from tome_export.report.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    VERMILLION,
)

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reducers.json"
OUTPUT = ROOT / "docs" / "reducers.svg"

STYLES = {
    "tome": (INK, "o", "-"),
    "pitome": (BLUE, "s", "-"),
    "tofu": (SKY, "D", "-"),
    "kth": (GREY, "v", "--"),
    "random": (GREY, "x", ":"),
    "dtem": (GREEN, "^", "-"),
    "evit": (VERMILLION, "P", "-"),
    "topk": (ORANGE, "X", "-"),
    "diffrate": (PURPLE, "*", "-"),
    "dynamicvit": (ORANGE, "<", "--"),
    "query": (PURPLE, ">", ":"),
}
"""Colour, marker and line: merging by keys, baselines, by class attention, by other means."""

OTHER = (MUTED, ".", ":")
NEAR = 96.0
"""Where the second panel begins, in percent."""


def draw(rows: list[dict[str, Any]]) -> Any:
    """Both panels: the whole range, and its top."""
    points = defaultdict(list)
    for row in rows:
        point = row["macs"] / 1e6, 100 * row["correct"] / row["images"]
        points[row["reducer"]].append(point)
    unmerged = rows[0]["unmerged_macs"] / 1e6
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for one in axes:
        for name, found in points.items():
            colour, marker, line = STYLES.get(name, OTHER)
            x, y = zip(*sorted(found), strict=True)
            heavy = 2.4 if name == "tome" else 1.3
            one.plot(x, y, color=colour, marker=marker, linestyle=line, linewidth=heavy, label=name)
        one.axvline(unmerged, color=RULE, linewidth=1)
        one.set_xlabel("MACs per image, millions")
        one.grid(color=RULE, linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1 on the 450 test images, percent")
    axes[1].set_ylim(NEAR, 100.2)
    axes[1].set_title("the top of it", loc="left", fontsize=10)
    axes[0].set_title("vit_digits, by reducer", loc="left", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write")
    options = parser.parse_args()
    rows = [r for r in json.loads(RESULTS.read_text())["rows"] if r["part"] == "accuracy"]
    with matplotlib.rc_context({"svg.hashsalt": "reducers", "font.size": 9, "lines.markersize": 5}):
        draw(rows).savefig(options.output, format="svg", facecolor="white", metadata={"Date": None})
    print(options.output)


if __name__ == "__main__":
    main()
