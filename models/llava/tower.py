"""The vision tower of LLaVA as one plain module: the layers that its language model sees.

Written with the library's own layers and forward, it is the yardstick of the merged tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tome_export.models.hf.checkpoint import library
from tome_export.models.llava.config import Projector
from tome_export.patch.hf.llava import MergedLlavaTower
from tome_export.patch.merger import MergeSettings
from tome_export.spec import SelectFeature


def projector_module(shape: Projector, inputs: int) -> nn.Module:
    """A projector of ``inputs`` channels, its keys ``0.weight``, ``2.weight``, … as in LLaVA."""
    if shape.layers == 0:
        return nn.Identity()
    linear: list[nn.Module] = [nn.Linear(inputs, shape.outputs, shape.bias)]
    if shape.bare:
        return linear[0]
    for _ in range(shape.layers - 1):
        linear += [nn.GELU(), nn.Linear(shape.outputs, shape.outputs, shape.bias)]
    return nn.Sequential(*linear)


class LlavaTower(nn.Module):
    """Transformers' ``CLIPVisionModel`` up to the selected layer, feature selection, projector.

    Attributes:
        vision_model: The library's vision transformer with the first layers only and without its
            last norm, which the selected hidden state does not go through. The name is the same
            for every version of the library, so that state dicts are.
        select_feature: ``patch`` or ``cls_patch``.
        mm_projector: The projector; the identity without one.
    """

    def __init__(
        self,
        vision: Mapping[str, Any],
        layers: int,
        select_feature: SelectFeature,
        projector: Projector | None = None,
        attention: str = "sdpa",
    ) -> None:
        """Make the tower with fresh weights, of layers up to the selected one.

        ``vision`` are arguments of ``CLIPVisionConfig``, those of the whole model; ``projector``
        None leaves it out; ``attention`` is the library's name of the implementation.
        """
        super().__init__()
        transformers = library()
        config = transformers.CLIPVisionConfig(**{**vision, "num_hidden_layers": layers})
        config._attn_implementation = attention
        whole: Any = transformers.CLIPVisionModel(config)
        # In 4.5x the model wraps the transformer; from 5 on it is the transformer.
        self.vision_model: nn.Module = getattr(whole, "vision_model", whole)
        self.vision_model.post_layernorm = nn.Identity()
        self.select_feature = select_feature
        width = int(config.hidden_size)
        self.mm_projector = projector_module(projector, width) if projector else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, tokens, width]``, the class token first if it is kept."""
        output = self.vision_model(pixel_values=pixel_values)
        return self.project(self.select(output.last_hidden_state))

    def select(self, x: Tensor) -> Tensor:
        """The tokens that the language model gets, of ``[B, N, C]`` with the class token first."""
        return x[:, 1:] if self.select_feature == "patch" else x

    def project(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the language model's width, if there is a projector."""
        return cast(Tensor, self.mm_projector(x))

    def with_merging(self, settings: MergeSettings) -> MergedLlavaTower:
        """The tower with token merging; ``patch`` calls it."""
        return MergedLlavaTower(self, settings)

    def place_constants(self) -> None:
        """Make anew what is not in a state dict, for a model made without memory for weights."""
        embeddings: Any = self.vision_model.embeddings
        positions = torch.arange(embeddings.num_positions).expand((1, -1))
        embeddings.register_buffer("position_ids", positions, persistent=False)
