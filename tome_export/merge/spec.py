"""The operator contract of match and merge, shared by PyTorch, ONNX and the kernels.

Imports nothing: the ONNX functions, the TensorRT plugins and the tests all read these names.

``TomeMatch(keys [B, H, N, D]) -> keep [B, K], src [B, r], dst [B, r]`` (int32) with attributes
``r``, ``prefix`` and ``class_token``; ``K = N - r``. The keys are of any float type and averaged
over heads in fp32 inside the operator; a ready metric ``[B, N, D]`` is the same as H = 1. B counts
sequences, each for itself: images, or the clips of all videos; ``prefix`` counts the protected
tokens at the front of each, which belong to a set by their positions as all others do.
``TomeMerge(x [B, N, C], size [B, N], keep, src, dst) -> x' [B, K, C], size' [B, K]``; a dst of -1
drops its token. ``TomePlan(keep, src, dst)`` and ``TomeSignal(x)`` give back what they get: they
mark the plan of a layer that has no match, and the scores it was decided by, for the parity check.

Nodes meant for TensorRT plugins also carry ``PLUGIN_ATTRIBUTES``, by which its parser finds them.
"""

from __future__ import annotations

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


def clamp_r(tokens: int, r: int, prefix: int) -> int:
    """The number of tokens a layer can really merge.

    Args:
        tokens: Tokens N that enter the layer, prefix tokens included.
        r: Tokens asked to be merged.
        prefix: Protected tokens P at the front of the sequence.

    Returns:
        ``min(r, (N - P) // 2)``, never negative (ToMe, section 3.2: a token of set A merges at
        most once, and set A is half of the tokens).
    """
    return max(0, min(r, (tokens - prefix) // 2))
