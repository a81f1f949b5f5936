"""Merging for timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel, Merger, MergeSettings, Tokens
from tome_export.patch.blocks import block_cost, block_forward
from tome_export.spec import PatchGrid

POOLS = ("", "avg", "avgmax", "max", "token", "map")


class MergedVisionTransformer(MergedModel):
    """A timm ViT that merges tokens; see ``MergedModel``.

    Class, distillation and register tokens are protected. Average pooling weights tokens by
    size, so that every patch counts once; attention pooling gets log(size) as attention does.

    Raises:
        InputError: if a part of the model is not understood.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        name = model_name(model)
        _check_plain(model, name)
        self._forwards = tuple(block_forward(block, name) for block in model.blocks)
        _check_pooling(model, name)
        _check_patches(model, name)
        height, width = model.patch_embed.img_size
        # Kept, because token counts stay those of this size if timm's set_input_size comes later.
        self._input_size = int(model.in_chans), int(height), int(width)
        self._patch_grid = _patch_grid(model.patch_embed)
        prefix = int(model.num_prefix_tokens)
        tokens = int(model.patch_embed.num_patches) + prefix
        super().__init__(model, settings, len(model.blocks), tokens, prefix)

    @property
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return bool(self.model.has_class_token)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        return self._input_size

    @property
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image; for a hybrid the pixels per cell of its features."""
        return self._patch_grid

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""
        model: Any = self.model
        return tuple(block_cost(block) for block in model.blocks)

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image of patch embedding, pooling and head, as torch counts them."""
        model: Any = self.model
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        # The counter follows parameters by their gradient functions, and knows no fused attention
        # of the CPU.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            parameter = next(model.parameters())
            kind = {"dtype": parameter.dtype, "device": parameter.device}
            model.patch_embed(torch.zeros((1, *self.input_size), **kind))
            model.forward_head(torch.zeros((1, tokens, model.embed_dim), **kind))
        return int(counter.get_total_flops()) // 2

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass of timm, with ``merger`` called once in every block."""
        model: Any = self.model
        x = model._pos_embed(model.patch_embed(pixel_values))
        tokens = Tokens(model.norm_pre(model.patch_drop(x)))
        for layer, (block, forward) in enumerate(zip(model.blocks, self._forwards, strict=True)):
            tokens = forward(block, tokens, self._bias(tokens), merger, layer)
        x = model.norm(tokens.x)
        # Without pooling timm hands on every token, prefix included.
        if tokens.size is None or model.global_pool in ("", "token"):
            return model.forward_head(x)  # type: ignore[no-any-return]
        return self._head(x, tokens.size)

    def _bias(self, tokens: Tokens) -> Tensor | None:
        size = tokens.size if self.settings.prop_attn else None
        return log_size_bias(size, tokens.x.dtype)

    def _head(self, x: Tensor, size: Tensor) -> Tensor:
        model: Any = self.model
        if not model.pool_include_prefix:
            x, size = x[:, self.prefix :], size[:, self.prefix :]
        x = model.head_drop(model.fc_norm(self._pool(x, size)))
        return model.head(x)  # type: ignore[no-any-return]

    def _pool(self, x: Tensor, size: Tensor) -> Tensor:
        model: Any = self.model
        if model.attn_pool is not None:
            mask = size.log().to(x.dtype)[:, None, None, :] if self.settings.prop_attn else None
            if mask is not None:
                mask = mask.expand(-1, -1, model.attn_pool.latent_len, -1)
            return model.attn_pool(x, attn_mask=mask)  # type: ignore[no-any-return]
        if model.global_pool == "max":
            return x.amax(dim=1)
        weight = (size / size.sum(dim=1, keepdim=True)).to(torch.promote_types(x.dtype, size.dtype))
        mean = (x.to(weight.dtype) * weight[..., None]).sum(dim=1).to(x.dtype)
        return 0.5 * (x.amax(dim=1) + mean) if model.global_pool == "avgmax" else mean


def _check_plain(model: nn.Module, name: str) -> None:
    """Refuse what patching would bypass: hooks, and ``forward`` methods put on single modules."""
    for where, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks or "forward" in vars(module):
            what = "a forward hook" if hooks else "a forward method of its own"
            raise InputError(
                f"module {where or '(the model)'} of model {name} has {what}, which patching would "
                "bypass; remove it (a model placed by accelerate or a device map: patch it before)"
            )


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


def model_name(model: nn.Module) -> str:
    """Timm's name of the model if it has one, else its class."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
