"""Outputs beside the main one, judged by the plans of the graph that gives them.

The twin shows its plans, so its outputs have to follow from those of the same pass. The shipped
graph shows none: its outputs have to be the twin's where the twin decides as the reference, for any
plan of its own would be that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tome_export.merge.entropy import entropy_bound
from tome_export.parity.decisions import Array
from tome_export.parity.reference import Pass

if TYPE_CHECKING:
    from tome_export.patch import MergedModel


def places(model: MergedModel, free: Pass) -> Array:
    """Where the plans of a pass put every patch, by composing them: ``[B, patches]`` int.

    The final token is counted behind the prefix tokens; -1 is for a patch that was dropped.
    """
    import torch

    from tome_export.merge.plan import MergePlan

    plans = {
        step: MergePlan(*(torch.from_numpy(part) for part in (found.keep, found.src, found.dst)))
        for step, found in free.layers.items()
    }
    own: Array = model.source_map_of(plans, len(free.output)).numpy()
    return own


def source_map_defects(
    model: MergedModel, free: Pass, shipped: Array | None, diverged: Array
) -> int | None:
    """Images whose source map ``[B, patches]`` does not follow from the plans; None without one.

    ``free`` is the twin, deciding for itself; ``diverged`` ``[B]`` is -1 where its plans do not
    differ.
    """
    if free.source_map is None or shipped is None:
        # A model without that output has it in neither graph.
        return None if free.source_map is shipped else len(free.output)
    own = places(model, free)
    if own.shape != free.source_map.shape or own.shape != shipped.shape:
        return len(free.output)
    wrong = (own != free.source_map).any(axis=1)
    wrong |= (shipped != free.source_map).any(axis=1) & (diverged < 0)
    return int(wrong.sum())


def entropies(model: MergedModel, free: Pass) -> Array:
    """Token-size entropy ``[B]``, 0 to 1, by the plans of a pass: patches counted, in fp64."""
    found = []
    for row in places(model, free):
        # What is in a prefix token is no part of the tokens whose sizes count.
        sizes = np.bincount(row[row >= 0].astype(np.int64))
        share = sizes[sizes > 0] / sizes.sum()
        limit = math.log(len(row)) if len(row) > 1 else 1.0
        found.append(max(0.0, -float((share * np.log(share)).sum()) / limit))
    if not model.merges:
        return np.ones(len(free.output))
    return np.array(found)


def entropy_defects(
    model: MergedModel, free: Pass, shipped: Array | None, diverged: Array
) -> int | None:
    """Images whose entropy ``[B]`` does not follow from the plans, beyond what fp32 rounds.

    Arguments are as for ``source_map_defects``.
    """
    if free.entropy is None or shipped is None:
        return None if free.entropy is shipped else len(free.output)
    own = entropies(model, free)
    if own.shape != free.entropy.shape or own.shape != shipped.shape:
        return len(free.output)
    bound = entropy_bound(model.tower.tokens)
    # Not «greater than»: what is undefined is a defect too.
    wrong = ~(np.abs(own - free.entropy) <= bound)
    wrong |= ~(np.abs(own - shipped) <= bound) & (diverged < 0)
    return int(wrong.sum())
