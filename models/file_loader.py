"""Making the models of a library whose pretrained weights are one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.models.recipe import LoadedModel, Recipe, WeightsInfo

if TYPE_CHECKING:
    from torch import Tensor, nn


class FileLoader(ABC):
    """Makes the models of one library; see ``Loader``. Each is a frozen dataclass."""

    @abstractmethod
    def create(self, depth: int | None = None) -> nn.Module:
        """The module, freshly initialised, with all its blocks or the first ``depth``."""

    @abstractmethod
    def from_file(self, recipe: Recipe, path: Path, depth: int | None) -> LoadedModel:
        """The model with the weights of a file.

        Raises:
            InputError: if the file cannot be read or its weights are not the model's.
        """

    @abstractmethod
    def download(self, recipe: Recipe) -> Path:
        """Find or fetch the file of the pretrained weights.

        Raises:
            InputError: if there is none to be had.
        """

    def architecture(self) -> nn.Module:
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self.create()

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the model; see ``Recipe.load``."""
        from tome_export.models.weights import random_model

        if weights == "random":
            return random_model(recipe, seed, lambda: self.create(depth))
        if weights != "pretrained":
            return self.from_file(recipe, Path(weights), depth)
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked with pretrained weights, which are for all blocks; "
                "use random weights or leave the depth"
            )
        made = self.from_file(recipe, self.download(recipe), None)
        info = replace(made.weights, kind="pretrained", source=recipe.weights_source)
        return LoadedModel(made.module, recipe, info)


def filled(
    recipe: Recipe,
    module: nn.Module,
    state: dict[str, Tensor],
    path: Path,
    stored: str = "",
    remark: str = "",
) -> LoadedModel:
    """The model with the tensors of a file.

    Args:
        recipe: What is made.
        module: Gets the tensors.
        state: By the module's own names.
        path: Where they come from.
        stored: Their dtype in the file, by its name, if ``state`` holds others too.
        remark: What a user should know of them, to be put behind the name of the file.

    Raises:
        InputError: if names or shapes are not those of the module.
    """
    from tome_export.models.weights import loaded
    from tome_export.weights.files import check_fit, sha256, stored_dtype

    check_fit(
        state,
        module.state_dict(),
        f"weights file {path} does not fit the model",
        "the checkpoint of this architecture",
    )
    module.load_state_dict(state, strict=True)
    info = WeightsInfo(
        "file",
        f"{path.name}{remark}",
        sha256(path),
        stored_dtype=stored or stored_dtype(state.values()),
    )
    return loaded(module, recipe, info)
