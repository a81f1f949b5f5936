"""Layers of a manifest from their token counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tome_export.artifact.manifest import Layer


def layers_of(tokens: Sequence[int], macs: int = 1, macs_unmerged: int = 1) -> tuple[Layer, ...]:
    """Layers of a model of images.

    Args:
        tokens: Tokens that enter the first layer, and that leave each.
        macs: Of every layer.
        macs_unmerged: Likewise.
    """
    return tuple(
        Layer(
            tokens_in=before,
            r=before - after,
            tokens_out=after,
            behind_block=False,
            macs=macs,
            macs_unmerged=macs_unmerged,
        )
        for before, after in itertools.pairwise(tokens)
    )
