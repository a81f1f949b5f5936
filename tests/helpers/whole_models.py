"""Small models of a backbone and a head that reads the grid of patches, with live weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from towers import live

DEPTH, WIDTH, SIZE, PATCH = 4, 48, 112, 14
GRID = SIZE // PATCH


def backbone_config(depth: int = DEPTH, **changed: Any) -> Any:
    import transformers

    return transformers.Dinov2Config(
        **{
            "hidden_size": WIDTH,
            "num_hidden_layers": depth,
            "num_attention_heads": 3,
            "mlp_ratio": 2,
            "image_size": SIZE,
            "patch_size": PATCH,
            "out_features": [f"stage{stage}" for stage in range(1, depth + 1)],
            **changed,
        }
    )


def depth_anything() -> Any:
    """A depth map of four intermediate layers."""
    import transformers

    config = transformers.DepthAnythingConfig(
        backbone_config=backbone_config(reshape_hidden_states=False),
        patch_size=PATCH,
        reassemble_hidden_size=WIDTH,
        neck_hidden_sizes=[16, 24, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    model = live(transformers.DepthAnythingForDepthEstimation(config))
    # Its last step cuts off what is below zero.
    model.head.conv3.bias.data.fill_(1.0)
    return model


def upernet() -> Any:
    """A segmentation of seven classes, of feature maps of four intermediate layers."""
    import transformers

    config = transformers.UperNetConfig(
        backbone_config=backbone_config(),
        hidden_size=32,
        use_auxiliary_head=False,
        id2label={index: f"class {index}" for index in range(7)},
    )
    return live(transformers.UperNetForSemanticSegmentation(config))


class Head(nn.Module):
    """A head of the last features of a Transformers backbone: ``{"two": [B, 2, rows, cols]}``."""

    def __init__(self, backbone: nn.Module, prefix: int = 1) -> None:
        super().__init__()
        self.backbone, self.prefix = backbone, prefix
        self.head = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.backbone(pixel_values).last_hidden_state[:, self.prefix :]
        side = int(x.shape[1] ** 0.5)
        return {"two": self.head(x.transpose(1, 2).unflatten(2, (side, side)))}


class HiddenStates(Head):
    """The same of the sum of some hidden states, one of them ahead of the first layer."""

    def forward(self, pixel_values: Tensor) -> Any:
        states = self.backbone(pixel_values, output_hidden_states=True).hidden_states
        x = (states[0] + states[2] + states[-1])[:, self.prefix :]
        side = int(x.shape[1] ** 0.5)
        return self.head(x.transpose(1, 2).unflatten(2, (side, side)))


class InPlace(Head):
    """Adds to tokens between blocks, in place, as prompts are added."""

    def forward(self, pixel_values: Tensor) -> Any:
        tokens = self.backbone.embeddings(pixel_values)
        for block in self.backbone.encoder.layer:
            tokens = tokens_of(block(tokens))
            tokens += 1
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))


def tokens_of(output: Any) -> Any:
    """In transformers 4 layers give a tuple."""
    return output[0] if isinstance(output, tuple) else output


class TimmMaps(nn.Module):
    """A head of intermediate feature maps of a timm backbone."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.trunk = backbone
        self.head = nn.Conv2d(backbone.embed_dim, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        last, maps = self.trunk.forward_intermediates(x, indices=[0, 2], norm=True)
        return (self.head(maps[0] + maps[1]) + last[:, 1:].mean(),)


def on_dinov2(cls: type[nn.Module] = Head, **changed: Any) -> Any:
    import transformers

    return live(cls(transformers.Dinov2Model(backbone_config(**changed))))


def on_vit(cls: type[nn.Module] = Head) -> Any:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=2 * WIDTH,
        image_size=64,
        patch_size=8,
    )
    return live(cls(transformers.ViTModel(config)))


def on_registers() -> Any:
    import transformers

    values = backbone_config().to_dict()
    values.pop("model_type")
    config = transformers.Dinov2WithRegistersConfig(**values, num_register_tokens=2)
    return live(Head(transformers.Dinov2WithRegistersModel(config), 3))


def on_timm(cls: type[nn.Module] = TimmMaps) -> Any:
    import timm

    return live(cls(timm.create_model("test_vit", depth=3)))
