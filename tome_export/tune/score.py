"""Schedules measured with PyTorch on fixed images, beside the unmerged model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tome_export.merge.schedule import Schedule
from tome_export.runtime.environment import cores
from tome_export.tune.images import FEWEST, TuneImages
from tome_export.tune.measure import Measure, comparable
from tome_export.tune.search import Score
from tome_export.tune.space import Rs

if TYPE_CHECKING:
    from torch import Tensor

    from tome_export.patch import MergedModel
    from tome_export.patch.merger import LayerTrace

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
            unmerged model is run on no more than ``FEWEST``, and the rest are left out, as are
            those whose output can be compared with nothing.
        unmerged: What is counted of each image for the unmerged model ``[B]``, 1 at most.
    """

    def __init__(
        self,
        model: MergedModel,
        images: TuneImages,
        measure: Measure,
        until: float = float("inf"),
        *,
        targeted: bool = False,
    ) -> None:
        import copy

        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # Moved in place, the caller's model would be on the GPU too.
        self._model = copy.deepcopy(model).to("cuda") if self._device == "cuda" else model
        self._pixels = torch.from_numpy(images.pixels)
        self._measure = measure
        largest = max(1, BATCH_TOKENS[self._device] // model.layers[0].tokens_in)
        self._batch = min(largest, max(1, -(-images.data.search // CHUNKS)))
        self._threads = torch.get_num_threads()
        workers = min(cores(), CHUNKS) if self._device == "cpu" else 1
        each = max(1, cores() // workers)
        self._pool = ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(each,)
        )
        self._ending = threading.Event()
        self._reference = torch.empty(0)
        self._known: dict[tuple[Rs, int], tuple[Score, NDArray[Any]]] = {}
        try:
            images, reference = self._unmerged_outputs(images, until)
            images, self._reference = comparable(measure, images, reference)
            self.images = measure.checked(images, self._reference, targeted=targeted)
        except BaseException:
            self.__exit__()
            raise
        self._pixels = torch.from_numpy(images.pixels)
        self.unmerged: NDArray[Any] = measure.of_unmerged(self._reference).cpu().numpy()

    def _unmerged_outputs(self, images: TuneImages, until: float) -> tuple[TuneImages, Tensor]:
        """What is compared of the unmerged model, and the images that there was time for."""
        import torch

        found: list[Tensor] = []
        for start, output, _ in self._outputs((0,) * len(self._model.layers), 0, len(self._pixels)):
            found.append(output)
            done = start + len(output)
            if done >= FEWEST and time.monotonic() >= until and done < len(self._pixels):
                return images.first(done), torch.cat(found)
        return images, torch.cat(found)

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

    def counted(self, r: Rs, first: int, last: int) -> tuple[Score, NDArray[Any]]:
        """The score on search, validation or held-out images, and what is counted of each."""
        if (r, first) not in self._known:
            self._score(r, first, last)
        return self._known[r, first]

    def _score(self, r: Rs, first: int, last: int, bound: float = float("inf")) -> Score:
        import torch

        measure, damage, done, least, apart = self._measure, 0.0, first, 1.0, 0.0
        counted, worst = [], 0.0
        for start, output, entropy in self._outputs(r, first, last):
            least = min(least, float(entropy.min()))
            done = start + len(output)
            reference = self._reference[start:done]
            found = measure.damage(output, reference)
            counted.append(measure.counted(output, reference, start, found))
            difference = measure.difference(output, reference)
            apart += 0.0 if difference is None else float(difference.sum())
            damage += float(found.sum())
            worst = max(worst, float(found.max()))
            if damage > bound * (last - first):
                break
        count = done - first
        values = measure.counted_of_part(torch.cat(counted), self._reference[first:done])
        each: NDArray[Any] = values.cpu().numpy()
        score = Score(
            count,
            each.sum().item(),
            damage / count,
            worst,
            None if difference is None else apart / count,
            done == last,
            least,
        )
        if score.complete:
            self._known[r, first] = score, each
        return score

    def _outputs(self, r: Rs, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run images in batches: start, what is compared of it, token-size entropy ``[B]``."""
        import torch

        if not any(r) and len(self._reference):  # the unmerged model, which has been run
            yield first, self._reference[first:last], torch.ones(last - first)
            return
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
                return self._measure.kept(output), model.entropy(merger, output)

        starts = range(first, last, self._batch)
        futures = [self._pool.submit(run, start) for start in starts]
        try:
            for start, future in zip(starts, futures, strict=True):
                yield start, *future.result()
        finally:
            left.set()
            for future in futures:
                future.cancel()
