"""What the output of a model is, read from the modules that make it, and pooling by size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class OutputChoice(NamedTuple):
    """What the output of a library model is taken for.

    Attributes:
        classifies: Whether it is class scores, and not features.
        why: What of the model's structure or configuration says so.
    """

    classifies: bool
    why: str


def output_choice_from_heads(*heads: object) -> OutputChoice:
    """Class scores if a head has weights; features where it was taken off."""
    for head in heads:
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
            width = head_width(head)
            what = type(head).__name__ if width is None else f"{width} output{'s' * (width != 1)}"
            return OutputChoice(classifies=True, why=f"the model has a head of {what}")
    return OutputChoice(classifies=False, why="the model has no head")


def head_width(head: nn.Module) -> int | None:
    """Number of outputs of a head, by its last linear layer; None where it has none."""
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    return int(linear[-1].out_features) if linear else None


def mean_of_patches(x: Tensor, size: Tensor | None) -> Tensor:
    """The mean over tokens ``[B, C]`` of ``x [B, K, C]``, in which every patch counts once.

    ``size [B, K]`` has the patches that each token stands for; None where nothing is merged.
    """
    if size is None:
        return x.mean(dim=1)
    weight = size / size.sum(dim=1, keepdim=True)
    weight = weight.to(torch.promote_types(x.dtype, size.dtype))
    return (x.to(weight.dtype) * weight[..., None]).sum(dim=1).to(x.dtype)
