"""Transformers' vision models: their recipes, and making them. Imports no torch by itself.

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
from tome_export.models.hf_checkpoint import (
    check_size,
    preprocessing_of,
    quiet,
    read_config,
    reason_of,
    refuse_quantised,
    vision_config,
)
from tome_export.models.recipe import (
    CLIP_NORM,
    HALF_NORM,
    IMAGENET_NORM,
    RULE,
    Geometry,
    LoadedModel,
    Norm,
    Recipe,
    WeightsInfo,
    recommended_r,
)
from tome_export.spec import Activation, Preprocessing
from tome_export.weights.files import (
    bare_name,
    check_finite,
    check_stored,
    misfit,
    read_checkpoint,
    sha256,
    stored_dtype,
)
from tome_export.weights.shards import tensors_from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
"""What is taken of models of images and text: the class by their model type."""

CLASSIFIERS = {"clip": "CLIPForImageClassification", "siglip": "SiglipForImageClassification"}
"""What is taken instead where a checkpoint says that it is one: image tower and classifier, which
are configured by the configuration of both halves."""

CLASSES = {
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": (
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    ),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
}
"""Model type to its classes, the bare model first."""

_NORMS = {"clip_vision_model": CLIP_NORM, "siglip_vision_model": HALF_NORM, "vit": HALF_NORM}
"""Mean and standard deviation that the models of a type were trained with, if not ImageNet's."""

_RESAMPLES = ("dinov2", "dinov2_with_registers")
"""Model types that the library itself resamples positions of, for images of any size."""

_UNUSED = ("embeddings.position_ids", "embeddings.mask_token")
# A classifier's checkpoint serves the bare model as well, a CLIP model's that without a
# projection, and so on: exactly these may be left over.
_HEADS = re.compile(
    r"(?:classifier|cls_classifier|distillation_classifier|visual_projection|pooler\.dense)"
    r"\.(?:weight|bias)"
)
_CLASSIFIER = re.compile(r"(?:classifier|cls_classifier|distillation_classifier)\.weight")
_POOLING_HEAD = re.compile(r"(?:vision_model\.)?head\..+")


def norm_of(model_type: str) -> Norm:
    """Mean and standard deviation of a model type's training images."""
    return _NORMS.get(model_type, IMAGENET_NORM)


def labels_of(config: Any) -> tuple[str, ...] | None:
    """Class names of a model's configuration; None where they are the library's placeholders."""
    given = config.id2label or {}
    names = tuple(str(given[key]) for key in sorted(given, key=int))
    return None if all(name.startswith("LABEL_") for name in names) else names


def activation_of(config: Any) -> Activation | None:
    """What makes scores of a classifier's logits, by its ``problem_type``, as in the library.

    Returns:
        None where it is a classifier of one class, or does not say: the usual one of so many.
    """
    kinds: dict[str, Activation] = {
        "regression": "none",
        "multi_label_classification": "sigmoid",
    }
    return kinds.get(str(config.problem_type))


@dataclass(frozen=True)
class HfLoader:
    """Makes a model of Transformers; see ``Loader``.

    Attributes:
        cls: The library's name of the class.
        values: Content of ``config.json``.
        source: Folder or hub name of the checkpoint.
        image_size: That of the images, where positions are to be resampled for it.
    """

    cls: str
    values: dict[str, Any]
    source: str
    image_size: int | None = None

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the model; see ``Recipe.load``."""
        import torch

        from tome_export.models.loading import loaded, random_model, refuse_depth

        if weights == "random":
            return random_model(recipe, seed, lambda: self._make(depth, self.image_size))
        refuse_depth(depth)
        # The library draws weights first, also where all are replaced.
        with torch.random.fork_rng(devices=[]):
            state, info = self._state(weights, recipe.weights_key)
            module = self._filled(state)
            # A bare model's class leaves the classifier of its checkpoint out: not in silence.
            own = {name.partition(".")[0] for name, _ in module.named_parameters()}
            heads = sorted({key.partition(".")[0] for key in state if _CLASSIFIER.fullmatch(key)})
            if left := ", ".join(head for head in heads if head not in own):
                remark = f"its {left} left out, as {self.cls} has none"
                info = replace(info, source=f"{info.source}; {remark}")
            return loaded(self._resampled(module), recipe, info)

    def architecture(self, recipe: Recipe | None = None) -> nn.Module:  # noqa: ARG002
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            made: nn.Module = self._make(image_size=self.image_size)
        return made

    @property
    def dense_only(self) -> bool:
        """Whether it has no pooling head, so that there are features of patches only."""
        headless = not getattr(self.config(), "vision_use_head", True)
        return self.cls == "SiglipVisionModel" and headless

    def config(self, depth: int | None = None, image_size: int | None = None) -> Any:
        """The library's configuration, with so many layers and of that image size if given."""
        from tome_export.patch.hf.base import check_attention

        config = vision_config(self.values, self.source)
        check_attention(config._attn_implementation, self.source)
        config.num_hidden_layers = depth or config.num_hidden_layers
        config.image_size = image_size or config.image_size
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

    def _make(self, depth: int | None = None, image_size: int | None = None) -> Any:
        config = self._whole(self.config(depth, image_size))
        with quiet() as transformers:
            # Its layers check their sizes with many classes of error.
            try:
                return getattr(transformers, self.cls)(config)
            except Exception as error:
                raise InputError(
                    f"config.json of {self.source} does not make a {self.cls} "
                    f"({reason_of(error)}); expected the configuration of a whole checkpoint"
                ) from None

    def _state(self, weights: str, weights_key: str) -> tuple[dict[str, Tensor], WeightsInfo]:
        """The vision model's tensors as its checkpoint has them, or another file."""
        from tome_export.models.hub import snapshot

        both = self.values["model_type"] in TOWERS or self.cls.startswith(("CLIP", "Siglip"))

        def own(key: str) -> str | None:
            key = bare_name(key).removeprefix("module.")
            text = both and key.startswith(("text_model.", "text_projection.", "logit_"))
            return None if text or key.endswith("embeddings.position_ids") else key

        if weights == "pretrained":
            folder = snapshot(self.source)
            state, names = tensors_from_folder(folder, own)
            source = ", ".join(f"{folder.name}/{name}" for name in names) or self.source
            digest = sha256(folder / names[0]) if len(names) == 1 else None
            info = WeightsInfo("pretrained", source, digest)
        else:
            file = read_checkpoint(Path(weights), weights_key)
            self._check_beside(file.path)
            state = {new: v for key, v in file.state.items() if (new := own(key))}
            info = WeightsInfo("file", file.source, sha256(file.path), key=file.key)
        if self.image_size not in (None, before := self.config().image_size):
            remark = f"position embedding resampled {before} -> {self.image_size} pixels"
            info = replace(info, source=f"{info.source}; {remark}")
        return state, replace(info, stored_dtype=stored_dtype(state.values()))

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

    def _filled(self, state: dict[str, Tensor]) -> Any:
        """The model with the tensors of a checkpoint: all of them, and of no other shapes."""
        import torch

        who = f"weights of {self.source}"
        check_stored(state, who)
        check_finite(state, f"{who} have")
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
        missing = (key for key in sorted(info["missing_keys"]) if not key.endswith(_UNUSED))
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

    def _resampled(self, module: Any) -> Any:
        """The model for another image size, its positions as the library resamples them."""
        import torch

        size = self.image_size
        if size in (None, self.config().image_size):
            return module
        resampled = self._make(image_size=size)
        base, other = (getattr(m, m.base_model_prefix, m) for m in (module, resampled))
        tokens = other.embeddings.position_embeddings.shape[1]
        with torch.no_grad():
            like = torch.empty(1, tokens, module.config.hidden_size)
            position = base.embeddings.interpolate_pos_encoding(like, size, size)
        state = module.state_dict()
        key = next(key for key in state if key.endswith("position_embeddings"))
        resampled.load_state_dict({**state, key: position})
        return resampled


def _named(
    name: str, loader: HfLoader, geometry: Geometry, description: str, by: str, licence: str
) -> Recipe:
    size = loader.values["image_size"]
    tokens = (size // geometry.patch) ** 2 + geometry.prefix
    norm = norm_of(loader.values["model_type"])
    return Recipe(
        name=name,
        family="hf_clip",
        preprocessing=Preprocessing((3, size, size), *norm, 1.0, "bicubic"),
        recommended_r=recommended_r(tokens, geometry.depth),
        r_source=RULE,
        output_name="features",
        description=description,
        weights_source=f"{by}; hub repository {loader.source}",
        licence=licence,
        loader=loader,
        geometry=geometry,
    )


def _clip(name: str, hub: str, title: str, geometry: Geometry, size: int = 224) -> Recipe:
    values = {
        "model_type": "clip_vision_model",
        "hidden_size": geometry.width,
        "intermediate_size": geometry.mlp,
        "num_hidden_layers": geometry.depth,
        "num_attention_heads": geometry.width // 64,
        "patch_size": geometry.patch,
        "image_size": size,
        "projection_dim": geometry.head_macs // geometry.width,
        "hidden_act": "quick_gelu",
    }
    loader = HfLoader(TOWERS["clip"], values, f"openai/clip-vit-{hub}")
    description = f"CLIP {title} of Transformers, image embeddings"
    return _named(name, loader, geometry, description, "OpenAI (CLIP)", "mit")


def _siglip_b16() -> Recipe:
    width, size, patch = 768, 224, 16
    values = {"model_type": "siglip_vision_model", "hidden_size": width}
    values |= {"image_size": size, "patch_size": patch}
    # The pooling's MLP and its projections of the probe, and of its keys and values per token;
    # the tokens of the list are counted with those that are left.
    pooling = 2 * width**2 + 2 * width * 4 * width
    return _named(
        "hf_siglip_b16",
        HfLoader(TOWERS["siglip"], values, "google/siglip-base-patch16-224"),
        Geometry(width, 12, 4 * width, patch, 0, pooling, 2 * width**2 + 2 * width),
        "SigLIP ViT-B/16 of Transformers, pooled image features, 196 patches",
        "Google (SigLIP)",
        "apache-2.0",
    )


_L14 = Geometry(1024, 24, 4096, 14, head_macs=1024 * 768)

HF = (
    _clip(
        "hf_clip_b32", "base-patch32", "ViT-B/32", Geometry(768, 12, 3072, 32, head_macs=768 * 512)
    ),
    _clip(
        "hf_clip_b16", "base-patch16", "ViT-B/16", Geometry(768, 12, 3072, 16, head_macs=768 * 512)
    ),
    _clip("hf_clip_l14", "large-patch14", "ViT-L/14", _L14),
    _clip("hf_clip_l14_336", "large-patch14-336", "ViT-L/14 at 336 pixels", _L14, 336),
    _siglip_b16(),
)
"""Recipes with a name; their sizes are those of the checkpoints' configurations."""


def recipe_from_hf(name: str, where: str, folder: Path) -> Recipe:
    """A recipe for ``hf:<folder>`` or ``hf:<name on the hub>``, its facts from the checkpoint.

    Of a model of images and text its image tower is taken.

    Args:
        name: What the user called it.
        where: Folder or name on the hub.
        folder: Where its ``config.json`` is.

    Raises:
        InputError: if there is no supported vision model in it.
    """
    from tome_export.patch import patch

    values = read_config(folder)
    loader = HfLoader(_class_of(values, where), values, where)
    full, tokens = _sizes(loader)
    kind, channels = str(full.model_type), int(full.num_channels)
    family = Preprocessing((channels, *_pair(full.image_size)), *norm_of(kind), 1.0, "bicubic")
    preprocessing, remark = preprocessing_of(folder, kind, family, where)
    if preprocessing.input_size != family.input_size:
        height, width = preprocessing.input_size[1:]
        if kind not in _RESAMPLES or height != width:
            check_size(preprocessing, family, folder, where)
        loader = HfLoader(loader.cls, values, where, height)
        tokens = _sizes(loader)[1]
    made: Any = loader.architecture()
    recipe = Recipe(
        name=name,
        family="hf_clip" if kind.endswith("_vision_model") else "hf_vit",
        preprocessing=preprocessing,
        recommended_r=recommended_r(tokens, int(full.num_hidden_layers)),
        r_source=RULE,
        activation=activation_of(made.config),
        description="; ".join(filter(None, (f"Transformers' {loader.cls}", remark))),
        weights_source=where,
        licence="not stated by the checkpoint",
        labels=labels_of(made.config),
        dense_only=loader.dense_only,
        loader=loader,
    )
    return recipe.giving(patch(made, 0, dense=True).output_choice)


def _class_of(values: dict[str, Any], where: str) -> str:
    """The library's name of the class to make of a ``config.json``."""
    refuse_quantised(values, where)
    kind = values.get("model_type")
    supported = ", ".join((*TOWERS, *CLASSES, "llava"))
    if kind not in (*TOWERS, *CLASSES):
        if not any(key in values for key in ("vision_config", "image_size", "patch_size")):
            raise InputError(
                f"{where} is a model of model type {kind!r} without a vision tower, so it has no "
                f"image tokens to merge; expected model type {supported}"
            )
        raise InputError(f"model type {kind!r} of {where} is not supported; supported: {supported}")
    names = values.get("architectures") or [""]
    found = names[0] if isinstance(names, list) else names
    if kind in TOWERS:
        return found if found == CLASSIFIERS[kind] else TOWERS[kind]
    found = found or CLASSES[kind][0]
    if found not in CLASSES[kind]:
        raise InputError(
            f"architecture {found} of {where} is not supported; supported: "
            f"{', '.join(CLASSES[kind])}"
        )
    return str(found)


def _sizes(loader: HfLoader) -> tuple[Any, int]:
    """The library's configuration, its defaults filled in, and the tokens of the first layer."""
    from tome_export.patch import patch

    model: Any = loader.architecture()
    merged = patch(model, 0, dense=True)
    config = getattr(model.config, "vision_config", model.config)
    return config, merged.layers[0].tokens_in if merged.layers else merged.prefix


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
