"""Options of ``tome-export cascade``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from tome_export.cli.options import FILE, grouped

TARGETS = ("target_macs", "min_accuracy")

cascade_options = grouped(
    click.option(
        "--data",
        multiple=True,
        required=True,
        metavar="FOLDER|SHARDS|samples",
        help="Images: accuracy with class sub-folders, else agreement with the highest artifact.",
    ),
    click.option(
        "--policy",
        type=click.Choice(["complexity", "confidence", "learned"]),
        default="confidence",
        show_default=True,
        help="What decides which artifact an image gets.",
    ),
    click.option(
        "--target-macs",
        metavar="50%|8.7G",
        help="A mean of at most so many MACs per image, or of the highest artifact's.",
    ),
    click.option(
        "--min-accuracy",
        metavar="-0.5|97.2",
        help="-0.5: at most half a point below the highest artifact; 97.2: percent.",
    ),
    click.option(
        "--test",
        multiple=True,
        metavar="FOLDER|SHARDS|samples",
        help="Measure on these images.  [default: a part of --data]",
    ),
    click.option("--labels", type=FILE, metavar="FILE", help="Labels for a folder of --data."),
    click.option("--test-labels", type=FILE, metavar="FILE", help="Labels for one of --test."),
    click.option(
        "--calibration",
        default=0.5,
        show_default=True,
        metavar="SHARE",
        help="Share of --data that is calibrated on, without --test.",
    ),
    click.option(
        "--measure",
        type=click.Choice(["max", "margin"]),
        default="max",
        show_default=True,
        help="Confidence: the largest probability, or its lead over the second.",
    ),
    click.option(
        "--lambda",
        "strength",
        default=1.0,
        show_default=True,
        help="Learned: weight of the squared distance from the target cost in training.",
    ),
    click.option("--limit", type=int, metavar="N", help="Most images.  [default: 2048]"),
    click.option("--seed", default=0, show_default=True, help="Of the split of the images."),
    click.option(
        "--backend", default="ort-cpu", show_default=True, help="What runs the artifacts."
    ),
    click.option(
        "-o", "--output", type=FILE, default="cascade.json", show_default=True, metavar="FILE"
    ),
    click.option(
        "--repository", type=FILE, metavar="DIR", help="Serve the cascade from this repository."
    ),
    click.option("--name", help="What the names of its models begin with.  [default: <model>]"),
    click.option(
        "--preprocess", is_flag=True, help="Also a pipeline from JPEG or PNG bytes to labels."
    ),
    click.option("--force", is_flag=True, help="Replace existing files."),
)


def goal_given(given: Mapping[str, Any]) -> str:
    """The one target that was given.

    Raises:
        UsageError: if none was, or both.
    """
    asked = [name for name in TARGETS if given[name] is not None]
    if len(asked) != 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in TARGETS)
        raise click.UsageError(f"{len(asked)} targets were given; give exactly one of {options}")
    return asked[0]
