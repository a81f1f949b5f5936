"""Random patches merge: ToMe's code, ``random_bipartite_soft_matching``."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tome_export.reducers.plans import FixedSets


@dataclass(frozen=True)
class RandomPartition(FixedSets):
    """Set A is r patches drawn at random, set B the rest; every patch of A merges.

    The draw is a constant of the graph: layer l takes the r patches with the smallest of M numbers
    from ``random.Random("<seed>/<l>").random()``, which Python promises to keep the same. The
    official code draws anew for every image of every batch.

    Attributes:
        seed: Seed of the draw.
    """

    name = "random"
    summary = "merge randomly drawn patches into their most similar ones: a baseline"
    source = "Token Merging: Your ViT But Faster, arXiv 2210.09461, official code"

    seed: int = 0

    at_most_half = False

    def sets(self, patches: int, layer: int, r: int) -> tuple[list[int], list[int]]:
        """Drawn for this layer and number of patches, the same for all images."""
        source = Random(f"{self.seed}/{layer}")  # noqa: S311 (no secret)
        drawn = [source.random() for _ in range(patches)]
        order = sorted(range(patches), key=drawn.__getitem__)
        return sorted(order[:r]), sorted(order[r:])
