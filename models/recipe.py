"""What a recipe is: how to make one model, feed it, and merge it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.patch.heads import OutputChoice
    from tome_export.spec import Activation, Preprocessing, TowerOptions
    from tome_export.video.options import VideoOptions

OutputName = Literal["logits", "features", "video_features"]
WeightsKind = Literal["pretrained", "random", "file", "bundled", "function"]

DATA = Path(__file__).parent / "data"

Norm = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""

IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_NORM: Norm = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""That of CLIP's training images (arXiv 2103.00020's code)."""

TOKENS_FACTOR = 0.8
"""See ``recommended_r``."""

RULE = f"rule: floor({TOKENS_FACTOR} * tokens / depth)"
"""What recipes with that r name as its source."""


def recommended_r(tokens: int, depth: int) -> int:
    """The r for models without a published one: ``floor(0.8 * tokens / depth)``.

    It spends four fifths of the tokens over the depth. It is 13 for ViT-S/16 and ViT-B/16, as the
    ToMe authors publish for off-the-shelf weights, and at or below every other r they publish
    (ViT-L/16 7, ViT-L/16@384 23, SWAG B@384 45, L@512 40, H@518 40).

    Args:
        tokens: Tokens that enter the first block, prefix tokens included.
        depth: Number of blocks.
    """
    return int(TOKENS_FACTOR * tokens / depth) if depth else 0


class Loader(Protocol):
    """Makes the models of one library; a frozen dataclass per library."""

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the model; see ``Recipe.load``."""

    def architecture(self, recipe: Recipe) -> nn.Module:
        """The model without memory for its weights; see ``Recipe.architecture``."""


@dataclass(frozen=True)
class Geometry:
    """Sizes from which tokens and MACs of a plain ViT follow, for lists that import no torch.

    Attributes:
        width: Of a token.
        depth: Number of blocks.
        mlp: Width of the MLP's hidden layer.
        patch: Side of a patch in pixels.
        prefix: Class, distillation and register tokens.
        head_macs: MACs per image behind the blocks: projection or classifier.
        token_macs: MACs per final token behind the blocks, such as a projector's.
        shared: Tokens of a whole video that all its frames attend to, and that attend to all.
        video_macs: MACs per video outside the blocks that do not follow from its frames.
    """

    width: int
    depth: int
    mlp: int
    patch: int
    prefix: int = 1
    head_macs: int = 0
    token_macs: int = 0
    shared: int = 0
    video_macs: int = 0


@dataclass(frozen=True)
class Recipe:
    """How to make one model, feed it and merge it.

    Attributes:
        name: What ``resolve`` finds it by.
        family: For people: what kind of model it is, such as ``timm_vit``; ``custom`` for
            ``module:function``.
        timm_name: timm's architecture with the tag of its weights; empty for other libraries.
        timm_kwargs: Arguments of ``timm.create_model`` that differ from its defaults.
        preprocessing: How an image becomes ``pixel_values``.
        recommended_r: Tokens to merge per layer where the user names no schedule.
        loader: Makes the model.
        r_source: Where ``recommended_r`` comes from.
        prop_attn: Proportional attention (ToMe, eq. 1).
        output_name: ``logits`` of a classifier, ``features`` of a model without a head.
        output_note: Why it is the one or the other, where the model was looked at.
        activation: What makes scores of logits; None for the usual one of so many.
        description: One line for ``tome-export models``.
        weights_source: Where pretrained weights come from, and who made them.
        licence: Licence of the pretrained weights, as timm states it.
        labels: Class names, where they are not those of ``label_set``.
        label_set: timm's name of the label set, loaded only when asked for.
        aliases: Other names of the recipe.
        bundled: File name under ``models/data`` of weights that come with the package.
        geometry: Sizes of the model, where they do not follow from a name of timm's.
        tower: What a language model takes of it, nothing left open; None for any other model.
        needs_grid: Why only dense outputs fit the model's user; empty if all do.
        dense_only: Whether the model has no output for the whole image, only features of patches.
        video: Frames of one video and how they are joined; None for a model of images.
        reducer_keys: How the keys of a reducer's weights begin in a file that holds the model's
            too; only files of timm's models are read so.
        weights_key: Where in a weights file the model's are; empty for the rule of
            ``read_checkpoint``.
    """

    name: str
    preprocessing: Preprocessing
    recommended_r: int
    loader: Loader
    family: str = "timm_vit"
    timm_name: str = ""
    timm_kwargs: tuple[tuple[str, Any], ...] = ()
    r_source: str = ""
    prop_attn: bool = True
    output_name: OutputName = "logits"
    output_note: str = ""
    activation: Activation | None = None
    description: str = ""
    weights_source: str = ""
    licence: str = ""
    labels: tuple[str, ...] | None = None
    label_set: str | None = None
    aliases: tuple[str, ...] = ()
    bundled: str | None = None
    geometry: Geometry | None = None
    tower: TowerOptions | None = None
    needs_grid: str = ""
    dense_only: bool = False
    video: VideoOptions | None = None
    reducer_keys: tuple[str, ...] = ()
    weights_key: str = ""

    def load(
        self, weights: str = "pretrained", seed: int = 0, depth: int | None = None
    ) -> LoadedModel:
        """Make the model.

        Args:
            weights: ``pretrained``, ``random``, or the path of a .safetensors or .pth file.
            seed: Seed of random weights.
            depth: Number of blocks, to make a smaller model; not with pretrained weights.

        Returns:
            The model in eval mode, float32, on the CPU.

        Raises:
            InputError: if the weights cannot be had or do not fit.
        """
        if depth is not None and depth < 1:
            raise InputError(f"depth is {depth}; expected 1 or more blocks")
        if self.weights_key and weights in ("pretrained", "random"):
            raise InputError(
                f"a key of a weights file ({self.weights_key!r}) was given with {weights} weights; "
                "give the file with --weights PATH, or leave --weights-key out"
            )
        return self.loader.load(self, weights, seed, depth)

    def architecture(self) -> nn.Module:
        """The model without memory for its weights, to be counted and looked at."""
        return self.loader.architecture(self).eval()

    def giving(self, choice: OutputChoice) -> Recipe:
        """The recipe of a model whose output is taken for this."""
        name: OutputName = "logits" if choice.classifies else "features"
        return replace(self, output_name=name, output_note=choice.why)

    def scored_by(self, activation: Activation | None) -> Recipe:
        """The recipe with what a user says makes scores of its output; None leaves it as it is.

        Raises:
            InputError: if the output is none of an image.
        """
        if activation is None:
            return self
        if self.video is not None or self.tower is not None:
            raise InputError(
                f"activation {activation} was asked for {self.name}, which is a tower whose output "
                "is features; leave --activation out"
            )
        note = f"--activation {activation}"
        return replace(self, output_name="logits", output_note=note, activation=activation)

    def label_names(self, classes: int) -> tuple[str, ...] | None:
        """Names of the classes; None where they are not known, as for a fine-tuned head.

        Args:
            classes: Width of the model's output.
        """
        if self.labels is not None:
            return self.labels if len(self.labels) == classes else None
        if self.label_set is None or self.output_name != "logits":
            return None
        from timm.data import ImageNetInfo

        info: Any = ImageNetInfo(self.label_set)
        if len(info.label_names()) != classes:
            return None
        return tuple(info.index_to_description(i) for i in range(classes))


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights of a loaded model come from; goes into the artifact's manifest.

    Attributes:
        kind: ``random`` weights are never meant for use, and every report says so; those of a
            ``function`` are whatever the user's function made.
        source: For people: hub repository, file name, or how they were drawn.
        sha256: Of the weights file, where there is one.
        seed: Of random weights.
        stored_dtype: Type of the values in the weights file, narrower than float32 where it is
            half precision.
        key: Where in the file they are; empty if they are all that it holds.
    """

    kind: WeightsKind
    source: str
    sha256: str | None = None
    seed: int | None = None
    stored_dtype: str = "float32"
    key: str = ""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be patched.

    Attributes:
        module: In eval mode, float32, on the CPU, without gradients.
        recipe: What made it; ``output_name`` and ``activation`` are those of this model, also where
            a checkpoint brought a head of its own.
        weights: Where its weights come from.
        learned: Tensors of the file under ``recipe.reducer_keys``, by key.
    """

    module: nn.Module
    recipe: Recipe
    weights: WeightsInfo
    learned: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
