"""What merging long sequences asks of TensorRT's operators, and where they give up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from tome_export.spec import BackendName

if TYPE_CHECKING:
    from tome_export.merge.schedule import LayerTokens

TOPK_MAX = 3840
"""Most numbers that TensorRT's TopK gives (documentation of ``ITopKLayer``).

TensorRT-RTX 1.7 has the same limit: its parser takes more, its builder refuses them (tried).
"""

ONE_HOT_MAX_BYTES = 64 * 2**20
"""Most bytes per image of the matrix ``[K, r]`` in float32 that merges tokens by a product.

At this size the product costs what merging is there to save. It has 2^24 entries, so with C = 768
it takes 26 GFLOP per image and layer, in float32 and without TF32, in which an H100 does 67 TFLOP/s
(data sheet): 0.4 ms. A whole ViT-B block on 8,192 tokens has 24 N C^2 + 4 N^2 C = 322 GFLOP, 0.3 ms
in fp16 at 989 TFLOP/s. And 64 images write and read 4 GiB of it in every layer. The scores of the
match have the same size at N = 8,192.
"""

TITLES: dict[BackendName, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


class MergeCounts(NamedTuple):
    """Token counts of one merge.

    Attributes:
        name: ``blocks.3``, or ``blocks.3.across``.
        tokens: N of one sequence.
        sequences: Sequences of one image or video.
    """

    name: str
    tokens: int
    r: int
    prefix: int
    sequences: int = 1

    @property
    def one_hot_bytes(self) -> int:
        """Bytes of ``[K, r]`` in float32 per image or video."""
        return 4 * self.sequences * (self.tokens - self.r) * self.r

    def sorted_by_match(self, class_token: bool) -> int:
        """Numbers that TomeMatch sorts: all of set A where what stays is in order of rank."""
        return self.r if class_token else (self.tokens + 1) // 2

    @property
    def sorted_by_scores(self) -> int:
        """Numbers that a reducer that ranks all patches sorts; some sort fewer."""
        return self.tokens - self.prefix


def merges_of(layers: Iterable[LayerTokens], prefix: int) -> list[MergeCounts]:
    """The merges of a model, by its layers and the protected tokens of one image."""
    found = []
    for index, layer in enumerate(layers):
        prefix *= layer.joined
        tokens, sequences = layer.joined * layer.tokens_in, layer.sequences
        if layer.cross:
            name = f"blocks.{index}.across"
            found.append(MergeCounts(name, tokens, layer.cross, prefix, sequences))
        if layer.r:
            name = f"blocks.{index}"
            found.append(MergeCounts(name, layer.attended, layer.r, prefix, sequences))
    return found


def refusal(
    backend: BackendName,
    merges: Iterable[MergeCounts],
    *,
    class_token: bool,
    scored: bool = False,
    plugin: bool = False,
) -> str | None:
    """Why no engine can be built of a merging model, in one line; None if nothing is in the way.

    ``scored``: its reducer ranks scores of its own and has no TomeMatch. ``plugin``: match and
    merge are nodes for plugins. TensorRT then sorts nothing for a match and has no matrix;
    TensorRT-RTX runs the bodies all the same.
    """
    title, plugged = TITLES[backend], plugin and backend == "tensorrt"
    for merge in merges:
        if scored:
            length, what, cure = merge.sorted_by_scores, "all its patches", "fewer tokens"
        elif class_token:
            length, what, cure = merge.sorted_by_match(True), "the merged ones", "a smaller r"
        else:
            length = merge.sorted_by_match(False)
            what, cure = "half of them, having no class token,", "fewer tokens"
        where = f"{merge.name} merges r = {merge.r:,} of {merge.tokens:,} tokens"
        if length > TOPK_MAX and (scored or not plugged):
            return (
                f"{where} and sorts {what} by one TopK of {length:,}; {title} takes at most "
                f"{TOPK_MAX:,}: use {cure}, or --engine none"
            )
        if merge.one_hot_bytes > ONE_HOT_MAX_BYTES and not plugged:
            size, most = (f"{n / 2**20:.1f} MiB" for n in (merge.one_hot_bytes, ONE_HOT_MAX_BYTES))
            return (
                f"{where} by a matrix of {size} per image; expected at most {most} for {title}: "
                "use a smaller r, or --engine none with --merge-op index_add"
            )
    return None
