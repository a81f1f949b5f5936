"""Schedules measured with PyTorch: classes that stay right, and divergence from the unmerged."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.runtime.environment import cores
from tome_export.tune.images import FEWEST
from tome_export.tune.search import Score
from tome_export.tune.space import Rs, Space

if TYPE_CHECKING:
    from torch import Tensor

    from tome_export.patch import MergedModel
    from tome_export.patch.merger import Merger, Tokens
    from tome_export.reducers.base import AttentionInputs
    from tome_export.spec import Activation
    from tome_export.tune.images import TuneImages

Right = np.ndarray[Any, np.dtype[np.bool_]]

BATCH_TOKENS = {"cpu": 16 * 197, "cuda": 64 * 197}
"""Tokens per batch of the measurement, unmerged, of images of a ViT with 16-pixel patches."""

CHUNKS = 4
"""Batches that the search images are at least cut into, so that a bad schedule is left early."""


class Scorer:
    """Measures schedules of one model on fixed images; a context manager.

    On the CPU batches run side by side in threads, each of which has its cores to itself. Were
    all cores to share every operator instead, each would wait for the slowest at the end of each:
    on a machine with other work that takes several times as long.

    Args:
        model: The patched model; its weights are shared, or copied to the GPU if there is one.
        images: To measure on.
        activation: What makes scores of the logits: ``softmax`` or ``sigmoid``.
        until: In seconds of ``time.monotonic``; after that the unmerged model is run on no more
            than ``FEWEST`` images, and the rest are left out.

    Attributes:
        images: Those that are measured on.
        unmerged_right: ``[B]``: which images the unmerged model has right.
        one_answer: Whether agreement is counted and the unmerged model says the same of all
            images, so that it could hardly fail.
    """

    def __init__(
        self,
        model: MergedModel,
        images: TuneImages,
        activation: Activation = "softmax",
        until: float = float("inf"),
    ) -> None:
        import copy

        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # Moved in place, the caller's model would be on the GPU too.
        self._model = copy.deepcopy(model).to("cuda") if self._device == "cuda" else model
        self._pixels = torch.from_numpy(images.pixels)
        largest = max(1, BATCH_TOKENS[self._device] // model.layers[0].tokens_in)
        self._batch = min(largest, max(1, -(-images.search // CHUNKS)))
        self._threads = torch.get_num_threads()
        workers = min(cores(), CHUNKS) if self._device == "cpu" else 1
        each = max(1, cores() // workers)
        self._pool = ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(each,)
        )
        self._ending = threading.Event()
        self._known: dict[tuple[Rs, int], Right] = {}
        self._sigmoid = activation == "sigmoid"
        found: list[Tensor] = []
        for start, output, _ in self._outputs((0,) * len(model.layers), 0, len(self._pixels)):
            found.append(output)
            seen = start + len(output)
            if seen >= FEWEST and time.monotonic() >= until and seen < len(self._pixels):
                images = images.first(seen)
                break
        self.images = images
        self._reference = torch.cat(found)
        predicted = self._reference.argmax(dim=2)
        if images.labels is None:
            self._labels = predicted
        else:
            labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
            self._labels = labels.to(self._device)[:, None]
        same = len(predicted) > 1 and bool((predicted == predicted[:1]).all())
        self.one_answer: bool = images.labels is None and same
        self.unmerged_right: Right = self._is_right(self._reference, 0).cpu().numpy()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self._ending.set()
        self._pool.shutdown(cancel_futures=True)
        # What a worker sets for itself becomes what later threads begin with.
        torch.set_num_threads(self._threads)

    def search(self, r: Rs, bound: float = float("inf")) -> Score:
        """Measure on the search images, as far as ``Search.evaluate`` wants."""
        return self._score(r, 0, self.images.search, bound)

    def validation(self, r: Rs) -> Score:
        """Measure on those that finalists are chosen with."""
        return self._score(r, self.images.search, self.images.chosen_on, float("inf"))

    def right(self, r: Rs, first: int, last: int) -> Right:
        """``[last - first]``: which of the search, validation or held-out images are right."""
        if (r, first) not in self._known:
            self._score(r, first, last, float("inf"))
        return self._known[r, first]

    def _score(self, r: Rs, first: int, last: int, bound: float) -> Score:
        import torch

        damage, correct, done, rights, least = 0.0, 0, first, [], 1.0
        for start, output, entropy in self._outputs(r, first, last):
            least = min(least, float(entropy.min()))
            done = start + len(output)
            reference = self._reference[start:done]
            # Rounding can take a divergence of zero below it.
            found = (reference.exp() * (reference - output)).sum(dim=(1, 2)).clamp_min(0.0)
            right = self._is_right(output, start)
            damage += float(found.sum())
            correct += int(right.sum())
            rights.append(right)
            if damage > bound * (last - first):
                break
        if done == last:
            self._known[r, first] = torch.cat(rights).cpu().numpy()
        seen = done - first
        return Score(seen, correct, damage / seen, done == last, least)

    def _is_right(self, output: Tensor, start: int) -> Tensor:
        """``[B]``: which images from ``start`` on have the label, or all that unmerged says."""
        expected = self._labels[start : start + len(output)]
        if output.shape[1] > expected.shape[1]:
            # A label of one class, where each has a yes or no: that of the surest yes.
            return output[:, :, 1].argmax(dim=1) == expected[:, 0]
        return (output.argmax(dim=2) == expected).all(dim=1)

    def _outputs(self, r: Rs, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What each batch gives, in order.

        Returns:
            Its start; log probabilities ``[B, G, C]`` float64 of the C answers to each of G
            questions: one question of all classes, or of a sigmoid a no and a yes for each class;
            token-size entropy ``[B]``.
        """
        model = self._model
        layers = model.settings.reducer.layers(Schedule(per_layer=r), model.tower)
        left = threading.Event()

        def run(start: int) -> tuple[Tensor, Tensor]:
            import torch

            merger = model.merger(layers=layers)
            leaving: Any = _Leaving(merger, (left, self._ending))
            pixels = self._pixels[start : min(start + self._batch, last)].to(self._device)
            with torch.inference_mode():
                output = model.run(pixels, leaving)
                wide = output.double()
                if not self._sigmoid:
                    return wide.log_softmax(dim=1)[:, None], model.entropy(merger, output)
                each = torch.stack([torch.zeros_like(wide), wide], dim=2).log_softmax(dim=2)
                return each, model.entropy(merger, output)

        starts = range(first, last, self._batch)
        futures = [self._pool.submit(run, start) for start in starts]
        try:
            for start, future in zip(starts, futures, strict=True):
                yield start, *future.result()
        finally:
            left.set()
            for future in futures:
                future.cancel()


class _LeftError(Exception):
    """Nobody waits for the result any more."""


class _Leaving:
    """A merger that ends the forward pass of which nobody waits for the result."""

    def __init__(self, merger: Merger, stops: tuple[threading.Event, ...]) -> None:
        self._merger, self._stops = merger, stops

    def __call__(self, tokens: Tokens, attended: AttentionInputs, layer: int) -> Tokens:
        if any(stop.is_set() for stop in self._stops):
            raise _LeftError
        return self._merger(tokens, attended, layer)

    def behind(self, tokens: Tokens, layer: int) -> Tokens:
        return self._merger.behind(tokens, layer)


def space_of(model: MergedModel) -> Space:
    """The schedules of a model, with MACs counted as the artifact's manifest counts them."""
    tower, reducer = model.tower, model.settings.reducer

    def learned(tokens: int, r: int) -> int:
        return reducer.macs(LayerTokens(tokens, r, tokens - r, reducer.behind_block), tower)

    return Space(
        model.block_costs,
        tower.tokens,
        tower.prefix,
        functools.cache(model.fixed_macs),
        reducer.limit,
        reducer.behind_block,
        None if model.reducer is None else learned,
    )
