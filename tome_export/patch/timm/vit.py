"""Merging for timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.patch.base import MergedModel, ModelLayout
from tome_export.patch.checks import check_unhooked, model_name, pretrained_configuration
from tome_export.patch.heads import (
    OutputChoice,
    head_width,
    mean_of_patches,
    output_choice_from_heads,
)
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.timm.blocks import BlockForward, block_cost, block_forward
from tome_export.spec import PatchGrid

POOLS = ("", "avg", "avgmax", "max", "token", "map")


PROJECTION_UNIT = 64
"""Embeddings are so wide, or a multiple of it, in every CLIP that timm has, and no label set is."""


def output_choice(model: Any) -> OutputChoice:
    """What the output of a timm model is: class scores, or features.

    Timm keeps the projection of CLIP's and the Perception Encoder's towers as their head. It is the
    head of the pretrained weights as they are, whose width its configuration has as ``num_classes``
    and no label set has; any other head was put there to classify.
    """
    from timm.data import infer_imagenet_subset

    choice = output_choice_from_heads(
        getattr(model, "head", None), getattr(model, "head_dist", None)
    )
    if not choice.classifies:
        return choice
    if getattr(model, "global_pool", None) == "":
        why = "without pooling (global_pool='') the output is every token's, not the image's"
        return OutputChoice(classifies=False, why=why)
    width = head_width(model.head)
    cfg = pretrained_configuration(model)
    pretrained = cfg.get("num_classes")
    if width is None or not pretrained or infer_imagenet_subset({"num_classes": pretrained}):
        return choice
    if cfg.get("label_names") or pretrained % PROJECTION_UNIT:
        return choice
    if width != pretrained:
        why = f"{choice.why}, not the {pretrained} of the weights' projection to image features"
        return OutputChoice(classifies=True, why=why)
    why = (
        f"the head of {width} outputs is the pretrained weights' own, which is a projection to "
        "image features and no list of classes"
    )
    return OutputChoice(classifies=False, why=why)


class MergedVisionTransformer(MergedModel):
    """A timm ViT that merges tokens; see ``MergedModel``.

    Class, distillation and register tokens are protected. Average pooling weights tokens by
    size, so that every patch counts once; attention pooling gets log(size) as attention does.
    """

    library_classes: ClassVar[tuple[str, ...]] = (
        "timm.models.vision_transformer.VisionTransformer",
        "timm.models.deit.VisionTransformerDistilled",
    )
    backbone_classes: ClassVar[tuple[str, ...]] = library_classes

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        name = model_name(model)
        check_unhooked(model, name)
        self._forwards = tuple(self.block_forward(block, name) for block in model.blocks)
        _check_pooling(model, name)
        _check_patches(model, name)
        height, width = model.patch_embed.img_size
        prefix = int(model.num_prefix_tokens)
        # The image size is kept: token counts stay those of it after timm's set_input_size.
        layout = ModelLayout(
            blocks=model.blocks,
            costs=[block_cost(block) for block in model.blocks],
            width=int(model.embed_dim),
            input_size=(int(model.in_chans), int(height), int(width)),
            tokens=int(model.patch_embed.num_patches) + prefix,
            prefix=prefix,
            class_token=self.has_class_token(model),
            grid=_patch_grid(model.patch_embed),
        )
        super().__init__(model, settings, layout)

    @staticmethod
    def block_forward(block: nn.Module, name: str) -> BlockForward:
        """The merging forward of a block, for a model of this name."""
        return block_forward(block, name)

    @staticmethod
    def has_class_token(model: Any) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return bool(model.has_class_token)

    @property
    def output_choice(self) -> OutputChoice:
        """See the function ``output_choice``."""
        return output_choice(self.model)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Prefix tokens and patches, positions added."""
        model = self.model
        x = model._pos_embed(model.patch_embed(pixel_values))
        return cast(Tensor, model.norm_pre(model.patch_drop(x)))

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """By the forward of its class."""
        return self._forwards[layer](block, tokens, bias, merger, layer)

    def final(self, x: Tensor) -> Tensor:
        """The last norm."""
        return cast(Tensor, self.model.norm(x))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What timm's model itself gives."""
        if self.settings.dense:
            return cast(Tensor, self.model.forward_features(pixel_values)[:, self.prefix :])
        return cast(Tensor, self.model(pixel_values))

    def head(self, tokens: Tokens) -> Tensor:
        """Timm's ``forward_head``, pooling weighted by size."""
        model = self.model
        # Without pooling timm hands on every token, prefix included.
        if tokens.size is None or model.global_pool in ("", "token"):
            return cast(Tensor, model.forward_head(tokens.x))
        if not self.pools_prefix:
            tokens = Tokens(tokens.x[:, self.prefix :], tokens.size[:, self.prefix :])
        return cast(Tensor, model.head(model.head_drop(model.fc_norm(self._pool(tokens)))))

    @property
    def pools_prefix(self) -> bool:
        """Whether the prefix tokens go into the pooling, too."""
        return bool(self.model.pool_include_prefix)

    def _pool(self, tokens: Tokens) -> Tensor:
        model = self.model
        if model.attn_pool is not None:
            mask = self.size_bias(tokens, model.attn_pool.latent_len)
            return cast(Tensor, model.attn_pool(tokens.x, attn_mask=mask))
        if model.global_pool == "max":
            return tokens.x.amax(dim=1)
        mean = mean_of_patches(tokens.x, tokens.size)
        return 0.5 * (tokens.x.amax(dim=1) + mean) if model.global_pool == "avgmax" else mean


def _check_patches(model: Any, name: str) -> None:
    """Refuse padding, whose tokens timm's own patch count leaves out."""
    embed = model.patch_embed
    pads = getattr(embed, "dynamic_img_pad", False)
    if pads and any(
        side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)
    ):
        raise InputError(
            f"model {name} pads images of {embed.img_size} to whole patches of "
            f"{embed.patch_size}, so its tokens cannot be counted; make it with an image size "
            "divisible by the patch size"
        )


def _patch_grid(embed: Any) -> PatchGrid | None:
    from timm.layers import HybridEmbed, PatchEmbed

    if type(embed) not in (PatchEmbed, HybridEmbed):
        return None
    rows, cols = (int(n) for n in embed.grid_size)
    height, width = (int(n) for n in embed.img_size)
    if type(embed) is PatchEmbed:
        return PatchGrid(rows, cols, *(int(n) for n in embed.patch_size))
    # A cell of a backbone's features sees more than its part of the image, but stands for that.
    if height % rows == 0 and width % cols == 0:
        return PatchGrid(rows, cols, height // rows, width // cols)
    return None


def _check_pooling(model: Any, name: str) -> None:
    from timm.layers import AttentionPoolLatent

    if model.global_pool not in POOLS:
        raise InputError(
            f"global pooling {model.global_pool!r} of model {name} is not supported; "
            f"supported: {', '.join(repr(pool) for pool in POOLS)}"
        )
    if model.attn_pool is not None and type(model.attn_pool) is not AttentionPoolLatent:
        raise InputError(
            f"attention pooling class {type(model.attn_pool).__name__} of model {name} is not "
            "supported; supported: AttentionPoolLatent"
        )
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        raise InputError(
            f"attention pooling of model {name} has a position embedding, which merged tokens "
            "cannot keep; not supported"
        )
