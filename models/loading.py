"""Making a recipe's model: what the loaders of all libraries share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.models.recipe import LoadedModel, Recipe, WeightsInfo
from tome_export.weights.files import (
    Checkpoint,
    check_finite,
    check_fit,
    read_checkpoint,
    sha256,
    stored_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def loaded(module: nn.Module, recipe: Recipe, weights: WeightsInfo) -> LoadedModel:
    """The model as every later stage expects it: eval mode, float32, without gradients."""
    return LoadedModel(module.eval().float().cpu().requires_grad_(False), recipe, weights)


def refuse_depth(depth: int | None) -> None:
    """Refuse a number of blocks for weights that are for all of them."""
    if depth is not None:
        raise InputError(
            f"depth {depth} was asked with pretrained weights, which are for all blocks; "
            "use random weights or leave the depth"
        )


def random_model(recipe: Recipe, seed: int, create: Callable[[], nn.Module]) -> LoadedModel:
    """A model of random weights that all matter; torch's generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create()
        wake_constants(module)
    return loaded(module, recipe, WeightsInfo("random", f"random, seed {seed}", seed=seed))


def wake_constants(module: nn.Module) -> None:
    """Give parameters that start out constant values that matter. Uses torch's global generator.

    A fresh model hides mistakes: a zero head answers zero whatever comes in, LayerScale at 1e-5
    switches every block off, class and register tokens are all but zero, and norm weights of one
    and biases of zero could be dropped unnoticed. So each parameter whose values lie within 1e-3
    of each other gets normal noise of standard deviation 0.02, and a LayerScale (``gamma``) is
    first set to 0.5, so that the blocks act on the tokens.

    Args:
        module: A freshly initialised model; changed in place.
    """
    import torch

    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.numel() > 1 and value.max() - value.min() < 1e-3:
                if name.rpartition(".")[2].startswith("gamma"):
                    value.fill_(0.5)
                value.add_(torch.randn(value.shape) * 0.02)


def split_learned(
    state: dict[str, Tensor], recipe: Recipe
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the model, and those of a reducer that are in the same file."""
    learned = {key: v for key, v in state.items() if key.startswith(recipe.reducer_keys)}
    return {key: value for key, value in state.items() if key not in learned}, learned


class FileLoader(ABC):
    """Makes the models of a library whose pretrained weights are one file; see ``Loader``.

    Each is a frozen dataclass.
    """

    @abstractmethod
    def create(self, depth: int | None = None) -> nn.Module:
        """The module, freshly initialised, with all its blocks or the first ``depth``."""

    @abstractmethod
    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """The model with the weights of a file; raises an ``InputError`` if they do not fit."""

    @abstractmethod
    def download(self, recipe: Recipe) -> Path:
        """The file of the pretrained weights; raises an ``InputError`` if there is none."""

    def architecture(self, recipe: Recipe) -> nn.Module:  # noqa: ARG002
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self.create()

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the model; see ``Recipe.load``."""
        if weights == "random":
            return random_model(recipe, seed, lambda: self.create(depth))
        if weights != "pretrained":
            checkpoint = read_checkpoint(Path(weights), recipe.weights_key)
            return self.from_file(recipe, checkpoint, depth)
        refuse_depth(depth)
        made = self.from_file(recipe, read_checkpoint(self.download(recipe)), None)
        info = replace(made.weights, kind="pretrained", source=recipe.weights_source)
        return replace(made, weights=info)


def filled(
    recipe: Recipe,
    module: nn.Module,
    state: dict[str, Tensor],
    checkpoint: Checkpoint,
    stored: str = "",
    remark: str = "",
) -> LoadedModel:
    """The model with the tensors of a file, by the module's own names.

    ``stored`` is their dtype in the file, if ``state`` holds others too; ``remark`` is put behind
    the name of the file.

    Raises:
        InputError: if names or shapes are not those of the module, values are not finite, or the
            file is of OpenAI's CLIP and the module has another activation than that.
    """
    path = checkpoint.path
    check_fit(
        state,
        module.state_dict(),
        f"weights file {path} does not fit the model",
        "the checkpoint of this architecture",
    )
    check_finite(state, f"weights file {path} has")
    _check_activation(module, checkpoint)
    module.load_state_dict(state, strict=True)
    info = WeightsInfo(
        "file",
        f"{checkpoint.source}{remark}",
        sha256(path),
        stored_dtype=stored or stored_dtype(state.values()),
        key=checkpoint.key,
    )
    return loaded(module, recipe, info)


def _check_activation(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse OpenAI's CLIP, trained with QuickGELU, in a tower that has none."""
    # Numbers that OpenAI's own code stores among the weights, and no later one.
    openai = {"input_resolution", "context_length", "vocab_size"} <= checkpoint.state.keys()
    if openai and not any(type(part).__name__.startswith("QuickGELU") for part in module.modules()):
        raise InputError(
            f"weights file {checkpoint.path} is OpenAI's CLIP, whose activation is QuickGELU; this "
            "architecture has another: name the one with quickgelu in its name, such as "
            "open_clip:ViT-B-32-quickgelu or timm:vit_base_patch32_clip_quickgelu_224"
        )
