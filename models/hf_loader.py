"""Making a Transformers vision model: only its own tensors are read from a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, MissingComponentError
from tome_export.models.hf_config import RESAMPLES, HfConfig
from tome_export.models.hf_values import reason_of
from tome_export.models.recipe import LoadedModel, Recipe, WeightsInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

_WRAPPERS = re.compile(
    r"^(?:module\.)?(?:(?:vision_model|vit|deit|dinov2|dinov2_with_registers)\.)+"
)
# Names of transformers 4 -> those of 5, in the order to apply them.
_NEWER = (
    (re.compile(r"^encoder\.layer\."), "layers."),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), r".attention.\1_proj."),
    (re.compile(r"\.attention\.(q|k|v)(?:uery|ey|alue)_proj\."), r".attention.\1_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"^(layers\.\d+)\.output\.dense\."), r"\1.mlp.fc2."),
    (re.compile(r"\.mlp\.weights_out\."), ".mlp.down_proj."),
)
_VISION = re.compile(
    r"(?:embeddings|encoder|layers|pre_layrnorm|post_layernorm|layernorm|head|pooler|classifier"
    r"|cls_classifier|distillation_classifier|visual_projection)\."
)
_HEADS = frozenset(
    f"{name}.{part}"
    for name in (
        "classifier",
        "cls_classifier",
        "distillation_classifier",
        "pooler.dense",
        "visual_projection",
    )
    for part in ("weight", "bias")
)
_UNUSED = ("embeddings.position_ids", "embeddings.mask_token")


def canonical(key: str) -> str:
    """One name for a tensor in all layouts: that of transformers 5, without wrappers."""
    key = _WRAPPERS.sub("", key)
    for pattern, replacement in _NEWER:
        key = pattern.sub(replacement, key)
    return key


@dataclass(frozen=True)
class HfLoader:
    """Makes a model of Transformers; see ``Loader``.

    Attributes:
        config: The model.
        source: Folder or hub name of the checkpoint.
        image_size: That of the images, where positions are to be resampled for it.
    """

    config: HfConfig
    source: str
    image_size: int | None = field(default=None)

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the model; see ``Recipe.load``."""
        import torch

        from tome_export.models.weights import loaded, wake_constants

        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module = self._make(depth)
                wake_constants(module)
                module = self._resampled(module)[0]
            info = WeightsInfo("random", f"random, seed {seed}", seed=seed)
            return loaded(module, recipe, info)
        if depth is not None:
            raise InputError(
                f"depth {depth} was asked of {recipe.name} with its own weights, which are for "
                "all layers; use random weights or leave the depth"
            )
        # The library draws weights first, also where all are replaced.
        with torch.random.fork_rng(devices=[]):
            module, info = self._filled(weights)
            module, remark = self._resampled(module)
        source = f"{info.source}; {remark}" if remark else info.source
        info = WeightsInfo(info.kind, source, info.sha256, stored_dtype=info.stored_dtype)
        return loaded(module, recipe, info)

    def architecture(self) -> nn.Module:
        """The model without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._make(image_size=self.image_size)

    def _make(
        self, depth: int | None = None, pooler: bool = True, image_size: int | None = None
    ) -> Any:
        from tome_export.patch.hf import check_attention

        transformers = library()
        check_attention(self.config.attention or "sdpa", self.source)
        arguments = dict(self.config.arguments)
        if depth is not None:
            arguments["num_hidden_layers"] = depth
        if image_size is not None:
            arguments["image_size"] = image_size
        cls = getattr(transformers, self.config.cls)
        extra = {} if pooler else {"add_pooling_layer": False}
        # The library checks configurations, and its layers their sizes, with many classes of error.
        try:
            config = cls.config_class(**arguments)
            config._attn_implementation = self.config.attention or "sdpa"
            return cls(config, **extra)
        except Exception as error:
            raise InputError(
                f"config.json of {self.source} does not make a {self.config.cls} "
                f"({reason_of(error)}); "
                "expected the configuration of a whole checkpoint"
            ) from None

    def _filled(self, weights: str) -> tuple[Any, WeightsInfo]:
        """The model with the tensors of its checkpoint, or of another file."""
        from tome_export.models.hf_files import snapshot
        from tome_export.models.hf_weights import fill
        from tome_export.weights.files import read_state, sha256
        from tome_export.weights.shards import pick

        def rename(key: str) -> str | None:
            name = canonical(key)
            ours = _WRAPPERS.match(key) or _VISION.match(name)
            return name if ours and not name.endswith(_UNUSED) else None

        if weights == "pretrained":
            folder = snapshot(self.source)
            state, names = pick(folder, rename)
            source = ", ".join(f"{folder.name}/{name}" for name in names)
            digest = sha256(folder / names[0]) if len(names) == 1 else None
            kind: Any = "pretrained"
        else:
            path = Path(weights)
            state = {new: v for key, v in read_state(path).items() if (new := rename(key))}
            source, digest, kind = path.name, sha256(path), "file"
        bare_vit = self.config.cls in ("ViTModel", "DeiTModel")
        module = self._make(pooler=not bare_vit or "pooler.dense.weight" in state)
        names_of = _names(module, state, self.config)
        optional = [name for name in names_of if name.endswith(_UNUSED)]
        stored = fill(module, state, names_of, self.source, optional)
        return module, WeightsInfo(kind, source or self.source, digest, stored_dtype=stored)

    def _resampled(self, module: Any) -> tuple[Any, str]:
        """The model for another image size, its positions as the library resamples them."""
        import torch

        size = self.image_size
        before = module.config.image_size
        if size is None or before == size or self.config.model_type not in RESAMPLES:
            return module, ""
        depth = module.config.num_hidden_layers
        resampled = self._make(depth, image_size=size)
        base, other = (getattr(m, m.base_model_prefix, m) for m in (module, resampled))
        tokens = other.embeddings.position_embeddings.shape[1]
        with torch.no_grad():
            like = torch.empty(1, tokens, module.config.hidden_size)
            position = base.embeddings.interpolate_pos_encoding(like, size, size)
        state = module.state_dict()
        key = next(key for key in state if key.endswith("position_embeddings"))
        resampled.load_state_dict({**state, key: position})
        return resampled, f"position embedding resampled {before} -> {size} pixels"


def library() -> Any:
    """Transformers.

    Raises:
        MissingComponentError: if it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingComponentError(
            "hf: models need Transformers, which is not installed; install it with "
            "pip install 'tome-export[hf]'"
        ) from None
    return transformers


def _names(module: Any, state: State, config: HfConfig) -> dict[str, str]:
    """The module's names by those of its checkpoint, whose tensors are brought into its form."""
    names = {canonical(key): key for key in module.state_dict()}
    _swiglu(state, names)
    # A classifier's checkpoint serves the bare model as well, a CLIP model's that without a
    # projection, and so on: exactly these may be left over.
    spare = [name for name in state if name not in names and name in _HEADS]
    if config.dense_only:
        spare += [name for name in state if name not in names and name.startswith("head.")]
    for name in spare:
        del state[name]
    return names


def _swiglu(state: State, wanted: dict[str, str]) -> None:
    """Gate and up projection are one matrix in transformers 4 and checkpoints, two in 5."""
    import torch

    for name in [name for name in state if ".mlp.weights_in." in name]:
        gate, up = (name.replace("weights_in", part) for part in ("gate_proj", "up_proj"))
        if gate in wanted:
            state[gate], state[up] = (part.clone() for part in state.pop(name).chunk(2))
    for name in [name for name in wanted if ".mlp.weights_in." in name and name not in state]:
        gate, up = (name.replace("weights_in", part) for part in ("gate_proj", "up_proj"))
        if gate in state and up in state:
            state[name] = torch.cat([state.pop(gate), state.pop(up)])
