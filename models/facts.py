"""Facts that recipes state of models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tome_export.spec import Activation, OutputKind

DATA = Path(__file__).parent / "data"

Norm = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""

IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_NORM: Norm = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""That of CLIP's training images (arXiv 2103.00020's code)."""

TOKENS_FACTOR = 0.8
RULE = f"rule: floor({TOKENS_FACTOR} * tokens / depth)"
"""What recipes whose r is ``recommended_r`` name as its source."""


def recommended_r(tokens: int, depth: int) -> int:
    """The r for models without a published one: four fifths of the tokens, spent over the depth.

    It is 13 for ViT-S/16 and ViT-B/16, as the ToMe authors publish for off-the-shelf weights, and
    at or below every other r they publish (ViT-L/16 7, ViT-L/16@384 23, SWAG B@384 45, L@512 40,
    H@518 40). ``tokens`` are those that enter the first block, prefix tokens included.
    """
    return int(TOKENS_FACTOR * tokens / depth) if depth else 0


@dataclass(frozen=True)
class MergingAdvice:
    """How tokens of a model are best merged.

    Attributes:
        r: Tokens to merge per layer where the user names no schedule.
        source: Where r comes from: a publication, a measurement, or ``RULE``.
        prop_attn: Whether to use proportional attention (ToMe, eq. 1).
        needs_grid: Why only dense outputs fit the model's user; empty if all do.
    """

    r: int
    source: str = RULE
    prop_attn: bool = True
    needs_grid: str = ""


def rule_advice(tokens: int, depth: int) -> MergingAdvice:
    """Advice for a model of which nothing was published or measured: ``recommended_r``."""
    return MergingAdvice(recommended_r(tokens, depth))


DINOV2_LEAST = 0.99
"""Least mean cosine of merged to unmerged features, or correlation of maps, at a measured r."""

DINOV2_FEATURES, DINOV2_MAPS = ({257: 12, 1370: 100}, {257: 4, 1370: 60})
"""Largest r of those measured on trained DINOv2 ViT-S/14 that keeps to ``DINOV2_LEAST``, by the
tokens that enter its 12 blocks: by its features, and by the saliency maps made of them."""

_MEASURED = f"at least {DINOV2_LEAST} on ViT-S/14, benchmarks/results/trained.json"


def dinov2_advice(tokens: int, depth: int) -> MergingAdvice:
    """Advice for a tower of DINOv2: the share of its tokens that was measured on ViT-S/14.

    The tokens may include four registers; for any other number of them it is the rule.
    """
    known = next((count for count in DINOV2_FEATURES if 0 <= tokens - count <= 4), None)
    if known is None or not depth:
        return rule_advice(tokens, depth)
    r = 12 * DINOV2_FEATURES[known] * tokens // (known * depth)
    return MergingAdvice(r, f"measured: mean cosine to the unmerged features {_MEASURED}")


def dinov2_map_advice(tokens: int, depth: int) -> MergingAdvice:
    """Advice for the saliency model of DINOv2 ViT-S/14, where it was measured for such tokens."""
    if tokens not in DINOV2_MAPS:
        return rule_advice(tokens, depth)
    source = f"measured: mean correlation with the unmerged map {_MEASURED}"
    return MergingAdvice(DINOV2_MAPS[tokens], source)


@dataclass(frozen=True)
class ModelOutput:
    """What a model gives for an image.

    Attributes:
        name: ``logits`` of a classifier, ``features`` of a model without a head; of a model with
            a head of its own for the grid of patches what that calls it.
        note: Why it is the one or the other, where the model was looked at.
        activation: What makes scores of logits; None for the usual one of so many.
        labels: Class names, where they are not those of ``label_set``.
        label_set: timm's name of the label set, loaded only when asked for.
        dense_only: Whether there is no output for the whole image, only features of patches.
        is_map: Whether a head of the model's own makes it of the grid of patches.
    """

    name: str = "logits"
    note: str = ""
    activation: Activation | None = None
    labels: tuple[str, ...] | None = None
    label_set: str | None = None
    dense_only: bool = False
    is_map: bool = False

    @property
    def kind(self) -> OutputKind:
        """What the output is."""
        if self.is_map:
            return "map"
        return "classes" if self.name == "logits" else "features"

    def label_names(self, classes: int) -> tuple[str, ...] | None:
        """Names of the classes; None where there are not so many, as for a fine-tuned head."""
        if self.labels is not None:
            return self.labels if len(self.labels) == classes else None
        if self.label_set is None or self.kind != "classes":
            return None
        from timm.data import ImageNetInfo

        info: Any = ImageNetInfo(self.label_set)
        if len(info.label_names()) != classes:
            return None
        return tuple(info.index_to_description(i) for i in range(classes))


@dataclass(frozen=True)
class Geometry:
    """Sizes from which tokens and MACs of a plain ViT follow, for lists that import no torch.

    Attributes:
        patch: Side of a patch in pixels.
        prefix: Class, distillation and register tokens.
        head_macs: MACs per image behind the blocks: projection or classifier.
        token_macs: MACs per final token behind the blocks, such as a projector's.
        shared: Tokens of a whole video that all its frames attend to, and that attend to all.
        video_macs: MACs per video outside the blocks that do not follow from its frames.
    """

    width: int
    depth: int
    mlp: int
    patch: int
    prefix: int = 1
    head_macs: int = 0
    token_macs: int = 0
    shared: int = 0
    video_macs: int = 0

    def recommended_r(self, size: int) -> int:
        """``recommended_r`` for square images of some side in pixels."""
        return recommended_r((size // self.patch) ** 2 + self.prefix, self.depth)
