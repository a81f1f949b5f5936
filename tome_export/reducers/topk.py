"""Keep the tokens that the class token attends to most, drop the others (arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass

from tome_export.reducers.evit import AttentiveReducer


@dataclass(frozen=True)
class TopK(AttentiveReducer):
    """Of N tokens behind P prefix tokens ``ceil(keep (N - P))`` stay, in order of position.

    The score is that of EViT (section 3.1). Without counts of its own a layer drops its r least
    attended tokens.
    """

    name = "topk"
    summary = "drop the tokens with the least class attention"
    source = "EViT: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800"
    drops = True
