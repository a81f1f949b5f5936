"""Token-size entropy: how evenly an image is spread over the tokens that are left of it.

``H = -sum p_i log p_i`` with ``p_i = size_i / sum(size)`` over the final tokens, as a share of
``log N``, where N patches enter the first layer: 1 where every patch is a token by itself, 0 where
one token holds all of them. ``exp(H)`` is the effective number of tokens: that of equally large
ones with the same entropy (the perplexity of p, Hill's number of order 1).

- Prefix tokens (class, distillation, registers) count neither in p nor in N: they hold no patch,
  never merge, and would put a floor under the entropy of an image that is merged into one token.
- The size of dropped tokens is lost (``MergePlan``, dst -1): p is over what is left and N stays. So
  dropping down to K tokens has the entropy of merging evenly to K, ``log K / log N``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tome_export.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def size_entropy(size: Tensor, prefix: int, patches: int) -> Tensor:
    """Normalised entropy of the sizes of the final tokens, ``[B]`` from 0 to 1.

    Args:
        size: ``[B, K]`` float32, patches that each token stands for, at least 1.
        prefix: Tokens at the front that are no patches.
        patches: Patches N that entered the first layer; more than 1.
    """
    own = size[:, prefix:]
    total = own.sum(dim=1)
    # log S - sum(s log s) / S is the entropy without a division per token; S is exact.
    entropy = total.log() - (own * own.log()).sum(dim=1) / total
    return entropy / math.log(patches)


def check_min_entropy(value: float | None) -> None:
    """Raise ``UsageError`` for a least entropy that is not 0 to 1; None is any."""
    if value is not None and not 0 <= value <= 1:
        raise UsageError(f"--min-entropy is {value:g}; expected 0 to 1, such as 0.8")


def entropy_bound(tokens: int) -> float:
    """How far the entropy of so many tokens can be from the exact value in fp32, normalised.

    The sum of n terms is off by at most about n u of itself, and each logarithm and product by a
    few u (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); both terms of the
    entropy are at most log N. u = 2^-24.
    """
    return 2 * (tokens + 8) * 2.0**-24


def effective_tokens(entropy: float, patches: int) -> float:
    """``exp(H)`` of a normalised entropy: between 1 and the number of patches."""
    return math.exp(entropy * math.log(patches))


def uniform_entropy(tokens: int, patches: int) -> float:
    """Normalised entropy of so many equally large tokens of so many patches."""
    return math.log(tokens) / math.log(patches)
