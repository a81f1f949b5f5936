"""Token Merging: bipartite soft matching by keys, size-weighted mean (arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass

from tome_export.reducers.base import MatchReducer


@dataclass(frozen=True)
class ToMe(MatchReducer):
    """The r most similar pairs (even position, odd position) merge into their mean.

    The metric is the mean key over heads, the similarity its cosine (section 3.1). A layer removes
    at most half of its tokens.
    """

    name = "tome"
    summary = "merge the most similar pairs, even with odd positions"
    source = "Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3.1"
