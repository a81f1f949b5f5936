"""``tome-export check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, images_option, output_options
from tome_export.cli.output import Terminal, beside_the_error, percent
from tome_export.cli.progress import working
from tome_export.cli.text import model_lines, parity_lines
from tome_export.runtime.registry import BACKENDS, TORCH

if TYPE_CHECKING:
    from tome_export.parity.main import CheckResult, EntropyResult

UNDER = 10
"""Most images that are listed as merged too much."""


@click.command("check", short_help="Check parity again, here, on your images if given.")
@click.argument("artifact", type=FILE)
@images_option
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="|".join(name for name in BACKENDS if name != TORCH),
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
def command(terminal: Terminal, /, artifact: Path, **given: Any) -> None:
    """Check that ARTIFACT computes what PyTorch computes with the same weights."""
    with working(terminal) as progress:
        from tome_export.parity.compare import ParityFailedError
        from tome_export.parity.main import CheckRequest, OverMergedError, check

        result = check(CheckRequest(artifact, **given), progress)
    manifest = result.artifact.manifest
    values = {
        "artifact": str(result.artifact.path),
        "model": manifest.model.name,
        "random_weights": manifest.model.random_weights,
        "passed": result.passed,
        "reports": result.reports,
        "accuracy": result.accuracy,
        "entropy": asdict(result.entropy),
        "skipped": result.skipped,
        "unrecorded": result.unrecorded,
    }
    if result.passed:
        terminal.recorded(values, _lines(result), result.unrecorded)
        return
    if not terminal.json:
        with beside_the_error():
            terminal.result(values, _lines(result))
    terminal.findings = values
    failed = next((report for report in result.reports if not report.passed), None)
    if failed is None:
        first = result.reports[0]
        raise OverMergedError(result.entropy, first.images, first.subject)
    raise ParityFailedError(failed)


def _lines(result: CheckResult) -> list[str]:
    lines = model_lines(result.artifact.manifest)
    for report in result.reports:
        lines += ["", *parity_lines(report)]
    lines += ["", *_accuracy(result.accuracy), *_entropy(result.entropy)]
    lines += [f"Skipped {name}: {reason}" for name, reason in result.skipped.items()]
    if result.unrecorded and not result.passed:
        lines.append(f"The result was not recorded: {result.unrecorded}")
    return [*lines, f"{'Passed' if result.passed else 'FAILED'}: {result.artifact.path}"]


def _accuracy(accuracy: Mapping[str, Any] | None) -> list[str]:
    """Top-1 on labelled images."""
    if accuracy is None:
        return []
    return [
        f"Top-1 on {accuracy['images']} labelled test images: unmerged "
        f"{percent(accuracy['unmerged'])} (PyTorch fp32), merged {percent(accuracy['merged'])} "
        f"({accuracy['backend']})"
    ]


def _entropy(entropy: EntropyResult) -> list[str]:
    """How evenly images are spread over their tokens, and those of which too little is left."""

    def shown(value: float) -> str:
        return f"{value:.4f} ({entropy.tokens(value):.1f} tokens)"

    lines = [
        f"Token-size entropy: least {shown(entropy.least)}, 5th percentile {shown(entropy.p5)}, "
        f"median {shown(entropy.median)}; 1 is {entropy.patches} tokens"
    ]
    if entropy.under:
        lines.append(f"Under {entropy.asked:g}:")
        lines += [f"  {name}: {shown(value)}" for name, value in entropy.under[:UNDER]]
        more = len(entropy.under) - UNDER
        lines += [f"  and {more} more"] if more > 0 else []
    return lines
