"""Making CLIP4Clip's and STOP's video towers, with the weights of a file or random ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.merge.schedule import FrameMerging
from tome_export.models.clip_sizes import ClipSizes
from tome_export.models.file_loader import FileLoader, filled
from tome_export.models.recipe import LoadedModel, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

_POSITIONS = "frame_positions."


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

    def from_file(self, recipe: Recipe, path: Path, depth: int | None) -> LoadedModel:
        """See ``FileLoader``."""
        from tome_export.models.clip4clip_weights import stop_state, tower_state
        from tome_export.weights.files import read_state, stored_dtype

        module = self.create(depth)
        state = read_state(path)
        if self.prompts:
            state = stop_state(state, path, self.frames, self.sizes.width)
        else:
            state = tower_state(state, path)
        stored = stored_dtype(state.values())
        state, remark = _with_positions(state, module)
        return filled(recipe, module, state, path, stored, remark)

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
