"""Making CLIP4Clip's and STOP's video towers, with the weights of a file or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.merge.frames import FrameMerging
from tome_export.models.recipe import LoadedModel, Recipe, WeightsInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.models.clip4clip import ClipSizes

_POSITIONS = "frame_positions."


@dataclass(frozen=True)
class Clip4ClipLoader:
    """Makes a video tower; see ``Loader``.

    Attributes:
        width: Of a token.
        depth: Number of blocks.
        patch: Side of a patch in pixels.
        image: Side of a frame in pixels.
        features: Width of the output.
        frames: Frames of one video.
        merging: Where frames are joined: its frame positions are weights of the tower.
        prompts: Whether it is STOP's tower, and not the plain one.
    """

    width: int = 768
    depth: int = 12
    patch: int = 32
    image: int = 224
    features: int = 512
    frames: int = 12
    merging: FrameMerging | None = None
    prompts: bool = False

    def architecture(self) -> nn.Module:
        """The tower without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._create(None)

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the tower; see ``Recipe.load``."""
        from tome_export.models.weights import load_by_file

        return load_by_file(
            recipe,
            weights,
            seed,
            depth,
            create=self._create,
            from_file=self._from_file,
            download=no_download,
        )

    def sizes(self, depth: int | None) -> ClipSizes:
        """Sizes of the image tower, at another depth if one is given."""
        from tome_export.models.clip4clip import ClipSizes

        return ClipSizes(self.width, depth or self.depth, self.patch, self.image, self.features)

    def _create(self, depth: int | None) -> nn.Module:
        from tome_export.models.clip4clip import Clip4ClipTower
        from tome_export.models.stop import StopTower

        merging = self.merging
        if merging is not None:
            merging.check(depth or self.depth, self.frames)
        positions = merging.clips_entering(self.frames) if merging and merging.position else {}
        made = StopTower if self.prompts else Clip4ClipTower
        return made(self.sizes(depth), self.frames, positions)

    def _from_file(self, recipe: Recipe, path: Path, depth: int | None) -> LoadedModel:
        from tome_export.models.checkpoint import fit, read_eager, sha256, stored_dtype
        from tome_export.models.clip4clip_weights import stop_state, tower_state
        from tome_export.models.weights import loaded

        module = self._create(depth)
        state = read_eager(path)
        if self.prompts:
            state = stop_state(state, path, self.frames, self.width)
        else:
            state = tower_state(state, path)
        stored = stored_dtype(state.values())
        state, remark = _with_positions(state, module)
        state, _ = fit(module, state, path, "")
        module.load_state_dict(state, strict=True)
        info = WeightsInfo("file", f"{path.name}{remark}", sha256(path), stored_dtype=stored)
        return loaded(module, recipe, info)


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


def no_download(recipe: Recipe) -> Path:
    """Refuse ``pretrained``: there is no place to get these weights from.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{recipe.name} has no weights of its own to download; give the file of a CLIP or video "
        "retrieval checkpoint with --weights PATH, or try the toolchain with --weights random"
    )
