"""Small video towers with live weights: eight frames of 32 pixels, 16 patches each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from towers import live

from tome_export.video.clip4clip import Clip4ClipTower
from tome_export.video.options import ClipSizes, FrameMerging, VideoSchedule
from tome_export.video.stop import StopTower

FRAMES, DEPTH = 8, 4
SIZES = ClipSizes(64, DEPTH, 8, 32, 24)
MERGING = FrameMerging((1, 2), (2, 2), (30, 10))


def clip4clip(frames: int = FRAMES, sizes: ClipSizes = SIZES) -> Any:
    """A ``Clip4ClipTower``, two heads, frame positions for ``MERGING``."""
    tower = Clip4ClipTower(sizes, frames, MERGING.clips_entering(frames))
    return live(tower).requires_grad_(False)


def stop(frames: int = FRAMES, sizes: ClipSizes = SIZES) -> Any:
    """A ``StopTower`` likewise."""
    tower = StopTower(sizes, frames, MERGING.clips_entering(frames))
    return live(tower).requires_grad_(False)


def schedule(r: int = 3, **changes: Any) -> VideoSchedule:
    """A schedule with ``MERGING``, or with some of it changed."""
    from dataclasses import replace

    return VideoSchedule(r, frames=replace(MERGING, **changes))


def videos(count: int = 2, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Moving noise ``[B, F, 3, 32, 32]`` and a mask without some of the last video's frames."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(count, 1, 3, 32, 32, generator=generator)
    pixels = still + 0.5 * torch.randn(count, FRAMES, 3, 32, 32, generator=generator)
    mask = torch.ones(count, FRAMES)
    mask[-1, FRAMES - 3 :] = 0
    return pixels, mask


def groups(plan: Any, row: int) -> list[list[int]]:
    """One sequence's plan as the reference has it: input tokens of each output token, in order."""
    keep, src, dst = (np.asarray(part[row]).tolist() for part in plan)
    return [[k, *(s for s, d in zip(src, dst, strict=True) if d == i)] for i, k in enumerate(keep)]
