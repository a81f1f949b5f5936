"""Schedules measured with PyTorch: classes that stay right, and divergence from the unmerged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.merge.schedule import Schedule
from tome_export.tune.front import Score
from tome_export.tune.space import Rs, Space

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.patch import MergedModel
    from tome_export.pipeline.tune_images import TuneImages

BATCH_TOKENS = 64 * 197
"""Tokens per batch of the measurement, unmerged: 64 images of a ViT with 16-pixel patches."""

CHUNKS = 4
"""Batches that the search images are at least cut into, so that a bad schedule is left early."""


class Scorer:
    """Measures schedules of one model on fixed images.

    Args:
        model: The patched model; its weights are shared, or copied to the GPU if there is one.
        images: To measure on.
    """

    def __init__(self, model: MergedModel, images: TuneImages) -> None:
        import copy

        import torch

        from tome_export.patch import unpatch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        module = unpatch(model)
        # Moved in place, the caller's model would be on the GPU too.
        on_gpu = self._device == "cuda"
        self._module: nn.Module = copy.deepcopy(module).to(self._device) if on_gpu else module
        self._prop_attn = model.settings.prop_attn
        self._search = images.search
        self._pixels = torch.from_numpy(images.pixels)
        tokens = model.layers[0].tokens_in
        largest = max(1, BATCH_TOKENS // tokens)
        self._batch = min(largest, max(1, -(-images.search // CHUNKS)))
        with torch.inference_mode():
            outputs = [
                self._module(self._pixels[start : start + self._batch].to(self._device))
                for start in range(0, len(self._pixels), self._batch)
            ]
            self._reference = torch.cat(outputs).double().log_softmax(dim=1)
        predicted = self._reference.argmax(dim=1)
        labels = predicted.cpu().numpy() if images.labels is None else images.labels
        self._labels = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(self._device)
        self._right = (predicted == self._labels).cpu().numpy()

    @property
    def unmerged_right(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """``[B]``: which images the unmerged model has right."""
        return self._right

    def search(self, r: Rs, bound: float = float("inf")) -> Score:
        """Measure on the search images; see ``tune.search.Evaluate``."""
        return self._score(r, 0, self._search, bound)

    def validation(self, r: Rs) -> Score:
        """Measure on the others."""
        return self._score(r, self._search, len(self._pixels), float("inf"))

    def right(self, r: Rs) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """``[B]``: which images a schedule has right."""
        import torch

        model = self._model(r)
        with torch.inference_mode():
            found = [self._one(model, s, s + self._batch)[1] for s in self._starts()]
        return torch.cat(found).cpu().numpy()

    def _starts(self) -> range:
        return range(0, len(self._pixels), self._batch)

    def _model(self, r: Rs) -> MergedModel:
        from tome_export.patch import patch

        return patch(self._module, Schedule(per_layer=r), prop_attn=self._prop_attn).eval()

    def _one(self, model: MergedModel, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Divergence and rightness per image."""
        logits = model(self._pixels[start:end].to(self._device)).double().log_softmax(dim=1)
        reference = self._reference[start:end]
        # Rounding can take a divergence of zero below it.
        damage = (reference.exp() * (reference - logits)).sum(dim=1).clamp_min(0.0)
        return damage, logits.argmax(dim=1) == self._labels[start:end]

    def _score(self, r: Rs, first: int, last: int, bound: float) -> Score:
        import torch

        model, damage, correct, done = self._model(r), 0.0, 0, first
        with torch.inference_mode():
            for start in range(first, last, self._batch):
                done = min(start + self._batch, last)
                found, right = self._one(model, start, done)
                damage += float(found.sum())
                correct += int(right.sum())
                if damage > bound * (last - first):
                    break
        seen = done - first
        return Score(seen, correct, damage / seen, done == last)


def space_of(model: MergedModel) -> Space:
    """The schedules of a model, with MACs counted as the artifact's manifest counts them."""
    fixed: dict[int, int] = {}

    def outside(tokens: int) -> int:
        if tokens not in fixed:
            fixed[tokens] = model.fixed_macs(tokens)
        return fixed[tokens]

    return Space(model.block_costs, model.layers[0].tokens_in, model.prefix, outside)
