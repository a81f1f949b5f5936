"""What artifacts of one model have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tome_export.artifact import Artifact
from tome_export.errors import InputError


def shared_facts(artifact: Artifact) -> dict[str, object]:
    """What artifacts of one model have in common, by what a message calls it."""
    manifest = artifact.manifest
    return {
        "models": manifest.model.name,
        "weights": manifest.model.weights.state_sha256,
        "preprocessing": manifest.preprocessing,
        "labels": manifest.labels,
        "activations": manifest.activation,
    }


def check_one_model(
    artifacts: Sequence[Artifact],
    facts_of: Callable[[Artifact], Mapping[str, object]],
    rule: str,
) -> None:
    """Compare artifacts with the first of them."""
    first, *rest = artifacts
    expected = facts_of(first)
    for other in rest:
        found = facts_of(other)
        differing = next((what for what in expected if found[what] != expected[what]), None)
        if differing is not None:
            raise InputError(f"{first.path} and {other.path} have different {differing}; {rule}")
