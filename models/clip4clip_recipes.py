"""Video towers on CLIP's image tower: their recipes, making them, and the checkpoints they take.

Layouts of checkpoints: OpenAI's (``visual.conv1.weight``), Transformers'
(``vision_model.embeddings...``), and that of the public training code of CLIP4Clip, TempMe and STOP
(``clip.visual.conv1.weight``), with TempMe's LoRA and frame positions. Imports no torch by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import FrameMerging, VideoOptions
from tome_export.models.loading import FileLoader, filled
from tome_export.models.recipe import CLIP_NORM, ClipSizes, Geometry, LoadedModel, Recipe
from tome_export.spec import VIDEO_FEATURES, Preprocessing
from tome_export.weights.files import Checkpoint, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

FRAMES = 12
"""Frames that the public training code of CLIP4Clip and TempMe samples on MSR-VTT."""

TEXT_PROMPTS = 8
"""Prompts of the text tower that STOP's table has in front: the public code's default."""

_POSITIONS = "frame_positions."
_POSITION = re.compile(r"transformer\.resblocks\.(\d+)\.TVPt_Video_Positional_embedding")
_LORA = re.compile(r"(transformer\.resblocks\.\d+\.attn\.)TVPt_LoRA_a")
# Buffers that the public code saves along.
_BUFFERS = ("position_ids", "input_resolution", "context_length", "vocab_size")
_TABLE, _ROWS = "unified_prompt_embedding.weight", "visual_prompt_embedding"

# Transformers' names behind ``vision_model.`` -> the tower's.
_HF_NAMES = {
    r"^embeddings\.class_embedding$": "class_embedding",
    r"^embeddings\.patch_embedding\.": "conv1.",
    r"^embeddings\.position_embedding\.weight$": "positional_embedding",
    r"^pre_layrnorm\.": "ln_pre.",
    r"^post_layernorm\.": "ln_post.",
    r"^encoder\.layers\.": "transformer.resblocks.",
    r"\.self_attn\.": ".attn.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
}
_HF_PACKED = re.compile(r"(.+\.attn)\.q_proj\.(weight|bias)")


def _tower_state(state: State, path: Path) -> State:
    """The video tower's tensors of a checkpoint of any layout, by the names that the tower has.

    A layout of none of these is returned as it is, for the comparison with the tower to name the
    difference.
    """
    if any(key.startswith("vision_model.") for key in state):
        return _from_hf(state)
    fronts = ("clip.visual.", "visual.")
    front = next((f for f in fronts if any(key.startswith(f) for key in state)), "")
    own: State = {}
    for key, value in state.items():
        name = key.removeprefix(front)
        if not key.startswith(front) or name in _BUFFERS:
            continue
        layer = _POSITION.fullmatch(name)
        if layer is None:
            own[name] = value
        else:
            own[f"{_POSITIONS}{layer[1]}"] = value.reshape(-1, value.shape[-1])
    return _folded(own, path)


def _stop_state(state: State, path: Path, frames: int, width: int) -> State:
    """STOP's tower likewise, the frames' prompts of every block made from what training keeps."""
    from tome_export.models.stop import PROMPTS, folded_prompts

    tower = _tower_state(state, path)
    front = "clip." if any(key.startswith("clip.") for key in state) else ""
    held = {key.removeprefix(front): value for key, value in state.items()}
    rows = held.get(_TABLE)
    if rows is not None and rows.shape[0] != TEXT_PROMPTS + PROMPTS * frames:
        have = (rows.shape[0] - TEXT_PROMPTS) / PROMPTS
        raise InputError(
            f"weights file {path} has prompts for {have:g} frames; expected {frames}, or give "
            f"--frames {have:g}"
        )
    if _ROWS in held and frames != 1:
        raise InputError(
            f"weights file {path} was trained with shared_latent_space=linear, whose public code "
            f"cannot run {frames} frames, only 1; expected a checkpoint of its default, "
            "transformer"
        )
    if "frame_prompts" not in tower and (rows is not None or _ROWS in held):
        tower["frame_prompts"] = folded_prompts(held, frames, width)
    return tower


def _folded(state: State, path: Path) -> State:
    """TempMe's LoRA, ``x A^T B^T`` beside ``x W^T`` on query, key and value: ``W + B A``."""
    folded = dict(state)
    for key in state:
        if key.endswith("TVPt_LoRA_b") and f"{key[:-1]}a" not in state:
            raise InputError(
                f"weights file {path} has {key} without its other half; expected both of a LoRA"
            )
        found = _LORA.fullmatch(key)
        if found is None:
            continue
        down, up = folded.pop(key), folded.pop(f"{found[1]}TVPt_LoRA_b", None)
        weight = folded.get(f"{found[1]}in_proj_weight")
        if up is None or weight is None:
            raise InputError(
                f"weights file {path} has {key} without its other half; expected both of a LoRA "
                "and the projection they change"
            )
        if down.ndim != 2 or up.shape != (weight.shape[0], down.shape[0]):
            raise InputError(
                f"weights file {path} has a LoRA of shapes {list(up.shape)} x {list(down.shape)} "
                f"for a projection of {list(weight.shape)}; expected the same outer sizes"
            )
        folded[f"{found[1]}in_proj_weight"] = weight.float() + up.float() @ down.float()
    return folded


def _from_hf(state: State) -> State:
    import torch

    found: State = {}
    for key, value in state.items():
        if key == "visual_projection.weight":
            found["proj"] = value.T
        name = key.removeprefix("vision_model.")
        if name == key or name == "embeddings.position_ids":
            continue
        for theirs, ours in _HF_NAMES.items():
            name = re.sub(theirs, ours, name)
        found[name] = value
    for packed in filter(None, map(_HF_PACKED.fullmatch, list(found))):
        names = [f"{packed[1]}.{part}_proj.{packed[2]}" for part in "qkv"]
        # A missing one is left to the comparison with the tower.
        if all(name in found for name in names):
            parts = [found.pop(name) for name in names]
            found[f"{packed[1]}.in_proj_{packed[2]}"] = torch.cat(parts)
    return found


@dataclass(frozen=True)
class Clip4ClipLoader(FileLoader):
    """Makes a video tower.

    Attributes:
        sizes: Of the image tower.
        frames: Frames of one video.
        merging: Where frames are joined: its frame positions are weights of the tower.
        prompts: Whether it is STOP's tower, and not the plain one.
    """

    sizes: ClipSizes = field(default_factory=ClipSizes)
    frames: int = 12
    merging: FrameMerging | None = None
    prompts: bool = False

    def create(self, depth: int | None = None) -> nn.Module:
        """See ``FileLoader``."""
        from tome_export.models.clip4clip import Clip4ClipTower
        from tome_export.models.stop import StopTower

        sizes, merging = replace(self.sizes, depth=depth or self.sizes.depth), self.merging
        if merging is not None:
            merging.check(sizes.depth, self.frames)
        positions = merging.clips_entering(self.frames) if merging and merging.position else {}
        made = StopTower if self.prompts else Clip4ClipTower
        return made(sizes, self.frames, positions)

    def from_file(self, recipe: Recipe, checkpoint: Checkpoint, depth: int | None) -> LoadedModel:
        """See ``FileLoader``."""
        module = self.create(depth)
        state, path = checkpoint.state, checkpoint.path
        if self.prompts:
            state = _stop_state(state, path, self.frames, self.sizes.width)
        else:
            state = _tower_state(state, path)
        stored = stored_dtype(state.values())
        state, remark = _with_positions(state, module)
        return filled(recipe, module, state, checkpoint, stored, remark)

    def download(self, recipe: Recipe) -> Path:
        """Refuse: there is no place to get these weights from."""
        raise InputError(
            f"{recipe.name} has no weights of its own to download; give the file of a CLIP or "
            "video retrieval checkpoint with --weights PATH, or try the toolchain with --weights "
            "random"
        )


def _with_positions(state: dict[str, Tensor], module: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The state with exactly the frame positions that the tower has, and a remark on it.

    Plain CLIP has none; TempMe's training starts from zero, so zero is what it would have.
    """
    own = module.state_dict()
    wanted = {key for key in own if key.startswith(_POSITIONS)}
    have = {key for key in state if key.startswith(_POSITIONS)}
    kept = {key: value for key, value in state.items() if key not in have - wanted}
    if not have:
        remark = "; no frame positions in it, zero taken" if wanted else ""
        return kept | {key: own[key] for key in sorted(wanted)}, remark
    return kept, "; its frame positions are left out" if have - wanted else ""


def _recipe(name: str, arch: str, patch: int) -> Recipe:
    return Recipe(
        name=name,
        family="clip4clip",
        preprocessing=Preprocessing((3, 224, 224), *CLIP_NORM, 1.0, "bicubic"),
        recommended_r=2,
        r_source="TempMe's published setting, ahead of the layers that join frames",
        output_name=VIDEO_FEATURES,
        description=f"CLIP4Clip's mean-pooling video tower on CLIP {arch}, {FRAMES} frames",
        weights_source="a file: CLIP's own, or of video retrieval training",
        licence="that of the file",
        loader=Clip4ClipLoader(ClipSizes(patch=patch), FRAMES),
        geometry=Geometry(768, 12, 3072, patch, head_macs=768 * 512),
        video=VideoOptions(FRAMES),
    )


def _stop_macs(width: int, side: int, patch: int) -> int:
    """MACs per video of what makes STOP's prompts; see ``stop_prompts`` for its sizes."""
    pixels, tokens = FRAMES * (side * patch) ** 2, FRAMES * side**2
    inside = (3 * 9 + 2 * 9 * 9 + 9 * 16) * 3 * 11**2 + 16 * 16 + 16 * 3 + 3 * 5 * 11**2
    between = 2 * 9 * 3 * 15 * 25 + 5 * 11**2
    attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    rows = FRAMES * width * (side**2 * 16 + 16 * 4)
    return pixels * inside + tokens * width * between + attention + rows


_STOP = replace(
    _recipe("stop_b32", "ViT-B/32", 32),
    family="stop",
    description=f"STOP's video tower with prompts on CLIP ViT-B/32, {FRAMES} frames",
    weights_source="a file of STOP's training",
    loader=Clip4ClipLoader(ClipSizes(patch=32), FRAMES, prompts=True),
    # The adapter beside the MLP is as a wider MLP.
    geometry=Geometry(
        768, 12, 3072 + 32, 32, prefix=5, shared=4, video_macs=_stop_macs(768, 7, 32) + 768 * 512
    ),
)

CLIP4CLIP = (
    _recipe("clip4clip_b32", "ViT-B/32", 32),
    _recipe("clip4clip_b16", "ViT-B/16", 16),
    _STOP,
)


def with_video(recipe: Recipe, options: VideoOptions) -> Recipe:
    """The recipe with what is asked of frames.

    Args:
        recipe: Of any model.
        options: Nothing given leaves the recipe as it is.

    Raises:
        UsageError: if anything is given for a model that takes no videos.
        InputError: if the frames cannot be joined as asked.
    """
    if options == VideoOptions():
        return recipe
    if recipe.video is None:
        raise UsageError(
            f"frames were given for {recipe.name}, which takes images; they are for video towers "
            "such as clip4clip_b32"
        )
    video = VideoOptions(options.frames or recipe.video.frames, options.merging)
    loader = recipe.loader
    if isinstance(loader, Clip4ClipLoader):
        loader = replace(loader, frames=video.frames or FRAMES, merging=video.merging)
        if video.merging is not None:
            video.merging.check(loader.sizes.depth, loader.frames)
    elif video.frames != recipe.video.frames:
        raise InputError(
            f"{video.frames} frames were asked of {recipe.name}, whose tower is made for "
            f"{recipe.video.frames}"
        )
    return replace(recipe, video=video, loader=loader)
