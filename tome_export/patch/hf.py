"""What the families of Hugging Face Transformers share: attention, checks and the patched model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import ONE_DEVICE, Zeros, check_plain, counted_macs
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid

ATTENTIONS = ("sdpa", "eager")
"""Attention implementations that take an additive bias; flash kernels take none."""

PLAIN = (
    nn.Conv2d,
    nn.Dropout,
    nn.Embedding,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
)
QUANTISED = ("torch.ao.", "torchao.", "bitsandbytes.", "peft.", "gptqmodel.", "awq.", "optimum.")
"""Packages whose modules compute with codes, or add to another module's output."""

ACTIVATIONS = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Mish)


def library_class(model: nn.Module, supported: dict[str, tuple[str, ...]]) -> bool:
    """Whether a model is exactly of one of the library's classes; imports nothing.

    Args:
        model: Any model.
        supported: Names of the classes by the library's name of their family.
    """
    cls = type(model)
    return any(
        cls.__name__ in names
        and cls.__module__ == f"transformers.models.{family}.modeling_{family}"
        for family, names in supported.items()
    )


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention by the library's own interface, with proportional attention as an additive mask.

    Args:
        module: The attention module, which says by its configuration which implementation to use.
        q: ``[B, H, N, D]``, as are ``k`` and ``v``.
        k: Keys.
        v: Values.
        bias: ``[B, 1, N, N]`` or None.
        scaling: Of the logits.
        dropout: Of the attention weights, in training.

    Returns:
        ``[B, N, H * D]``.
    """
    dropout = dropout if module.training else 0.0
    if module.config._attn_implementation == "eager":
        out = _eager(q, k, v, bias, scaling, dropout)
    else:
        # Not at the top: the library is optional.
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, q, k, v, bias, scaling=scaling, dropout=dropout, is_causal=False
        )
    return out.flatten(2)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """The library's eager attention, ``[B, N, H, D]``.

    Written out because the library keeps it apart from its interface, and because that of ViT,
    DeiT and DINOv2 in transformers 4 multiplies by the mask, which is a head mask there.
    """
    logits = torch.matmul(q, k.transpose(-1, -2)) * scaling
    if bias is not None:
        logits = logits + bias
    # The library's is float32 always, which would round the float64 pass that errors are
    # measured with.
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = functional.softmax(logits, dim=-1, dtype=wide).to(q.dtype)
    weights = functional.dropout(weights, p=dropout)
    return torch.matmul(weights, v).transpose(1, 2)


def split_heads(x: Tensor, head_width: int) -> Tensor:
    """``[B, N, H * D]`` to ``[B, H, N, D]``."""
    return x.view(*x.shape[:-1], -1, head_width).transpose(1, 2)


def check_attention(found: object, name: str) -> None:
    """Refuse attention implementations that take no additive bias.

    Args:
        found: The library's name of the implementation.
        name: Of the model, for the message.

    Raises:
        InputError: naming the implementation.
    """
    if found not in ATTENTIONS:
        raise InputError(
            f"attention implementation {found!r} of model {name} takes no additive bias, which "
            f"token merging needs; load it with attn_implementation={ATTENTIONS[0]!r} or "
            f"{ATTENTIONS[1]!r}"
        )


def check_placed(model: nn.Module, name: str) -> None:
    """Refuse a model that a device map has spread, sharded or offloaded.

    A model that is on the meta device as a whole is only looked at, and passes.

    Raises:
        InputError: saying how to place it.
    """
    hooked = next((where for where, m in model.named_modules() if hasattr(m, "_hf_hook")), None)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if hooked is None and len(devices) <= 1:
        return
    what = f"is on {', '.join(devices)}" if len(devices) > 1 else "has accelerate's hooks"
    raise InputError(
        f"model {name} {what}: a device map has placed it, and its hooks move tensors that "
        f"merging would not see; {ONE_DEVICE}"
    )


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The classifiers of a model by name, whatever modules they are; none of a bare model."""
    names = ("classifier", "cls_classifier", "distillation_classifier")
    found = {name: getattr(model, name, None) for name in names}
    return {name: head for name, head in found.items() if isinstance(head, nn.Module)}


def check_modules(module: nn.Module, name: str) -> None:
    """Refuse modules that are not the library's own, such as quantised layers.

    A classifier may be any module: it sees what is left of an image, whose tokens are merged.

    Args:
        module: The model or a layer; its own class is from the file that all may come from.
        name: Of the model, for the message.

    Raises:
        InputError: naming module and class.
    """
    home = type(module).__module__
    inside = {id(part) for head in heads_of(module).values() for part in head.modules()}
    for where, part in module.named_modules():
        cls = type(part)
        if id(part) in inside and not cls.__module__.startswith(QUANTISED):
            continue
        if cls.__module__ in (home, "transformers.activations") or cls in PLAIN + ACTIVATIONS:
            continue
        if cls is nn.MultiheadAttention or cls.__name__ == "NonDynamicallyQuantizableLinear":
            continue
        of = cls.__module__.partition(".")[0]
        fix = "expected the library's own modules everywhere but in the classifier"
        if cls.__module__.startswith(QUANTISED):
            fix = "load the model without quantisation or adapters"
        raise InputError(
            f"module {where} of model {name} is a {of} {cls.__name__}, which is not supported; "
            f"{fix}"
        )


def vision_config_of(model: Any) -> Any:
    """A model's configuration; its vision half where it is one of images and text."""
    return getattr(model.config, "vision_config", model.config)


def grid_of(config: Any, name: str) -> PatchGrid:
    """How images are cut, from the configuration of a model.

    Raises:
        InputError: if the image is not a whole number of patches.
    """
    height, width = pair(config.image_size)
    tall, wide = pair(config.patch_size)
    if height % tall or width % wide:
        raise InputError(
            f"model {name} has an image size of {height} x {width}, which is not a multiple of "
            f"its patch size of {tall} x {wide}; correct its configuration"
        )
    return PatchGrid(height // tall, width // wide, tall, wide)


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a configuration's size."""
    height, width = size if isinstance(size, Iterable) else (size, size)
    return int(height), int(width)


def linear_weights(*modules: nn.Module) -> int:
    """Weights of all linear layers in some modules: MACs per token."""
    return sum(
        part.weight.numel()
        for module in modules
        for part in module.modules()
        if isinstance(part, nn.Linear)
    )


class MergedHf(MergedModel):
    """A Transformers model that merges tokens; see ``MergedModel``.

    Class, distillation and register tokens are protected.

    Raises:
        InputError: if a part of the model is not understood, or a device map has placed it.
    """

    def __init__(self, model: Any, settings: MergeSettings, encoder_layers: Any) -> None:
        name = type(model).__name__
        check_placed(model, name)
        check_plain(model, name)
        check_modules(model, name)
        config = vision_config_of(model)
        check_attention(config._attn_implementation, name)
        self._encoder_layers = tuple(encoder_layers)
        self._patch_grid = grid_of(config, name)
        prefix = self.prefix_of(config)
        super().__init__(
            model, settings, len(self._encoder_layers), self._patch_grid.patches + prefix, prefix
        )

    @staticmethod
    @abstractmethod
    def prefix_of(config: Any) -> int:
        """Class, distillation and register tokens."""

    @abstractmethod
    def embed(self, pixel_values: Tensor) -> Tensor:
        """``[B, N, C]``: what enters the first layer."""

    @abstractmethod
    def layer_forward(
        self, layer: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, index: int
    ) -> Tokens:
        """One layer, merging between attention and MLP."""

    @abstractmethod
    def layer_cost(self, layer: Any) -> BlockCost:
        """Cost per token of one layer."""

    def final(self, x: Tensor) -> Tensor:
        """What treats tokens alone behind the layers."""
        return x

    @property
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return self.prefix > 0

    @property
    def width(self) -> int:
        """C of the tokens between the layers."""
        return int(vision_config_of(self.model).hidden_size)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        config = vision_config_of(self.model)
        return int(config.num_channels), *pair(config.image_size)

    @property
    def patch_grid(self) -> PatchGrid:
        """Where the patches lie in the image."""
        return self._patch_grid

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each layer."""
        return tuple(self.layer_cost(layer) for layer in self._encoder_layers)

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image of patch embedding, pooling and head, as torch counts them."""
        model = self.model

        def outside(zeros: Zeros) -> None:
            self.embed(zeros(1, *self.input_size))
            if not self.settings.dense:
                self.head(Tokens(zeros(1, tokens, self.width)))

        return counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The library's forward up to ``last_hidden_state``, merging once in every layer."""
        tokens = Tokens(self.embed(pixel_values))
        for index, layer in enumerate(self._encoder_layers):
            size = tokens.size if self.settings.prop_attn else None
            bias = log_size_bias(size, tokens.x.dtype)
            tokens = self.layer_forward(layer, tokens, bias, merger, index)
            tokens = merger.behind(tokens, index)
        return Tokens(self.final(tokens.x), tokens.size)
