"""What a recipe is: how to make one model, feed it, and merge it. Imports no torch by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tome_export.errors import InputError
from tome_export.models.facts import Geometry, MergingAdvice, ModelOutput, rule_advice
from tome_export.models.positions import Grid, check_divides
from tome_export.spec import (
    Activation,
    ImageSize,
    InputForm,
    Preprocessing,
    default_activation,
)
from tome_export.video import VIDEO_FEATURES
from tome_export.video.options import VideoOptions
from tome_export.weights.files import (
    Checkpoint,
    check_finite,
    check_fit,
    read_checkpoint,
    sha256,
    stored_dtype,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.patch import MergedModel
    from tome_export.patch.heads import OutputChoice
    from tome_export.spec import TowerOptions

    State = dict[str, Tensor]

WeightsKind = Literal["pretrained", "random", "file", "bundled", "function"]


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights of a loaded model come from; goes into the artifact's manifest.

    Attributes:
        kind: ``random`` weights are never meant for use, and every report says so; those of a
            ``function`` are whatever the user's function made.
        source: For people: hub repository, file name, or how they were drawn.
        sha256: SHA-256 of the weights file, where there is one.
        seed: Seed of random weights.
        stored_dtype: Type of the values in the weights file, narrower than float32 where it is
            half precision.
        key: Where in the file they are; empty if they are all that it holds.
        resampled_from: Rows and columns of the patches that the positions in the file are for,
            where they were resampled for other ones.
    """

    kind: WeightsKind
    source: str
    sha256: str | None = None
    seed: int | None = None
    stored_dtype: str = "float32"
    key: str = ""
    resampled_from: Grid | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be patched.

    Attributes:
        module: The model in eval mode, float32, on the CPU, without gradients.
        recipe: What made it; its output is that of this model, also where a checkpoint brought a
            head of its own.
        weights: Where its weights come from.
        learned: A reducer's tensors that the file held too, by key.
    """

    module: nn.Module
    recipe: Recipe
    weights: WeightsInfo
    learned: Mapping[str, Tensor] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ModelSource:
    """What makes a model, where its pretrained weights are and who made them, and their licence."""

    loader: Loader
    weights: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Recipe:
    """How to make one model, feed it and merge it.

    Attributes:
        name: What ``resolve`` finds it by.
        family: The kind of model for people, such as ``timm_vit``; ``custom`` for user's models.
        description: One line for ``tome-export models``.
        aliases: Other names of the recipe.
        geometry: Sizes of the model; None where only the model itself knows them.
        tower: What a language model takes of it, nothing left open; None for any other model.
        video: Frames of one video and how they are joined; None for a model of images.
        image_size: Size of the images that was asked for; None for the model's own.
        advise: What is advised of r at another, square size, given tokens and depth.
    """

    name: str
    source: ModelSource
    preprocessing: Preprocessing
    merging: MergingAdvice
    output: ModelOutput
    family: str
    description: str = ""
    aliases: tuple[str, ...] = ()
    geometry: Geometry | None = None
    tower: TowerOptions | None = None
    video: VideoOptions | None = None
    image_size: ImageSize | None = None
    advise: Callable[[int, int], MergingAdvice] = field(default=rule_advice, compare=False)

    def load(
        self,
        weights: str = "pretrained",
        seed: int = 0,
        depth: int | None = None,
        *,
        weights_key: str = "",
        reducer_keys: tuple[str, ...] = (),
    ) -> LoadedModel:
        """Make the model: in eval mode, float32, on the CPU.

        Args:
            weights: ``pretrained``, ``random``, or the path of a .safetensors or .pth file.
            seed: Seed of random weights.
            depth: Number of blocks, to make a smaller model; not with pretrained weights.
            weights_key: Where in the file the model's weights are; empty for the rule of
                ``read_checkpoint``.
            reducer_keys: How the keys of a reducer's weights begin in the same file.

        Raises:
            InputError: if the weights cannot be had or do not fit.
        """
        if depth is not None and depth < 1:
            raise InputError(f"depth is {depth}; expected 1 or more blocks")
        if weights_key and weights in ("pretrained", "random"):
            raise InputError(
                f"a key of a weights file ({weights_key!r}) was given with {weights} weights; "
                "give the file with --weights PATH, or leave --weights-key out"
            )
        loader = self.source.loader
        if weights == "random":
            made = loader.random(self, seed, depth)
        elif weights == "pretrained":
            made = loader.pretrained(self, depth)
        else:
            made = loader.from_path(self, Path(weights), depth, weights_key, reducer_keys)
        return replace(made, recipe=loader.described(made.recipe, made.module))

    def at(self, image_size: ImageSize) -> Recipe:
        """The recipe of the same model for images of another size.

        Preprocessing follows it. What was published of r, or measured, holds for the size that it
        was measured at, so r is the rule's at another one.

        Raises:
            InputError: if the model's patches do not divide the size, or its library cannot make
                it for that size.
        """
        channels, *own = self.preprocessing.input_size
        size = (image_size.height, image_size.width)
        if size == tuple(own):
            return replace(self, image_size=image_size)
        loader = self.source.loader.at(image_size)
        grid = unmerged(f"{self.name} is", self.architecture())[0].patch_grid
        if grid is not None:
            check_divides(image_size, (grid.height, grid.width), self.name)
        merged, _ = unmerged(f"{self.name} at {image_size} is", loader.architecture())
        if merged.image_size[1:] != size:
            raise InputError(
                f"image size {image_size} was asked for {self.name}, whose library makes it for "
                "{}x{} all the same; leave --image-size out".format(*merged.image_size[1:])
            )
        layers = merged.layers
        advise = self.advise if image_size.height == image_size.width else rule_advice
        advice = advise(layers[0].tokens_in if layers else merged.prefix, len(layers))
        return replace(
            self,
            source=replace(self.source, loader=loader),
            preprocessing=replace(self.preprocessing, input_size=(channels, *size)),
            merging=replace(self.merging, r=advice.r, source=advice.source),
            description=f"{self.description}; here for images of {image_size}",
            geometry=None,
            image_size=image_size,
        )

    def architecture(self) -> nn.Module:
        """The model without memory for its weights, to be counted and looked at."""
        return self.source.loader.architecture().eval()

    def giving(self, choice: OutputChoice) -> Recipe:
        """The recipe of a model whose output is taken for this."""
        name = "logits" if choice.classifies else "features"
        return replace(self, output=replace(self.output, name=name, note=choice.why))

    def fed(self, form: InputForm) -> Recipe:
        """The recipe of a graph that takes pixel values in a form."""
        return replace(self, preprocessing=replace(self.preprocessing, form=form))

    def scored_by(self, activation: Activation | None) -> Recipe:
        """The recipe with what a user says makes scores of its output; None leaves it as it is."""
        if activation is None:
            return self
        if self.video is not None or self.tower is not None or self.output.is_map:
            what = "gives a map" if self.output.is_map else "is a tower whose output is features"
            raise InputError(
                f"activation {activation} was asked for {self.name}, which {what}; leave "
                "--activation out"
            )
        note = f"--activation {activation}"
        output = replace(self.output, name="logits", note=note, activation=activation)
        return replace(self, output=output)

    def activation(self, shape: tuple[int, ...]) -> Activation:
        """What makes scores of a classifier's output of this shape for one image."""
        if len(shape) != 1:
            raise InputError(
                f"{self.name} gives {list(shape)} for an image; expected one score for each class, "
                "leave --activation out"
            )
        found = self.output.activation or default_activation(shape[0])
        if found == "softmax" and shape == (1,):
            raise InputError(
                f"{self.name} gives one logit, whose softmax is 1 for every image; expected "
                "--activation sigmoid, or none for a regression"
            )
        return found


class Loader(ABC):
    """Makes the models of one library; each loader is a frozen dataclass."""

    timm_name: str = ""
    """timm's architecture with the tag of its weights; empty for other libraries."""

    @abstractmethod
    def create(self, depth: int | None = None) -> nn.Module:
        """The module, freshly initialised, with all its blocks or the first ``depth``."""

    @abstractmethod
    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """The model with the weights of a file; raises an ``InputError`` if they do not fit."""

    def at(self, image_size: ImageSize) -> Loader:
        """The loader of the same model for images of another size, its positions resampled.

        Raises:
            InputError: if there is no such model.
        """
        raise InputError(
            f"image size {image_size} was asked for a model of {type(self).__name__}, which is "
            "made for one size; leave --image-size out"
        )

    @property
    def own(self) -> Loader:
        """The loader of the model for its own image size."""
        return self

    def fitted(self, state: State, module: nn.Module) -> tuple[State, Grid | None]:  # noqa: ARG002
        """A state, by the names of a module of ``create``, whose positions are for its grid.

        Also rows and columns of the patches that they were resampled from; None if they were not.
        """
        return state, None

    def download(self, recipe: Recipe) -> Path:
        """The file of the pretrained weights; raises an ``InputError`` if there is none."""
        raise NotImplementedError(f"{type(self).__name__} of {recipe.name} has no file to download")

    def architecture(self) -> nn.Module:
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self.create()

    def random(self, recipe: Recipe, seed: int, depth: int | None = None) -> LoadedModel:
        """A model of random weights that all matter; torch's generator is left as it was."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.own.create(depth)
            wake_constants(module)
            if self.own is not self:
                # So that a seed gives the same weights at every size, but for the positions.
                sized = self.create(depth)
                sized.load_state_dict(self.fitted(module.state_dict(), sized)[0])
                module = sized
        return loaded(module, recipe, WeightsInfo("random", f"random, seed {seed}", seed=seed))

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:
        """The model with its pretrained weights; ``depth`` is refused."""
        refuse_depth(depth)
        made = self.from_file(recipe, read_checkpoint(self.download(recipe)), None)
        info = replace(made.weights, kind="pretrained", source=recipe.source.weights)
        return replace(made, weights=info)

    def from_path(
        self,
        recipe: Recipe,
        path: Path,
        depth: int | None = None,
        key: str = "",
        reducer_keys: tuple[str, ...] = (),
    ) -> LoadedModel:
        """The model with the weights of a file, and a reducer's tensors if it holds them."""
        checkpoint = read_checkpoint(path, key, self.counts())
        learned = {k: v for k, v in checkpoint.state.items() if k.startswith(reducer_keys)}
        state = {k: v for k, v in checkpoint.state.items() if k not in learned}
        made = self.from_file(recipe, replace(checkpoint, state=state), depth)
        return replace(made, learned=learned)

    def described(self, recipe: Recipe, module: nn.Module) -> Recipe:  # noqa: ARG002
        """The recipe with what only a model with its weights shows, such as its head."""
        return recipe

    def counts(self) -> list[str]:
        """Names of the model's own tensors of whole numbers."""
        return []


def refuse_depth(depth: int | None) -> None:
    """Refuse a number of blocks for weights that are for all of them."""
    if depth is not None:
        raise InputError(
            f"depth {depth} was asked with pretrained weights, which are for all blocks; "
            "use random weights or leave the depth"
        )


def loaded(module: nn.Module, recipe: Recipe, weights: WeightsInfo) -> LoadedModel:
    """The model as every later stage expects it: eval mode, float32, without gradients."""
    return LoadedModel(module.eval().float().cpu().requires_grad_(False), recipe, weights)


def wake_constants(module: nn.Module) -> None:
    """Give parameters that start out constant values that matter. Uses torch's global generator.

    A fresh model hides mistakes: a zero head answers zero whatever comes in, LayerScale at 1e-5
    switches every block off, class and register tokens are all but zero, and norm weights of one
    and biases of zero could be dropped unnoticed. So each parameter whose values lie within 1e-3
    of each other gets normal noise of standard deviation 0.02, and a LayerScale (``gamma``) is
    first set to 0.5, so that the blocks act on the tokens.
    """
    import torch

    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.numel() > 1 and value.max() - value.min() < 1e-3:
                if name.rpartition(".")[2].startswith("gamma"):
                    value.fill_(0.5)
                value.add_(torch.randn(value.shape) * 0.02)


def filled(
    recipe: Recipe,
    module: nn.Module,
    state: State,
    checkpoint: Checkpoint,
    stored: str = "",
    remark: str = "",
    resampled_from: Grid | None = None,
) -> LoadedModel:
    """The model with the tensors of a file, by the module's own names.

    ``stored`` is their dtype in the file, if ``state`` holds others too; ``remark`` is put behind
    the name of the file; ``resampled_from`` is the grid that positions were resampled from.
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
        resampled_from=resampled_from,
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


def unmerged(who: str, module: nn.Module) -> tuple[MergedModel, bool]:
    """A model as its family reads it, without merging, and whether only patches have features."""
    from tome_export.patch import NoImageOutputError, UnknownModelError, patch

    try:
        return patch(module, 0), False
    except NoImageOutputError:
        return patch(module, 0, dense=True), True
    except UnknownModelError as error:
        raise InputError(
            f"{who} a {type(module).__name__}, which has no sequence of tokens to merge that is "
            f"known here: {error}"
        ) from error


def recipe_from_model(
    name: str,
    source: ModelSource,
    preprocessing: Preprocessing,
    patched: tuple[MergedModel, bool],
    *,
    family: str,
    description: str,
    output: ModelOutput,
    prop_attn: bool = True,
    advise: Callable[[int, int], MergingAdvice] = rule_advice,
) -> Recipe:
    """A recipe whose r and kind of output are those of the model itself, see ``unmerged``.

    ``advise`` is asked for r with the tokens that enter the first block and the number of blocks.
    """
    merged, dense_only = patched
    layers, choice = merged.layers, merged.output_choice
    advice = advise(layers[0].tokens_in if layers else merged.prefix, len(layers))
    output = replace(output, dense_only=dense_only, note=choice.why)
    video = None
    if merged.takes_video:
        output, video = replace(output, name=VIDEO_FEATURES), VideoOptions(merged.input_size[0])
    elif merged.map_name is not None:
        output = replace(output, name=merged.map_name, is_map=True)
    elif not choice.classifies:
        output = replace(output, name="features")
    return Recipe(
        name=name,
        source=source,
        preprocessing=preprocessing,
        merging=replace(advice, prop_attn=prop_attn),
        output=output,
        family=family,
        description=description,
        video=video,
        advise=advise,
    )
