"""Small timm models with live weights, and images, for every area of the tests."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

ImageMaker = Callable[..., Any]
VitMaker = Callable[..., Any]

SMALL = {"img_size": 64, "patch_size": 8, "num_classes": 10}
"""64 patches of 8 x 8 pixels."""


def small_vit(
    name: str = "test_vit",
    *,
    seed: int = 0,
    small: bool = True,
    edit: Callable[[Any], None] = lambda _: None,
    **kwargs: Any,
) -> Any:
    """A timm model in eval mode, every parameter of which is drawn anew and matters.

    Values come from NumPy by the parameter's name, so that they do not hang on the order in which
    some version of timm makes its layers. Matrices have unit gain: at timm's initial 0.02 a narrow
    model's attention is uniform, and a lost log-size bias would hardly move the output.
    """
    import timm
    import torch

    model = timm.create_model(name, **{**(SMALL if small else {}), **kwargs})
    edit(model)
    with torch.no_grad():
        for parameter_name, value in model.named_parameters():
            rng = np.random.default_rng([seed, zlib.crc32(parameter_name.encode())])
            mean, std = _mean_and_std(parameter_name, tuple(value.shape))
            drawn = mean + std * rng.standard_normal(tuple(value.shape))
            value.copy_(torch.from_numpy(np.asarray(drawn)))
    return model.eval()


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("gamma"):
        return 0.5, 0.1
    if name.endswith("weight"):
        return (0.0, math.prod(shape[1:]) ** -0.5) if len(shape) > 1 else (1.0, 0.1)
    return 0.0, 0.5 if len(shape) > 1 else 0.1  # tokens and position embeddings; biases


@pytest.fixture
def make_vit() -> VitMaker:
    """See ``small_vit``."""
    return small_vit


@pytest.fixture
def make_images() -> ImageMaker:
    """``make(model, count)``: seeded float32 images ``[count, C, H, W]`` of a patched model."""

    def make(model: Any, count: int = 3, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((count, *model.input_size), dtype=np.float32)

    return make
