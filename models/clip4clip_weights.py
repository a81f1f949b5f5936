"""Checkpoints of CLIP and of video retrieval to the tensors of a video tower.

Layouts: OpenAI's (``visual.conv1.weight``), Transformers' (``vision_model.embeddings...``), and
that of the public training code of CLIP4Clip, TempMe and STOP (``clip.visual.conv1.weight``), with
TempMe's LoRA and frame positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

_FRONTS = ("clip.visual.", "visual.")
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_LORA = re.compile(r"(transformer\.resblocks\.\d+\.attn\.)TVPt_LoRA_a")
_POSITION = "TVPt_Video_Positional_embedding"
# Buffers that the public code saves along.
_BUFFERS = ("position_ids", "input_resolution", "context_length", "vocab_size")

_TABLE, _ROWS = "unified_prompt_embedding.weight", "visual_prompt_embedding"

TEXT_PROMPTS = 8
"""Prompts of the text tower that STOP's table has in front: the public code's default."""

_HF_FRONT, _HF_PROJECTION = "vision_model.", "visual_projection.weight"
_HF_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_HF_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def tower_state(state: State, path: Path) -> State:
    """The video tower's tensors of a checkpoint, LoRA folded into the attention's projections.

    Args:
        state: What the file holds, in any of the layouts, text towers and all.
        path: The file, for messages.

    Returns:
        Tensors by the names that the tower has for them; a layout of none of these is returned as
        it is, for the comparison with the tower to name the difference.

    Raises:
        InputError: if one half of a LoRA is missing or the halves do not fit.
    """
    if any(key.startswith(_HF_FRONT) for key in state):
        return _from_hf(state)
    front = next((f for f in _FRONTS if any(key.startswith(f) for key in state)), "")
    own = {key.removeprefix(front): v for key, v in state.items() if key.startswith(front)}
    own = {key: value for key, value in own.items() if key not in _BUFFERS}
    return _positions(_folded(own, path))


def stop_state(state: State, path: Path, frames: int, width: int) -> State:
    """STOP's tower likewise, the frames' prompts of every block made from what training keeps.

    Args:
        state: What the file holds; that of a tower itself has the prompts ready.
        path: The file, for messages.
        frames: Frames of one video.
        width: C of the tokens.

    Raises:
        InputError: as ``tower_state``, and if the prompts are for another number of frames.
    """
    from tome_export.models.stop import PROMPTS, folded_prompts

    tower = tower_state(state, path)
    front = "clip." if any(key.startswith("clip.") for key in state) else ""
    whole = {key.removeprefix(front): value for key, value in state.items()}
    rows = whole.get(_TABLE)
    if rows is not None and rows.shape[0] != TEXT_PROMPTS + PROMPTS * frames:
        have = (rows.shape[0] - TEXT_PROMPTS) / PROMPTS
        raise InputError(
            f"weights file {path} has prompts for {have:g} frames; expected {frames}, or give "
            f"--frames {have:g}"
        )
    if "frame_prompts" not in tower and (rows is not None or _ROWS in whole):
        tower["frame_prompts"] = folded_prompts(whole, frames, width)
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
        front = found[1]
        down, up = folded.pop(key), folded.pop(f"{front}TVPt_LoRA_b", None)
        weight = folded.get(f"{front}in_proj_weight")
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
        folded[f"{front}in_proj_weight"] = weight.float() + up.float() @ down.float()
    return folded


def _positions(state: State) -> State:
    named: State = {}
    for key, value in state.items():
        layer = _LAYER.fullmatch(key)
        if layer is not None and layer[2] == _POSITION:
            named[f"frame_positions.{layer[1]}"] = value.reshape(-1, value.shape[-1])
        else:
            named[key] = value
    return named


def _from_hf(state: Mapping[str, Tensor]) -> State:
    import torch

    found: State = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key == _HF_PROJECTION:
            found["proj"] = value.T
        name = key.removeprefix(_HF_FRONT)
        if name == key or name == "embeddings.position_ids":
            continue
        layer = _HF_LAYER.fullmatch(name)
        if layer is None:
            found[_HF_NAMES.get(name, name)] = value
            continue
        front = f"transformer.resblocks.{layer[1]}."
        part = layer[2].removeprefix("self_attn.")
        if part in ("q_proj", "k_proj", "v_proj"):
            packed.setdefault(f"{front}attn.in_proj_{layer[3]}", {})[part] = value
        else:
            found[f"{front}{_HF_PARTS.get(layer[2], layer[2])}.{layer[3]}"] = value
    for name, parts in packed.items():
        # A missing one leaves the key out, and the comparison with the tower names it.
        if len(parts) == 3:
            found[name] = torch.cat([parts[p] for p in ("q_proj", "k_proj", "v_proj")])
    return found
