"""``tome-export check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tome_export.cli.format import artifact_values, listed, model_lines, parity_lines
from tome_export.cli.options import FILE, ImagesGroup, StoredWeightsGroup, grouped_command, option
from tome_export.cli.output import Terminal, beside_the_error
from tome_export.cli.progress import working
from tome_export.display import percent
from tome_export.runtime.registry import BACKENDS, TORCH

if TYPE_CHECKING:
    from tome_export.parity.main import CheckResult, EntropyResult

UNDER = 10
"""Most images that are listed as merged too much."""


class CheckOptions(ImagesGroup, StoredWeightsGroup):
    """Check."""

    min_entropy: float | None = option(
        metavar="X",
        help="Fail if an image's token-size entropy is under X, 0 to 1; see docs/over-merging.md.",
    )
    backends: tuple[str, ...] = option(
        "--backend",
        heading="Engine",
        metavar="|".join(name for name in BACKENDS if name != TORCH),
        help="Check this; repeatable.  [default: ort-cpu and every engine that can run here]",
    )


@grouped_command(
    "check",
    "Check parity again, here, on your images if given.",
    example="tome-export check vit_b16-r13 --images photos --backend ort-cpu",
)
@click.argument("artifact", type=FILE)
def command(terminal: Terminal, /, artifact: Path, options: CheckOptions) -> None:
    """Check that ARTIFACT computes what PyTorch computes with the same weights."""
    with working(terminal) as progress:
        from tome_export.parity.compare import ParityFailedError
        from tome_export.parity.main import CheckRequest, OverMergedError, check

        result = check(options.request(CheckRequest, artifact=artifact), progress)
    values = {
        **artifact_values(result.artifact),
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
    lines, accuracy = model_lines(result.artifact.manifest), result.accuracy
    for report in result.reports:
        lines += ["", *parity_lines(report)]
    lines.append("")
    if accuracy is not None:
        lines.append(
            f"Top-1 on {accuracy['images']} labelled test images: unmerged "
            f"{percent(accuracy['unmerged'])} (PyTorch fp32), merged "
            f"{percent(accuracy['merged'])} ({accuracy['backend']})"
        )
    lines += _entropy(result.entropy)
    lines += [f"Skipped {name}: {reason}" for name, reason in result.skipped.items()]
    if result.unrecorded and not result.passed:
        lines.append(f"The result was not recorded: {result.unrecorded}")
    return [*lines, f"{'Passed' if result.passed else 'FAILED'}: {result.artifact.path}"]


def _entropy(entropy: EntropyResult) -> list[str]:
    """How evenly images are spread over their tokens, and those of which too little is left."""

    def shown(value: float) -> str:
        return f"{value:.4f} ({entropy.tokens(value):.1f} tokens)"

    lines = [
        f"Token-size entropy: least {shown(entropy.least)}, 5th percentile {shown(entropy.p5)}, "
        f"median {shown(entropy.median)}; 1 is {entropy.patches} tokens"
    ]
    if entropy.under:
        under = [f"{name}: {shown(value)}" for name, value in entropy.under]
        lines += [f"Under {entropy.asked:g}:", *listed(under, len(under), UNDER)]
    return lines
