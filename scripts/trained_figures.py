"""Write the tables of docs/trained-weights.md, and draw docs/trained.svg.

    python -m scripts.trained_figures

From benchmarks/results/trained.json, which benchmarks/trained.py and benchmarks/half.py write.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from scripts.reducers_plot import OTHER, STYLES
from tome_export.report.plot import RULE

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trained.json"
PAGE, OUTPUT = ROOT / "docs" / "trained-weights.md", ROOT / "docs" / "trained.svg"
COST = ("<!-- cost by scripts.trained_figures -->\n", "<!-- end of cost -->")
GAIN = ("<!-- gain by scripts.trained_figures -->\n", "<!-- end of gain -->")
HALF = ("<!-- half precision by scripts.trained_figures -->\n", "<!-- end of half precision -->")

LARGEST_FP16 = 65504.0

Row = Mapping[str, Any]


def results() -> tuple[Row, dict[str, list[Row]]]:
    """The environment, and the rows by part."""
    content = json.loads(RESULTS.read_text())
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in content["rows"]:
        parts[row["part"]].append(row)
    return content["environment"], parts


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, and an empty line."""
    whole = [headers, ["---"] * len(headers), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in whole) + "\n"


def _range(found: Row) -> str:
    return f"{found['mean']:.4f}, {found['lowest']:.3f}"


def _measures(row: Row) -> list[str]:
    """Cosine, recall, correlation and error of a row of quality."""
    shown = [_range(row["cosine"]), f"{row['recall']} of {row['crops']}"]
    if row["map"] is None:
        return [*shown, "no map", "no map"]
    return [*shown, _range(row["map"]["correlation"]), f"{row['map']['mean_absolute_error']:.4f}"]


MEASURES = ("cosine: mean, lowest", "recall@1", "map correlation: mean, lowest", "map error")


def cost() -> str:
    """ToMe at every r, and all reducers at the middle one."""
    rows = results()[1]["quality"]
    sizes = sorted({row["size"] for row in rows})
    text = ""
    for size in sizes:
        own = [row for row in rows if row["size"] == size]
        first = own[0]
        text += (
            f"At {size} pixels, {first['crops']} crops of {first['photographs']} photographs; "
            f"unmerged {first['unmerged_macs'] / 1e9:.2f} G MACs:\n\n"
        )
        lines = [
            [str(row["tome_r"]), f"{row['unmerged_macs'] / row['macs']:.2f}", *_measures(row)]
            for row in own
            if row["reducer"] in ("tome", "unmerged")
        ]
        text += table(["r", "MACs ratio", *MEASURES], lines)
    text += "All reducers with the MACs of ToMe at the middle r:\n\n"
    lines = []
    for size in sizes:
        own = [row for row in rows if row["size"] == size and row["reducer"] != "unmerged"]
        rs = sorted({row["tome_r"] for row in own})
        middle = rs[len(rs) // 2]
        lines += [
            [
                f"{size}, r = {middle}",
                f"`{row['reducer']}`",
                f"{row['macs'] / row['tome_macs']:.4f}",
                *_measures(row),
            ]
            for row in own
            if row["tome_r"] == middle
        ]
    text += table(["pixels", "reducer", "MACs over ToMe's", *MEASURES], lines)
    return text.rstrip("\n") + "\n"


SHARES = ("attention", "mlp", "match", "merge")


def gain() -> str:
    """Speed-up of ToMe in ONNX Runtime and where its time goes."""
    environment, parts = results()
    rows = parts["speed"]
    lines = []
    for row in rows:
        shares = [row["profile_shares"].get(name, 0.0) for name in SHARES]
        speed = row["speedup"]
        lines.append(
            [
                f"{row['size']} ({row['tokens']})",
                str(row["tome_r"]),
                f"{1e3 * row['seconds']['p50']:.0f}",
                f"{row['macs_ratio']:.2f}",
                f"{speed['p50']:.2f} [{speed['p20']:.2f}-{speed['p80']:.2f}]",
                f"{row['speedup_over_macs_ratio']:.2f}",
                *(f"{share:.1%}" for share in (*shares, 1 - sum(shares))),
            ]
        )
    first = rows[0]
    threads = f"{first['threads']} thread{'s' * (first['threads'] != 1)}"
    return (
        f"ONNX Runtime {environment['versions']['onnxruntime']}, fp32, batch 1, {threads} "
        f"of {first['cpu']}, the tower; all graphs in turn, median of {first['rounds']} "
        "rounds [p20-p80], and the shares of the runtime's own profile:\n\n"
        + table(
            [
                *("pixels (tokens)", "r", "ms", "MACs ratio", "speed-up", "of the MACs ratio"),
                *SHARES,
                "rest",
            ],
            lines,
        ).rstrip("\n")
        + "\n"
    )


def half() -> str:
    """Half precision: the largest activations, and parity of every form."""
    parts = results()[1]
    text = ""
    for row in parts["activations"]:
        value = max(row["largest"])
        block = row["largest"].index(value)
        text += (
            f"- At {row['size']} pixels the largest activation is {value:.0f} "
            f"(`{row['modules'][block]}` of block {block}), {value / LARGEST_FP16:.1%} of what "
            "fp16 holds; behind block 0 "
            f"{max(row['largest'][1:]):.0f}.\n"
        )
    lines = [
        [
            f"{row['size']}, {row['r']}",
            f"{row['precision']}, `{row['attention']}`, {row['opset']}",
            row["backend"],
            str(row["decisions"]),
            str(row["disagreements"]),
            str(row["defects"]),
            f"{row['cosine']:.6f}",
            f"{row['k'] * row['led_error'] / row['led_allowed']:.2f}",
        ]
        for row in parts["parity"]
    ]
    headers = ("pixels, r", "precision, attention, opset", "backend", "decisions", "flipped")
    more = ("defects", "lowest cosine", "error over PyTorch's own")
    return text + "\n" + table([*headers, *more], lines).rstrip("\n") + "\n"


def page() -> str:
    """The page with its marked parts made anew."""
    text = PAGE.read_text()
    for (start, end), made in ((COST, cost()), (GAIN, gain()), (HALF, half())):
        pattern = re.escape(start) + ".*?" + re.escape(end)
        new = (start + made + end).replace("\\", r"\\")
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    return text


def draw(rows: Sequence[Row]) -> Any:
    """Cosine and correlation against MACs, a row of panels per size."""
    sizes = sorted({row["size"] for row in rows})
    figure, axes = pyplot.subplots(len(sizes), 2, figsize=(10, 7.2), layout="constrained")
    for line, size in zip(axes, sizes, strict=True):
        own = [row for row in rows if row["size"] == size]
        unmerged = own[0]["unmerged_macs"] / 1e9
        for name in dict.fromkeys(row["reducer"] for row in own if row["reducer"] != "unmerged"):
            colour, marker, style = STYLES.get(name, OTHER)
            found = sorted((r for r in own if r["reducer"] == name), key=lambda row: row["macs"])
            look: Any = {"color": colour, "marker": marker, "linestyle": style, "label": name}
            look["linewidth"] = 2.4 if name == "tome" else 1.3
            line[0].plot(
                [r["macs"] / 1e9 for r in found], [r["cosine"]["mean"] for r in found], **look
            )
            mapped = [r for r in found if r["map"] is not None]
            if mapped:
                y = [r["map"]["correlation"]["mean"] for r in mapped]
                line[1].plot([r["macs"] / 1e9 for r in mapped], y, **look)
        titles = "cosine of features, mean", "correlation of saliency maps, mean"
        for one, title in zip(line, titles, strict=True):
            one.axvline(unmerged, color=RULE, linewidth=1)
            one.set_title(f"{title}, {size} pixels", loc="left", fontsize=10)
            one.set_xlabel("MACs per image of the tower, G")
            one.grid(color=RULE, linewidth=0.6)
            one.spines[["top", "right"]].set_visible(False)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=8)
    return figure


def main() -> None:
    PAGE.write_text(page())
    with matplotlib.rc_context({"svg.hashsalt": "trained", "font.size": 9, "lines.markersize": 5}):
        figure = draw(results()[1]["quality"])
        figure.savefig(OUTPUT, format="svg", facecolor="white", metadata={"Date": None})
    print(PAGE, OUTPUT)


if __name__ == "__main__":
    main()
