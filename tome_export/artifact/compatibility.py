"""What artifacts of one model have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tome_export.artifact import Artifact
from tome_export.errors import InputError


def shared_facts(artifact: Artifact, *, any_size: bool = False) -> dict[str, object]:
    """What artifacts of one model have in common, by what a message calls it.

    With ``any_size`` they may be for images of different sizes, which nothing but embeddings of
    positions and the input's shape depend on.
    """
    manifest = artifact.manifest
    weights, preprocessing = manifest.model.weights, manifest.preprocessing
    size = None if any_size else preprocessing.image_size
    if any_size:
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], 0, 0))
    return {
        "models": manifest.model.name,
        "image sizes": size,
        "weights": (any_size and weights.common_sha256) or weights.state_sha256,
        "preprocessing": preprocessing,
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
