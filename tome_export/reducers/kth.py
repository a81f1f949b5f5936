"""Every k-th patch takes in the others: ToMe's code, ``kth_bipartite_soft_matching``."""

from __future__ import annotations

from dataclasses import dataclass

from tome_export.errors import InputError
from tome_export.reducers.plans import FixedSets


@dataclass(frozen=True)
class Kth(FixedSets):
    """Set B is every k-th patch behind the prefix, set A the rest; the r best pairs merge.

    Of M patches ``floor(M / k)`` form B: with k = 4 a layer can remove three quarters. In the
    official code all of A merges, and the patches behind the last whole group of k get lost; here
    they belong to A.

    Attributes:
        k: One patch in k is in set B.
    """

    name = "kth"
    summary = "merge the most similar pairs, every k-th patch with the others"
    source = "Token Merging: Your ViT But Faster, arXiv 2210.09461, official code"

    k: int = 4

    def __post_init__(self) -> None:
        if self.k < 2:
            raise InputError(f"k of reducer kth is {self.k}; expected 2 or more")

    def limit(self, tokens: int, prefix: int) -> int:
        """All of set A, if there is a set B."""
        patches = max(0, tokens - prefix)
        return patches - patches // self.k if patches >= self.k else 0

    def sets(self, patches: int, layer: int, r: int) -> tuple[list[int], list[int]]:  # noqa: ARG002
        """By position alone."""
        b = list(range(self.k - 1, patches, self.k))
        return [patch for patch in range(patches) if patch not in b], b
