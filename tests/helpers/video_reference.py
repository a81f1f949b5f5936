"""An independent reading of TempMe and STOP with ToMe: plain PyTorch, loops, one video at a time.

Written from the papers and the issue's text. Shares no code with the package; a plan is a list of
groups of token indices, so nothing of the package's encoding is taken over either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Group = list[int]


@dataclass
class Merging:
    """Parameters by the names of the public code; layers=() never joins frames."""

    r: int = 2
    layers: tuple[int, ...] = (8, 9, 10)
    frame_nums: tuple[int, ...] = (2, 2, 3)
    inter: float = 0.3
    intra: float = 0.1
    frame_pos: bool = True
    prop_attn: bool = True


@dataclass
class Record:
    """Groups of one merge, per clip of each video: ``groups[video][clip]``."""

    layer: int
    cross: bool
    groups: list[list[list[Group]]] = field(default_factory=list)


@dataclass
class Clip:
    """Tokens of one clip, how many patches each stands for, and how many in front are protected."""

    x: Tensor
    size: Tensor
    protected: int


def soft_matching(metric: Tensor, r: int, protected: int) -> list[Group]:
    """Groups of token indices in output order: protected, what stays of A by position, then B."""
    a_tokens = [i for i in range(len(metric)) if i % 2 == 0 and i >= protected]
    b_tokens = [i for i in range(len(metric)) if i % 2 == 1 and i >= protected]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = {}
    for a in a_tokens:
        score, target = -math.inf, -1
        for b in b_tokens:
            found = float(unit[a] @ unit[b])
            if found > score:
                score, target = found, b
        best[a] = (score, target)
    ranked = sorted(a_tokens, key=lambda a: -best[a][0])
    merged = set(ranked[:r])
    groups = [[i] for i in range(protected)]
    groups += [[a] for a in a_tokens if a not in merged]
    groups += [[b, *(a for a in ranked[:r] if best[a][1] == b)] for b in b_tokens]
    return groups


def average(clip: Clip, groups: list[Group]) -> Clip:
    """Every group becomes its mean, weighted by size."""
    rows, sizes = [], []
    for group in groups:
        total = sum(clip.size[i] for i in group)
        rows.append(sum(clip.size[i] * clip.x[i] for i in group) / total)
        sizes.append(total)
    return Clip(torch.stack(rows), torch.stack(sizes), clip.protected)


def joined(clips: list[Clip]) -> Clip:
    """Neighbouring clips as one: all their protected tokens first, then the rest."""
    front = [c.x[: c.protected] for c in clips] + [c.x[c.protected :] for c in clips]
    sizes = [c.size[: c.protected] for c in clips] + [c.size[c.protected :] for c in clips]
    return Clip(torch.cat(front), torch.cat(sizes), sum(c.protected for c in clips))


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(
    state: dict[str, Tensor], name: str, queries: Tensor, context: Tensor, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[Q, C]`` and mean key over heads ``[N, D]``; log(size) of the context is added."""
    width = queries.shape[-1]
    heads = max(1, width // 64)
    weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
    q = queries @ weight[:width].T + bias[:width]
    k = context @ weight[width : 2 * width].T + bias[width : 2 * width]
    v = context @ weight[2 * width :].T + bias[2 * width :]
    out, keys, d = [], 0, width // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        logits = q[:, part] @ k[:, part].T / math.sqrt(d)
        if size is not None:
            logits = logits + size.log()
        out.append(logits.softmax(-1) @ v[:, part])
        keys = keys + k[:, part] / heads
    out = torch.cat(out, -1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]
    return out, keys


def mlp(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = x @ state[f"{name}.c_fc.weight"].T + state[f"{name}.c_fc.bias"]
    hidden = hidden / (1 + (-1.702 * hidden).exp())
    return hidden @ state[f"{name}.c_proj.weight"].T + state[f"{name}.c_proj.bias"]


def embed(state: dict[str, Tensor], frame: Tensor) -> Tensor:
    """One frame ``[3, H, W]`` to its class token and patches, behind ln_pre."""
    weight = state["conv1.weight"]
    p = weight.shape[-1]
    rows = [state["class_embedding"]]
    for top in range(0, frame.shape[1] - p + 1, p):
        for left in range(0, frame.shape[2] - p + 1, p):
            patch = frame[:, top : top + p, left : left + p]
            rows.append((weight * patch).sum((1, 2, 3)))
    return layer_norm(torch.stack(rows) + state["positional_embedding"], state, "ln_pre")


def depth_of(state: dict[str, Tensor]) -> int:
    return 1 + max(int(k.split(".")[2]) for k in state if k.startswith("transformer.resblocks"))


def wanted_cross(n: int, c: int, f: int, inter: float) -> int:
    """r0 for clips of n tokens, c of them protected, f at a time."""
    return min((n - c) * f // 2, int(n * f * inter))


def wanted_intra(n: int, c: int, f: int, r0: int, intra: float) -> int:
    """r1 likewise, behind r0."""
    return min(((n - c) * f - r0) // 2, int((n * f - r0) * intra))


def token_counts(tokens: int, frames: int, depth: int, m: Merging, protected: int = 1) -> list[Any]:
    """(clips, tokens per clip in attention, tokens per clip behind it) of each layer."""
    counts, clips, n, c = [], frames, tokens, protected
    nums = list(m.frame_nums)
    for layer in range(depth):
        if layer in m.layers:
            f = nums.pop(0)
            r0 = wanted_cross(n, c, f, m.inter)
            r1 = wanted_intra(n, c, f, r0, m.intra)
            clips, seen = clips // f, n * f - r0
            c *= f
        else:
            seen = n
            early = not m.layers or layer < m.layers[0]
            r1 = min((n - c) // 2, m.r) if early else wanted_intra(n, c, 1, 0, m.intra)
        n = seen - r1
        counts.append((clips, seen, n))
    return counts


def tempme(
    state: dict[str, Tensor], pixel_values: Tensor, video_mask: Tensor, m: Merging
) -> tuple[Tensor, list[Record]]:
    """TempMe's video tower on ``[B, F, 3, H, W]``: features ``[B, E]`` and every plan."""
    state = {k: v.double() for k, v in state.items()}
    records: dict[tuple[int, bool], Record] = {}
    features = []
    for video, mask in zip(pixel_values.double(), video_mask.double(), strict=True):
        clips = []
        for frame in video:
            x = embed(state, frame)
            clips.append(Clip(x, torch.ones(len(x), dtype=torch.float64), 1))
        nums = list(m.frame_nums)
        for layer in range(depth_of(state)):
            f = nums.pop(0) if layer in m.layers else 1
            clips = _tempme_layer(state, layer, clips, f, m, records)
        classes = torch.cat([c.x[: c.protected] for c in clips])
        out = layer_norm(classes, state, "ln_post") @ state["proj"]
        out = out / out.norm(dim=-1, keepdim=True)
        count = float(mask.sum()) or 1.0
        features.append((out * mask[:, None]).sum(0) / count)
    return torch.stack(features), list(records.values())


def _tempme_layer(
    state: dict[str, Tensor],
    layer: int,
    clips: list[Clip],
    f: int,
    m: Merging,
    records: dict[tuple[int, bool], Record],
) -> list[Clip]:
    name = f"transformer.resblocks.{layer}"
    n, c = len(clips[0].x), clips[0].protected
    if f > 1:
        r0 = wanted_cross(n, c, f, m.inter)
        r1 = wanted_intra(n, c, f, r0, m.intra)
    else:
        early = not m.layers or layer < m.layers[0]
        r0, r1 = 0, min((n - c) // 2, m.r) if early else wanted_intra(n, c, 1, 0, m.intra)
    clips = _across(state, layer, clips, f, r0, m, records)
    groups_of_video, after = [], []
    for clip in clips:
        normed = layer_norm(clip.x, state, f"{name}.ln_1")
        size = clip.size if m.prop_attn else None
        out, keys = attend(state, f"{name}.attn", normed, normed, size)
        clip = Clip(clip.x + out, clip.size, clip.protected)
        if r1 > 0:
            groups = soft_matching(keys, r1, clip.protected)
            clip = average(clip, groups)
            groups_of_video.append(groups)
        hidden = mlp(state, f"{name}.mlp", layer_norm(clip.x, state, f"{name}.ln_2"))
        after.append(Clip(clip.x + hidden, clip.size, clip.protected))
    if r1 > 0:
        record(records, layer, False, groups_of_video)
    return after


def _across(
    state: dict[str, Tensor],
    layer: int,
    clips: list[Clip],
    f: int,
    r0: int,
    m: Merging,
    records: dict[tuple[int, bool], Record],
) -> list[Clip]:
    """Every f neighbouring clips joined, and r0 of their tokens merged by the hidden states."""
    groups_of_video, after = [], []
    for start in range(0, len(clips), f):
        clip = joined(clips[start : start + f])
        if r0 > 0:
            groups = soft_matching(clip.x, r0, clip.protected)
            position = state.get(f"frame_positions.{layer}")
            if m.frame_pos and position is not None:
                moved = [
                    Clip(old.x + position[start + i], old.size, old.protected)
                    for i, old in enumerate(clips[start : start + f])
                ]
                clip = joined(moved)
            clip = average(clip, groups)
            groups_of_video.append(groups)
        after.append(clip)
    if r0 > 0:
        record(records, layer, True, groups_of_video)
    return after


def record(
    records: dict[tuple[int, bool], Record], layer: int, cross: bool, groups: list[list[Group]]
) -> None:
    """Keep one video's groups."""
    records.setdefault((layer, cross), Record(layer, cross)).groups.append(groups)


def stop(state: dict[str, Tensor], pixel_values: Tensor, m: Merging) -> tuple[Tensor, list[Record]]:
    """STOP's video tower with ToMe on ``[B, F, 3, H, W]``: features ``[B, E]`` and every plan."""
    state = {k: v.double() for k, v in state.items()}
    records: dict[tuple[int, bool], Record] = {}
    features = []
    for video in pixel_values.double():
        video, moving = _prompt_inside(state, video)
        tokens = torch.stack([embed(state, frame) for frame in video])
        between = _prompt_between(state, tokens[:, 1:], moving)
        shared = state["prompt_embeddings"][0]
        clips = []
        for frame, x in enumerate(tokens):
            x = torch.cat([x[:1], state["frame_prompts"][0, frame] + between[frame], x[1:]])
            clips.append(Clip(x, torch.ones(len(x), dtype=torch.float64), 5))
        nums = list(m.frame_nums)
        for layer in range(depth_of(state)):
            per_clip = len(video) // len(clips)
            if layer:
                for index, clip in enumerate(clips):
                    for place in range(per_clip):
                        frame = index * per_clip + place
                        new = state["frame_prompts"][layer, frame] + between[frame]
                        clip.x = clip.x.clone()
                        clip.x[5 * place + 1 : 5 * place + 5] = new
            f = nums.pop(0) if layer in m.layers else 1
            clips, shared = _stop_layer(state, layer, clips, shared, f, m, records)
        out = layer_norm(shared[:1], state, "ln_post") @ state["proj"]
        features.append(out[0] / out.norm())
    return torch.stack(features), list(records.values())


def _stop_layer(
    state: dict[str, Tensor],
    layer: int,
    clips: list[Clip],
    shared: Tensor,
    f: int,
    m: Merging,
    records: dict[tuple[int, bool], Record],
) -> tuple[list[Clip], Tensor]:
    name = f"transformer.resblocks.{layer}"
    n, c = len(clips[0].x), clips[0].protected
    early = not m.layers or layer < m.layers[0]
    r0 = wanted_cross(n, c, f, m.inter) if f > 1 else 0
    r1 = wanted_intra(n, c, f, r0, m.intra)
    if f == 1 and early:
        r1 = min((n - c) // 2, m.r)
    if layer == depth_of(state) - 1:
        r1 = 0  # the output is a global prompt: behind the last attention nobody reads a clip
    clips = _across(state, layer, clips, f, r0, m, records)
    prompts = layer_norm(shared, state, f"{name}.ln_1")
    normed = [layer_norm(clip.x, state, f"{name}.ln_1") for clip in clips]
    ones = torch.ones(len(shared), dtype=torch.float64)
    everything, sizes = torch.cat([prompts, *normed]), torch.cat([ones, *(c.size for c in clips)])
    size = sizes if m.prop_attn else None
    out, _ = attend(state, f"{name}.attn", prompts, everything, size)
    shared = _stop_behind(state, name, shared + out)
    groups_of_video, after = [], []
    for clip, own in zip(clips, normed, strict=True):
        size = torch.cat([ones, clip.size]) if m.prop_attn else None
        out, keys = attend(state, f"{name}.attn", own, torch.cat([prompts, own]), size)
        clip = Clip(clip.x + out, clip.size, clip.protected)
        if r1 > 0:
            groups = soft_matching(keys[len(prompts) :], r1, clip.protected)
            clip = average(clip, groups)
            groups_of_video.append(groups)
        after.append(Clip(_stop_behind(state, name, clip.x), clip.size, clip.protected))
    if r1 > 0:
        record(records, layer, False, groups_of_video)
    return after, shared


def _stop_behind(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = x @ state[f"{name}.LoRA.0.weight"].T + state[f"{name}.LoRA.0.bias"]
    hidden = prelu(hidden, state[f"{name}.LoRA.1.weight"])
    adapted = hidden @ state[f"{name}.LoRA.2.weight"].T + state[f"{name}.LoRA.2.bias"]
    return x + mlp(state, f"{name}.mlp", layer_norm(x, state, f"{name}.ln_2")) + 0.1 * adapted


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def _convolved(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``[channels, F, H, W]``, same size out; in float32, torch being slow at it in float64."""
    weight = state[f"TemporalPrompt.{name}.weight"].float()
    padding = [size // 2 for size in weight.shape[2:]]
    bias = state[f"TemporalPrompt.{name}.bias"].float()
    found = torch.nn.functional.conv3d(x[None].float(), weight, bias, padding=padding)
    return found[0].double()


def _prompt_inside(state: dict[str, Tensor], video: Tensor) -> tuple[Tensor, Tensor]:
    """The video with its prompt, and which of the regions ``[F, side, side]`` move most."""
    front = "TemporalPrompt"
    x = video.transpose(0, 1)
    hidden = _convolved(state, "Conv.1", _convolved(state, "Conv.0", x))
    hidden = prelu(hidden, state[f"{front}.Conv.2.weight"])
    hidden = prelu(_convolved(state, "Conv.3", hidden), state[f"{front}.Conv.4.weight"])
    hidden = _convolved(state, "Conv.5", hidden)
    rows = hidden.permute(1, 2, 3, 0) @ state[f"{front}.MLP.0.weight"].T
    rows = prelu(rows + state[f"{front}.MLP.0.bias"], state[f"{front}.MLP.1.weight"])
    rows = rows @ state[f"{front}.MLP.2.weight"].T + state[f"{front}.MLP.2.bias"]
    prompt = rows.permute(0, 3, 1, 2)
    activity = _convolved(state, "Cal_Net", x)[0]
    side = video.shape[-1] // state["conv1.weight"].shape[-1]
    moving = torch.zeros(len(video), side, side, dtype=torch.float64)
    added = torch.zeros_like(video)
    for frame in range(len(video)):
        mean = torch.zeros(side, side, dtype=torch.float64)
        for i in range(side):
            for j in range(side):
                mean[i, j] = activity[frame, i::side, j::side].mean()
        seventh = sorted(mean.flatten().tolist(), reverse=True)[6]
        moving[frame] = (mean > seventh).double()
        for i in range(side):
            for j in range(side):
                part = prompt[frame, :, i::side, j::side]
                added[frame, :, i::side, j::side] = 0.05 * part + 0.05 * part * moving[frame, i, j]
    return video + added, moving


def _prompt_between(state: dict[str, Tensor], patches: Tensor, moving: Tensor) -> Tensor:
    """``[F, 4, C]`` from the patches ``[F, P, C]`` in front of the first block."""
    front = "TemporalPrompt"
    flat = patches.reshape(-1, patches.shape[-1])
    x, _ = attend(state, f"{front}.Attention", flat, flat, None)
    x = x.reshape(1, *patches.shape)
    weight = _convolved(state, "Cal_Net_Inter", x)[0]
    weight = weight + weight * moving.reshape(len(patches), -1, 1)
    weight = weight.mean((1, 2))
    weight = (weight - weight.min()) / (weight.max() - weight.min())
    hidden = prelu(_convolved(state, "InterConv.0", x), state[f"{front}.InterConv.1.weight"])
    rows = _convolved(state, "InterConv.2", hidden)[0].transpose(1, 2)
    rows = rows @ state[f"{front}.InterMLP.0.weight"].T + state[f"{front}.InterMLP.0.bias"]
    rows = prelu(rows, state[f"{front}.InterMLP.1.weight"])
    rows = rows @ state[f"{front}.InterMLP.2.weight"].T + state[f"{front}.InterMLP.2.bias"]
    tokens = rows.transpose(1, 2)
    return 0.05 * (tokens + tokens * weight[:, None, None])
