"""Making Transformers' vision models and loading their weights. Imports no torch by itself.

The library makes the model and brings checkpoints of all its versions into its present layout; of
a checkpoint of images and text only the image tower's tensors are read. Where the library would
draw weights at random, or leave some out, the checkpoint is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.models.hf.checkpoint import quiet, read_config, reason_of, vision_config
from tome_export.models.hub import weights_folder
from tome_export.models.positions import Grid, position_grid, resampling
from tome_export.models.recipe import (
    LoadedModel,
    Loader,
    Recipe,
    WeightsInfo,
    filled,
    loaded,
    refuse_depth,
)
from tome_export.spec import ImageSize
from tome_export.weights.files import (
    Checkpoint,
    bare_name,
    check_finite,
    check_stored,
    misfit,
    sha256,
    stored_dtype,
)
from tome_export.weights.shards import tensors_from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
"""What is taken of models of images and text: the class by their model type."""

CLASSIFIERS = {"clip": "CLIPForImageClassification", "siglip": "SiglipForImageClassification"}
"""What is taken instead where a checkpoint says that it is one: image tower and classifier, which
are configured by the configuration of both halves."""

_UNUSED = ("embeddings.position_ids", "embeddings.mask_token")
# A classifier's checkpoint serves the bare model as well, a CLIP model's that without a
# projection, and so on: exactly these may be left over.
_HEADS = re.compile(
    r"(?:classifier|cls_classifier|distillation_classifier|visual_projection|pooler\.dense)"
    r"\.(?:weight|bias)"
)
_CLASSIFIER = re.compile(r"(?:classifier|cls_classifier|distillation_classifier)\.weight")
_POSITIONS = re.compile(r"\bembeddings\.position_embeddings?(?:\.weight)?$")
_POOLING_HEAD = re.compile(r"(?:vision_model\.)?head\..+")


@dataclass(frozen=True)
class HfLoader(Loader):
    """Makes a model of Transformers.

    Attributes:
        cls: The library's name of the class.
        values: Content of ``config.json``.
        source: Folder or hub name of the checkpoint.
        image_size: Height and width of the images, where it is not that of ``values``.
    """

    cls: str
    values: dict[str, Any]
    source: str
    image_size: Grid | None = None

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``."""
        made: nn.Module = self._make(depth)
        if self.image_size is not None:
            from tome_export.patch.hf.positions import resample

            resample(made, self.image_size)
        return made

    def at(self, image_size: ImageSize) -> HfLoader:
        """See ``Loader``."""
        from tome_export.patch.hf.base import pair

        size = (image_size.height, image_size.width)
        return replace(self, image_size=None if size == pair(self.config().image_size) else size)

    @property
    def own(self) -> HfLoader:
        """See ``Loader``."""
        return self if self.image_size is None else replace(self, image_size=None)

    def fitted(
        self,
        state: State,
        module: nn.Module | None = None,  # noqa: ARG002
    ) -> tuple[State, Grid | None]:
        """See ``Loader``; the names may be those of any layout of the library."""
        key = next(iter(_positions(state)), None)
        if self.image_size is None or key is None:
            return state, None
        found, before = resampled_positions(self._make(depth=1), state[key], self.image_size)
        if found is None:
            return state, None
        return {**state, key: found.reshape(*state[key].shape[:-2], *found.shape)}, before

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        refuse_depth(depth)
        self._check_beside(checkpoint.path)
        state = {new: v for key, v in checkpoint.state.items() if (new := self._own(key))}
        info = WeightsInfo("file", checkpoint.source, sha256(checkpoint.path), key=checkpoint.key)
        return self._loaded(recipe, state, info)

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:
        """See ``Loader``."""
        refuse_depth(depth)
        folder = weights_folder(self.source)
        state, names = tensors_from_folder(folder, self._own)
        source = ", ".join(f"{folder.name}/{name}" for name in names) or self.source
        digest = sha256(folder / names[0]) if len(names) == 1 else None
        return self._loaded(recipe, state, WeightsInfo("pretrained", source, digest))

    @property
    def dense_only(self) -> bool:
        """Whether it has no pooling head, so that there are features of patches only."""
        headless = not getattr(self.config(), "vision_use_head", True)
        return self.cls == "SiglipVisionModel" and headless

    def config(self, depth: int | None = None) -> Any:
        """The library's configuration, with so many layers if given."""
        from tome_export.patch.hf.base import check_attention

        config = vision_config(self.values, self.source)
        check_attention(config._attn_implementation, self.source)
        config.num_hidden_layers = depth or config.num_hidden_layers
        return config

    def _whole(self, vision: Any) -> Any:
        """The configuration that the class is made of: of both halves for some classifiers."""
        if self.cls not in CLASSIFIERS.values():
            return vision
        given = {key: value for key, value in self.values.items() if key != "vision_config"}
        with quiet() as transformers:
            config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        config.vision_config = vision
        return config

    def _make(self, depth: int | None = None) -> Any:
        config = self._whole(self.config(depth))
        with quiet() as transformers:
            # Its layers check their sizes with many classes of error.
            try:
                return getattr(transformers, self.cls)(config)
            except Exception as error:
                raise InputError(
                    f"config.json of {self.source} does not make a {self.cls} "
                    f"({reason_of(error)}); expected the configuration of a whole checkpoint"
                ) from None

    def _own(self, key: str) -> str | None:
        """The vision model's name of a checkpoint's tensor; None for what is no part of it."""
        key = bare_name(key).removeprefix("module.")
        both = self.values["model_type"] in TOWERS or self.cls.startswith(("CLIP", "Siglip"))
        text = both and key.startswith(("text_model.", "text_projection.", "logit_"))
        return None if text or key.endswith("embeddings.position_ids") else key

    def _check_beside(self, weights: Path) -> None:
        """Refuse a file whose config.json says another activation, which no tensor shows."""
        if not weights.with_name("config.json").is_file():
            return
        values = read_config(weights.parent)
        vision = values.get("vision_config", values)
        theirs = vision.get("hidden_act") if isinstance(vision, dict) else None
        ours = self.config().hidden_act
        if isinstance(theirs, str) and theirs != ours:
            raise InputError(
                f"config.json beside {weights} says hidden_act {theirs!r}, but {self.source} has "
                f"{ours!r}; build hf:{weights.parent}"
            )

    def _loaded(self, recipe: Recipe, state: State, info: WeightsInfo) -> LoadedModel:
        import torch

        who = f"weights of {self.source}"
        check_stored(state, who)
        check_finite(state, f"{who} have")
        source, stored = info.source, stored_dtype(state.values())
        # The library draws weights first, also where all are replaced.
        with torch.random.fork_rng(devices=[]):
            fitted, before = self.fitted(state)
            # Those of another size are none that the library could read.
            positions = [] if fitted is state else [fitted.pop(key) for key in _positions(state)]
            module = self._filled(fitted, who, positions)
            if positions and self.image_size is not None:
                from tome_export.patch.hf.positions import fit, grid_of

                fit(module, positions[0].reshape(-1, positions[0].shape[-1]), self.image_size)
                source += resampling(before, grid_of(module))
            # A bare model's class leaves the classifier of its checkpoint out: not in silence.
            own = {name.partition(".")[0] for name, _ in module.named_parameters()}
            heads = {key.partition(".")[0] for key in state if _CLASSIFIER.fullmatch(key)}
            if left := ", ".join(sorted(heads - own)):
                source += f"; its {left} left out, as {self.cls} has none"
            info = replace(info, source=source, stored_dtype=stored, resampled_from=before)
            return loaded(module, recipe, info)

    def _filled(self, state: State, who: str, positions: list[Tensor]) -> Any:
        """The model with the tensors of a checkpoint: all of them, and of no other shapes.

        Its positions are zero where they come from elsewhere.
        """
        import torch

        config, extra = self._whole(self.config()), {}
        pooled = any(key.endswith("pooler.dense.weight") for key in state)
        if self.cls in ("ViTModel", "DeiTModel") and not pooled:
            extra["add_pooling_layer"] = False
        with quiet() as transformers:
            # Shapes that differ are listed with the rest instead of ending in an error of its own.
            try:
                module, info = getattr(transformers, self.cls).from_pretrained(
                    None,
                    config=config,
                    state_dict=state,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **extra,
                )
            except Exception as error:
                raise InputError(
                    f"{who} do not fit its config.json ({reason_of(error)}); expected the whole "
                    "checkpoint of this architecture"
                ) from None
        absent = [key for key in sorted(info["missing_keys"]) if not key.endswith(_UNUSED)]
        missing = (key for key in absent if not (positions and _POSITIONS.search(key)))
        unexpected = (key for key in sorted(info["unexpected_keys"]) if not self._spare(key))
        wrong = {key: (got, want) for key, got, want in sorted(info["mismatched_keys"])}
        if text := misfit(missing, unexpected, wrong):
            raise InputError(
                f"{who} do not fit its config.json: {text}; expected the whole checkpoint of this "
                "architecture"
            )
        for key in info["missing_keys"]:
            module.get_parameter(key).data.zero_()
        return module

    def _spare(self, key: str) -> bool:
        head = self.dense_only and _POOLING_HEAD.fullmatch(key)
        return key.endswith(_UNUSED) or bool(_HEADS.fullmatch(key) or head)


def _positions(state: State) -> list[str]:
    """Name of the position embedding in a state; none if it has none."""
    return [key for key in state if _POSITIONS.search(key)][:1]


def resampled_positions(
    own: nn.Module, stored: Tensor, size: Grid
) -> tuple[Tensor | None, Grid | None]:
    """Positions ``[N, C]`` for images of a size, of those that a checkpoint stores for any.

    Also the grid that the library resampled them from, None if they are for that size already.
    They are None where it cannot be told which grid they are for.

    Args:
        own: A model of the library for its own size, which is of no other use afterwards.
        stored: ``[..., N, C]``, those of prefix tokens in front.
        size: Height and width of the images.
    """
    from tome_export.patch.hf.positions import grid_of, interpolated, positions_of

    native, grid, wanted = positions_of(own), grid_of(own), grid_of(own, size)
    if stored.ndim < 2 or stored.shape[-1] != native.shape[1]:
        return None, None
    found = stored.float().reshape(-1, native.shape[1])
    prefix = len(native) - grid[0] * grid[1]
    before = position_grid(len(found) - prefix, grid, wanted)
    if before in (None, wanted):
        return None if before is None else found, None
    return interpolated(own, found, before, size), before


@dataclass(frozen=True)
class SaliencyLoader(HfLoader):
    """Makes a ``SaliencyModel``, whose tensors are named ``backbone.…`` and ``decoder.…``.

    Attributes:
        channels: See ``SaliencyDecoder``.
    """

    channels: tuple[int, int, int] = (256, 128, 64)

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``Loader``."""
        return self._with_decoder(super().create(depth), self._decoder())

    def random(self, recipe: Recipe, seed: int, depth: int | None = None) -> LoadedModel:
        """See ``Loader``; the decoder's norms know what they see, else its map would be flat."""
        import torch

        made = super().random(recipe, seed, depth)
        decoder: Any = made.module.decoder
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for norm in (decoder.bn1, decoder.bn2, decoder.bn3):
                norm.momentum = 1.0
            decoder.train()(torch.randn(8, self.config().hidden_size, 8, 8))
        decoder.eval()
        return made

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``Loader``."""
        from torch.nn import ModuleDict

        tower, decoder = {}, {}
        for key, value in checkpoint.state.items():
            if key.startswith("decoder."):
                decoder[key] = value
            else:
                tower[key.removeprefix("backbone.")] = value
        made = super().from_file(recipe, replace(checkpoint, state=tower), depth)
        # By the names of the file, which a message repeats.
        named: Any = ModuleDict({"decoder": self._decoder()})
        filled(recipe, named, decoder, checkpoint)
        return loaded(self._with_decoder(made.module, named.decoder), recipe, made.weights)

    def pretrained(self, recipe: Recipe, depth: int | None = None) -> LoadedModel:  # noqa: ARG002
        """Refused: there is no place to get the file from, only a script that makes it."""
        raise InputError(
            f"{recipe.name} has no weights to download; make them with python "
            "scripts/trained_dinov2.py OUT and give --weights OUT/saliency.safetensors, or try the "
            "toolchain with --weights random"
        )

    def _decoder(self) -> nn.Module:
        from tome_export.models.hf.saliency import SaliencyDecoder

        return SaliencyDecoder(self.config().hidden_size, self.channels)

    def _with_decoder(self, backbone: nn.Module, decoder: nn.Module) -> nn.Module:
        from tome_export.models.hf.saliency import SaliencyModel

        return SaliencyModel(backbone, decoder)
