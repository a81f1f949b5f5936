"""Checkpoints that video towers take, by the names of the towers' tensors.

Layouts: OpenAI's (``visual.conv1.weight``), Transformers' (``vision_model.embeddings...``), and
that of the public training code of CLIP4Clip, TempMe and STOP (``clip.visual.conv1.weight``), with
TempMe's LoRA and frame positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.video.clip4clip import ClipBlock
from tome_export.video.options import HEAD_WIDTH
from tome_export.video.stop import PROMPTS

State = dict[str, Tensor]

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


def tower_state(state: State, path: Path) -> State:
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


def stop_state(state: State, path: Path, frames: int, width: int) -> State:
    """STOP's tower likewise, the frames' prompts of every block made from what training keeps."""
    tower = tower_state(state, path)
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


def with_positions(state: State, module: nn.Module) -> tuple[State, str]:
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


def folded_prompts(state: Mapping[str, Tensor], frames: int, width: int) -> Tensor:
    """The frames' prompts of every block, ``[depth, F, prompts, C]``, as training makes them.

    With a shared latent space of the kind ``transformer``, one block runs over the rows of an
    embedding table, text prompts first, for each block of the tower; with ``linear``, which the
    public code can only run on a single frame, that frame has the table's rows. The tensors have
    the public code's names, those of the whole CLIP, without ``clip.``.
    """
    if "visual_prompt_embedding" in state:
        table = state["visual_prompt_embedding"].float()
        rows = table.reshape(PROMPTS, -1, width).transpose(0, 1)
        return rows[:, None].expand(-1, frames, -1, -1).contiguous()
    table = state["unified_prompt_embedding.weight"].float()
    block = ClipBlock(width, max(1, width // HEAD_WIDTH))
    front = "PromptTransformer.resblocks.0."
    own = {key.removeprefix(front): v.float() for key, v in state.items() if key.startswith(front)}
    block.load_state_dict(own)
    rows = table.reshape(table.shape[0], -1, width).transpose(0, 1)
    with torch.no_grad():
        made: Tensor = block(rows)
    return made[:, -frames * PROMPTS :].reshape(-1, frames, PROMPTS, width).contiguous()
