"""The operator contract of match and merge, shared by PyTorch, ONNX and the kernels.

Imports the standard library only: the ONNX functions, the TensorRT plugins and the tests all read
these names.

``TomeMatch(keys [B, H, N, D]) -> keep [B, K], src [B, r], dst [B, r]`` (int32) with attributes
``r``, ``prefix`` and ``class_token``; ``K = N - r``. The keys are of any float type and averaged
over heads in fp32 inside the operator; a ready metric ``[B, N, D]`` is the same as H = 1. B counts
sequences, each for itself: images, or the clips of all videos; ``prefix`` counts the protected
tokens at the front of each, which belong to a set by their positions as all others do.

Nodes meant for TensorRT plugins carry ``KEYS_ATTRIBUTES`` as well, which say where in the input the
keys lie. ``heads`` = 0 means as above. Otherwise the input is a product ``[B, N, W]``, such as that
of the QKV projection, and head h of the keys is its ``width`` columns from ``offset + h * width``
on; ``H = heads``, ``D = width``. So nothing has to write the keys again, one head after the other.

``TomeMerge(x [B, N, C], size [B, N], keep, src, dst) -> x' [B, K, C], size' [B, K]``; a dst of -1
drops its token. ``TomePlan(keep, src, dst)`` and ``TomeSignal(x)`` give back what they get: they
mark the plan of a layer that has no match, and the scores it was decided by, for the parity check.

Nodes meant for TensorRT plugins also carry ``PLUGIN_ATTRIBUTES``, by which its parser finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

DOMAIN = "tome_export"
VERSION = 1
"""Version of the operator set; raised when the meaning of an operator changes."""

MATCH = "TomeMatch"
MERGE = "TomeMerge"
PLAN = "TomePlan"
SIGNAL = "TomeSignal"

SUFFIXES = {MATCH: "match", PLAN: "plan", MERGE: "merge", SIGNAL: "signal"}
"""How nodes are named: ``blocks.<layer>.<suffix>``."""

MATCH_INPUTS = ("keys",)
MATCH_OUTPUTS = ("keep", "src", "dst")
MERGE_INPUTS = ("x", "size", "keep", "src", "dst")

NORM_EPS = 1e-12
"""Lower bound of a metric vector's L2 norm, so that a zero vector scores 0 and not NaN."""

NORM_LIMIT = 2.0**64
"""A metric vector whose L2 norm is not below this, or NaN, counts as the zero vector.

Its square is the first number beyond fp32: a norm taken in fp32 is below it, or not finite.
"""

SEQUENCES = "sequences"
"""Key of the graph's metadata: sequences per image or video of each merge with more than one."""

PLUGIN_NAMESPACE = DOMAIN
PLUGIN_VERSION = "1"
PLUGIN_ATTRIBUTES: tuple[tuple[str, str | int], ...] = (
    ("plugin_namespace", PLUGIN_NAMESPACE),
    ("plugin_version", PLUGIN_VERSION),
    ("aot", 1),
)
"""Node attributes: which registered plugin TensorRT takes, in its ahead-of-time form."""

KEYS_ATTRIBUTES: tuple[tuple[str, int], ...] = (("heads", 0), ("width", 0), ("offset", 0))
"""Attributes of plugin match nodes and their values where the keys are taken as they are."""


class KeysView(NamedTuple):
    """Where the keys ``[B, H, N, D]`` lie in TomeMatch's input, in elements.

    Attributes:
        heads: H; 1 for a metric.
        tokens: N.
        width: D.
        strides: Steps from image to image, head to head, token to token; 1 within a head.
        offset: Where the first image's keys begin.
    """

    heads: int
    tokens: int
    width: int
    strides: tuple[int, int, int]
    offset: int


def keys_view(lengths: Sequence[int], heads: int = 0, width: int = 0, offset: int = 0) -> KeysView:
    """Where the keys lie in an input that is contiguous.

    Args:
        lengths: The input's shape without the batch: ``(H, N, D)`` or ``(N, D)``, or ``(N, W)`` of
            a product.
        heads: The node's attribute, as are ``width`` and ``offset``.
        width: See there.
        offset: See there.

    Raises:
        ValueError: if the product is not one, or lacks the columns.
    """
    if heads == 0:
        *given, tokens, width = lengths
        heads = given[0] if given else 1
        return KeysView(heads, tokens, width, (heads * tokens * width, tokens * width, width), 0)
    if len(lengths) != 2:
        raise ValueError(f"the product has shape [B, {', '.join(map(str, lengths))}]; expected 3D")
    tokens, columns = lengths
    if min(heads, width) < 1 or offset < 0 or offset + heads * width > columns:
        raise ValueError(
            f"the keys are {heads} heads of {width} columns from column {offset} on; expected them "
            f"inside a product of {columns} columns"
        )
    return KeysView(heads, tokens, width, (tokens * columns, width, columns), offset)


def clamp_r(tokens: int, r: int, prefix: int) -> int:
    """The number of tokens a layer can really merge: ``min(r, (N - P) // 2)``, never negative.

    A token of set A merges at most once, and set A is half of the N tokens but for the P protected
    ones at the front (ToMe, section 3.2).
    """
    return max(0, min(r, (tokens - prefix) // 2))
