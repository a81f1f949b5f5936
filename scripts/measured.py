"""Write the README's measured figures from the rows in benchmarks/results.

python scripts/measured.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- measured by scripts/measured.py -->\n", "<!-- end of measured -->")


def rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and rows of one result file."""
    content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return content["environment"], content["rows"]


def measured() -> str:
    """The README's text between the marks."""
    where, cpu = rows("cpu")
    lines = [
        f"On {where['cores']} cores of {where['cpu']}, ONNX Runtime "
        f"{where['versions']['onnxruntime']}, fp32 (`benchmarks/results/cpu.json`):",
        "",
        "| model | batch | MACs ratio | ONNX speed-up | of the MACs ratio | PyTorch speed-up |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']}, r = {row['r']} | {row['batch']} | {row['macs_ratio']:.2f} "
        f"| {row['speedup']['onnxruntime']:.2f} "
        f"| {row['speedup_over_macs_ratio']['onnxruntime']:.2f} | {row['speedup']['torch']:.2f} |"
        for row in cpu
    ]
    lines += ["", *(parity_line(name) for name in ("recipes", "recipes_full")), registry_line()]
    lines += [*serving_lines(), soak_line()]
    return "\n".join(lines) + "\n"


def parity_line(name: str) -> str:
    """One line on a file of parity rows."""
    cases = rows(name)[1]
    exact = [case for case in cases if case["precision"] == "fp32"]
    half = [case for case in cases if case["precision"] == "fp16"]
    recipes = len({case["recipe"] for case in cases})
    depth = "full depth" if name.endswith("full") else "reduced depth"
    engines = sum(case["engine_bytes"] is not None for case in cases)
    built = f"; {engines} engines built by TensorRT-RTX" if engines else ""
    return (
        f"- {recipes} recipes at {depth} under 5 schedules, {len(cases)} cases "
        f"(`benchmarks/results/{name}.json`): {sum(case['passed'] for case in cases)} pass, "
        f"{sum(case['defects'] for case in cases)} defects in "
        f"{sum(case['decisions'] for case in cases)} merge decisions. fp32: "
        f"{sum(case['disagreements'] for case in exact)} decisions flipped by rounding, relative "
        f"error on equal plans at most {max(case['led_relative_error'] for case in exact):.1e}. "
        f"fp16: {sum(case['disagreements'] for case in half)} flipped, cosine at least "
        f"{min(case['cosine'] for case in half):.7f}{built}."
    )


def registry_line() -> str:
    """One line on the sweep of timm's registry."""
    entries = rows("registry")[1]
    equal = sum(entry["verdict"] == "equal" for entry in entries)
    refused = sum(entry["verdict"] == "refused" for entry in entries)
    return (
        f"- {len(entries)} of timm's models (`benchmarks/results/registry.json`): patched with "
        f"r = 0, {equal} give timm's own output to 1e-6, {refused} are refused, "
        f"{len(entries) - equal - refused} are wrong."
    )


def serving_lines() -> list[str]:
    """The speed-up of merging as a client of the server sees it."""
    served = rows("serving")[1]
    first = served[0]
    kept = ", ".join(
        f"{row['speedup']:.2f} at concurrency {row['concurrency']} "
        f"({row['share_of_speedup_alone']:.2f} of what ONNX Runtime alone shows)"
        for row in served
    )
    return [
        f"- {first['model']}, r = {first['r']}, fp32, served on CPUs by the stand-in for the "
        "ONNX Runtime backend (`benchmarks/results/serving.json`): merged over unmerged throughput "
        f"{kept}."
    ]


def soak_line() -> str:
    """What became of many requests while versions changed."""
    (row,) = rows("serving_soak")[1]
    return (
        f"- {row['requests']} requests at concurrency {row['concurrency']} during "
        f"{row['reloads']} deployments of new versions (`benchmarks/results/serving_soak.json`): "
        f"{row['wrong']} wrong, {row['lost']} lost."
    )


def main() -> None:
    readme = ROOT / "README.md"
    start, end = MARKS
    pattern = re.escape(start) + ".*?" + re.escape(end)
    text = readme.read_text()
    readme.write_text(re.sub(pattern, lambda _: start + measured() + end, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
