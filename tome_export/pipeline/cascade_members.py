"""The artifacts that a cascade is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tome_export.artifact import Artifact
from tome_export.errors import InputError, UsageError
from tome_export.pipeline.alike import check_one_model, shared_facts
from tome_export.pipeline.inputs import refuse_extra_inputs
from tome_export.serve.source import sizes


def members_of(paths: Sequence[Path]) -> tuple[Artifact, ...]:
    """Open artifacts of one model, by MACs ascending.

    Raises:
        UsageError: if there is only one.
        InputError: if one is damaged, gives no classes or takes more than images, if they are of
            different models, inputs or outputs, or two take the same MACs.
    """
    if len(paths) < 2:
        raise UsageError(
            f"{len(paths)} artifact is given; a cascade is made of two or more of one model, with "
            "different r"
        )
    found = sorted((Artifact.open(path.absolute()) for path in paths), key=macs_of)
    for one in found:
        refuse_extra_inputs(one, "cascade")
        name = one.manifest.output.name
        if name != "logits":
            raise InputError(
                f"{one.path} gives {name}, not classes, by which a cascade is calibrated; give "
                "artifacts of a classifier"
            )
    check_one_model(found, _facts, "a cascade is made of artifacts of one model, with different r")
    for before, after in itertools.pairwise(found):
        if macs_of(before) == macs_of(after):
            raise InputError(
                f"{before.path} and {after.path} take the same {macs_of(after) / 1e6:.2f} M MACs; "
                "a cascade is made of artifacts of different cost, leave one out"
            )
    return tuple(found)


def macs_of(artifact: Artifact) -> int:
    """Multiply-accumulates per image.

    Raises:
        InputError: if the manifest does not say.
    """
    try:
        return int(artifact.manifest.macs.merged)
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{artifact.path} has no usable macs in its build.json; rebuild the artifact"
        ) from None


def _facts(artifact: Artifact) -> dict[str, Any]:
    outputs = [(o.name, o.dtype, sizes(o)) for o in artifact.manifest.outputs]
    return {**shared_facts(artifact), "outputs": outputs}
