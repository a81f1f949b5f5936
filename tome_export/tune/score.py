"""Schedules measured with PyTorch: classes that stay right, and divergence from the unmerged."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tome_export.merge.schedule import Schedule
from tome_export.runtime.environment import cores
from tome_export.tune.images import FEWEST, TuneImages
from tome_export.tune.search import Score
from tome_export.tune.space import Rs

if TYPE_CHECKING:
    from torch import Tensor

    from tome_export.patch import MergedModel
    from tome_export.patch.merger import LayerTrace
    from tome_export.spec import Activation

BATCH_TOKENS = {"cpu": 16 * 197, "cuda": 64 * 197}
"""Tokens per batch, unmerged: those of 16 or 64 images of a ViT with 16-pixel patches."""

CHUNKS = 4
"""Batches that the search images are at least cut into, so that a bad schedule is left early."""


class Scorer:
    """Measures schedules of a patched model on fixed images; a context manager.

    On the CPU batches run side by side in threads, each of which has its cores to itself. Were
    all cores to share every operator instead, each would wait for the slowest at the end of each:
    on a machine with other work that takes several times as long.

    Attributes:
        images: Images that are measured on: after ``until``, in seconds of ``time.monotonic``, the
            unmerged model is run on no more than ``FEWEST``, and the rest are left out.
        unmerged_right: Which images the unmerged model has right ``[B]``.
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
        self._sigmoid = activation == "sigmoid"
        largest = max(1, BATCH_TOKENS[self._device] // model.layers[0].tokens_in)
        self._batch = min(largest, max(1, -(-images.data.search // CHUNKS)))
        self._threads = torch.get_num_threads()
        workers = min(cores(), CHUNKS) if self._device == "cpu" else 1
        each = max(1, cores() // workers)
        self._pool = ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(each,)
        )
        self._ending = threading.Event()
        self._known: dict[tuple[Rs, int], NDArray[np.bool_]] = {}
        found: list[Tensor] = []
        for start, output, _ in self._outputs((0,) * len(model.layers), 0, len(self._pixels)):
            found.append(output)
            done = start + len(output)
            if done >= FEWEST and time.monotonic() >= until and done < len(self._pixels):
                images = images.first(done)
                break
        self.images = images
        self._reference = torch.cat(found)
        predicted = self._reference.argmax(dim=2)
        self._labels = predicted
        if images.labels is not None:
            labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
            self._labels = labels.to(self._device)[:, None]
        same = len(predicted) > 1 and bool((predicted == predicted[:1]).all())
        self.one_answer: bool = images.labels is None and same
        self.unmerged_right: NDArray[np.bool_] = self._is_right(self._reference, 0).cpu().numpy()

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
        return self._score(r, 0, self.images.data.search, bound)

    def validation(self, r: Rs) -> Score:
        """Measure on the images that finalists are chosen with."""
        return self._score(r, self.images.data.search, self.images.chosen_on)

    def right(self, r: Rs, first: int, last: int) -> NDArray[np.bool_]:
        """Which of the search, validation or held-out images are right ``[last - first]``."""
        if (r, first) not in self._known:
            self._score(r, first, last)
        return self._known[r, first]

    def _score(self, r: Rs, first: int, last: int, bound: float = float("inf")) -> Score:
        import torch

        damage, done, rights, least = 0.0, first, [], 1.0
        for start, output, entropy in self._outputs(r, first, last):
            least = min(least, float(entropy.min()))
            done = start + len(output)
            reference = self._reference[start:done]
            # Rounding can take a divergence of zero below it.
            found = (reference.exp() * (reference - output)).sum(dim=(1, 2)).clamp_min(0.0)
            rights.append(self._is_right(output, start))
            damage += float(found.sum())
            if damage > bound * (last - first):
                break
        right = torch.cat(rights).cpu().numpy()
        if done == last:
            self._known[r, first] = right
        return Score(len(right), int(right.sum()), damage / len(right), done == last, least)

    def _is_right(self, output: Tensor, start: int) -> Tensor:
        """Which images from ``start`` on have the label, or all that unmerged says ``[B]``."""
        expected = self._labels[start : start + len(output)]
        if output.shape[1] > expected.shape[1]:
            # A label of one class, where each has a yes or no: that of the surest yes.
            return output[:, :, 1].argmax(dim=1) == expected[:, 0]
        return (output.argmax(dim=2) == expected).all(dim=1)

    def _outputs(self, r: Rs, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run images in batches: the start of each, log probabilities, token-size entropy ``[B]``.

        Log probabilities ``[B, G, C]`` float64 are of the C answers to each of G questions: one
        question of all classes, or of a sigmoid a no and a yes for each class.
        """
        import torch

        model = self._model
        layers = model.settings.reducer.layers(Schedule(per_layer=r), model.tower)
        left = threading.Event()

        def stop_if_left(_: LayerTrace) -> None:
            if left.is_set() or self._ending.is_set():
                raise CancelledError

        def run(start: int) -> tuple[Tensor, Tensor]:
            merger = model.merger(layers=layers, observe=stop_if_left)
            pixels = self._pixels[start : min(start + self._batch, last)].to(self._device)
            with torch.inference_mode():
                output = model.run(pixels, merger)
                wide, entropy = output.double(), model.entropy(merger, output)
                if not self._sigmoid:
                    return wide.log_softmax(dim=1)[:, None], entropy
                each = torch.stack([torch.zeros_like(wide), wide], dim=2)
                return each.log_softmax(dim=2), entropy

        starts = range(first, last, self._batch)
        futures = [self._pool.submit(run, start) for start in starts]
        try:
            for start, future in zip(starts, futures, strict=True):
                yield start, *future.result()
        finally:
            left.set()
            for future in futures:
                future.cancel()
