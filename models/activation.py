"""What makes scores of a classifier's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.spec import Activation, default_activation

if TYPE_CHECKING:
    from tome_export.models import Recipe


def activation_of(recipe: Recipe, shape: tuple[int, ...]) -> Activation:
    """What makes scores of a classifier's output of this shape for one image.

    Raises:
        InputError: if they are no scores of an image, or a softmax of one logit.
    """
    if len(shape) != 1:
        raise InputError(
            f"{recipe.name} gives {list(shape)} for an image; expected one score for each class, "
            "leave --activation out"
        )
    found = recipe.activation or default_activation(shape[0])
    if found == "softmax" and shape == (1,):
        raise InputError(
            f"{recipe.name} gives one logit, whose softmax is 1 for every image; expected "
            "--activation sigmoid, or none for a regression"
        )
    return found
