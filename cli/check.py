"""``tome-export check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tome_export.artifact import Manifest
from tome_export.cli.options import FILE, images_option, output_options
from tome_export.cli.output import Terminal, beside_the_error
from tome_export.cli.progress import working
from tome_export.cli.text import accuracy_lines, entropy_lines, model_lines, parity_lines


@click.command("check", short_help="Check parity again, here, on your images if given.")
@click.argument("artifact", type=FILE)
@images_option
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="ort-cpu|tensorrt|tensorrt-rtx",
    help="Check this; repeatable.  [default: ort-cpu and every engine that can run here]",
)
@click.option(
    "--weights", metavar="PATH", help="Where the weights are now, if not where they were."
)
@click.option(
    "--min-entropy",
    type=float,
    metavar="X",
    help="Fail if an image's token-size entropy is under X, 0 to 1; see docs/over-merging.md.",
)
@output_options
@click.pass_obj
def command(terminal: Terminal, artifact: Path, **given: Any) -> None:
    """Check that ARTIFACT computes what PyTorch computes with the same weights."""
    with working(terminal) as progress:
        from tome_export.pipeline import CheckRequest, check
        from tome_export.pipeline.build import ParityFailedError
        from tome_export.pipeline.check import OverMergedError

        result = check(CheckRequest(artifact, **given), progress)
    manifest = result.artifact.manifest
    reports = [report.to_dict() for report in result.reports]
    values = {
        "artifact": str(result.artifact.path),
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        "passed": result.passed,
        "reports": reports,
        "accuracy": result.accuracy,
        "entropy": asdict(result.entropy),
        "skipped": result.skipped,
        "unrecorded": result.unrecorded,
    }
    failed = next((report for report in result.reports if not report.passed), None)
    if result.passed:
        terminal.result(values, _lines(values, manifest))
        return
    if not terminal.json:
        with beside_the_error():
            terminal.result(values, _lines(values, manifest))
    terminal.findings = values
    if failed is None:
        raise OverMergedError(result.entropy, reports[0]["images"], reports[0]["subject"])
    raise ParityFailedError(failed)


def _lines(values: dict[str, Any], manifest: Manifest) -> list[str]:
    lines = model_lines(manifest)
    for report in values["reports"]:
        lines += ["", *parity_lines(report)]
    lines += ["", *accuracy_lines(values["accuracy"]), *entropy_lines(values["entropy"])]
    lines += [f"Skipped {name}: {reason}" for name, reason in values["skipped"].items()]
    if values["unrecorded"]:
        lines.append(f"The result was not recorded: {values['unrecorded']}")
    return [*lines, f"{'Passed' if values['passed'] else 'FAILED'}: {values['artifact']}"]
