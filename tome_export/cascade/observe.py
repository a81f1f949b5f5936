"""Every member of a cascade on every image, once; what is kept is small."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Artifact
from tome_export.artifact.evaluation import UnreadableImage
from tome_export.cascade import policy
from tome_export.cascade.calibrate import Observations
from tome_export.data.decode import Task, decoded_chunks
from tome_export.data.metrics import correlations, cosines
from tome_export.data.preprocess import pixels_from_bytes
from tome_export.data.source import Source, selection
from tome_export.errors import ExportError, InputError
from tome_export.progress import Progress
from tome_export.runtime.model import model_from_artifact, open_runner
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import INPUT_NAME

LIMIT = 2048
"""Most images taken where the user sets no limit."""

NOTHING = "the highest artifact's output of it is constant or not finite: nothing is similar to it"

MOST_SURPRISE = 50.0
"""Nats that one image counts at most: one that is wrong beyond doubt must not decide alone."""


@dataclass(frozen=True)
class Members:
    """Artifacts of one model by MACs ascending, how they are run, and what is looked at.

    Attributes:
        measure: What confidence is: ``max`` or ``margin``.
        patch: Height and width of a patch, where average patches are needed; else None.
    """

    artifacts: tuple[Artifact, ...]
    backend: str
    measure: str
    patch: tuple[int, int] | None

    def observe(
        self, source: Source, limit: int | None, progress: Progress
    ) -> tuple[Observations, tuple[UnreadableImage, ...]]:
        """Run all members on at most so many images of a source, taken evenly from its listing.

        Without labels the last member is right. Of models without classes it always is, and labels
        are not used.

        Returns:
            Observations of the images that could be read, in the order of the listing; the others.
        """
        chosen, batch = selection(len(source), limit or LIMIT), self._batch()
        tasks = [
            Task(number, tuple(source.items(chosen[start : start + batch])))
            for number, start in enumerate(range(0, len(chosen), batch))
        ]
        manifest = self.artifacts[-1].manifest
        labels, preprocessing = source.labels, manifest.preprocessing
        decode = partial(pixels_from_bytes, preprocessing=preprocessing)
        parts: list[Observations] = []
        unreadable: list[UnreadableImage] = []
        with contextlib.ExitStack() as stack:
            runners = [
                stack.enter_context(
                    open_runner(self.backend, model_from_artifact(one, str(one.path)), progress)
                )
                for one in self.artifacts
            ]
            for decoded in decoded_chunks(tasks, decode, 0):
                rows = chosen[decoded.chunk * batch : (decoded.chunk + 1) * batch]
                unreadable += [
                    UnreadableImage(name=name, reason=why) for _, name, why in decoded.unreadable
                ]
                bad = [position for position, _, _ in decoded.unreadable]
                rows = np.delete(rows, bad)
                if len(rows) and manifest.output_kind == "classes":
                    truth = None if labels is None else labels[rows].astype(np.int64)
                    parts.append(self._observed(decoded.pixels, truth, runners, batch))
                elif len(rows):
                    part = self._compared(decoded.pixels, runners, batch)
                    known = part.score[:, -1] > 0
                    parts.append(part.take(np.flatnonzero(known)))
                    items = np.delete(np.array(tasks[decoded.chunk].items, object), bad)
                    unreadable += [
                        UnreadableImage(name=item.name, reason=NOTHING) for item in items[~known]
                    ]
                done = min(len(chosen), (decoded.chunk + 1) * batch)
                progress.step("images", done, len(chosen))
        if not sum(map(len, parts)):
            raise InputError(
                f"none of the {len(chosen)} images of {source.text} could be read; the first is "
                f"{unreadable[0].name}: {unreadable[0].reason}"
            )
        return Observations.joined(parts), tuple(unreadable)

    def _observed(
        self,
        pixels: NDArray[Any],
        truth: NDArray[np.int64] | None,
        runners: Sequence[Runner],
        batch: int,
    ) -> Observations:
        logits = [policy.two_classes(self._output(one, pixels, batch)) for one in runners]
        classes = np.stack([_best_class(one) for one in logits], axis=1)
        truth = classes[:, -1] if truth is None else truth
        return Observations(
            (classes == truth[:, None]) & (classes >= 0),
            np.stack([_surprise(one, truth) for one in logits], axis=1),
            np.stack([policy.confidence(one, self.measure) for one in logits], axis=1),
            *self._looks(pixels),
        )

    def _compared(
        self, pixels: NDArray[Any], runners: Sequence[Runner], batch: int
    ) -> Observations:
        """How similar each member's features or maps are to the last one's.

        The last one's score is 1; 0 where its own output is nothing that can be compared with.
        """
        outputs = [self._output(one, pixels, batch) for one in runners]
        features = self.artifacts[-1].manifest.output_kind == "features"
        similarity = cosines if features else correlations
        found = np.stack([similarity(one, outputs[-1]) for one in outputs], axis=1)
        found[:, -1] = np.where(np.isnan(found[:, -1]), np.nan, 1.0)
        score = np.clip(np.nan_to_num(found), 0.0, 1.0)
        return Observations(score, 1 - score, np.full_like(score, np.nan), *self._looks(pixels))

    def _looks(self, pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What policies look at of each image: its complexity and its average patch."""
        pixels = policy.normalised(pixels, self.artifacts[-1].manifest.preprocessing)
        patches = policy.mean_patch(pixels, self.patch) if self.patch else None
        return policy.complexity(pixels), np.empty((len(pixels), 0)) if patches is None else patches

    def _output(self, runner: Runner, pixels: NDArray[Any], batch: int) -> Any:
        name = self.artifacts[-1].manifest.output.name
        try:
            return infer_in_batches(runner, {INPUT_NAME: pixels}, len(pixels), batch)[name]
        # Runtimes raise what they please: out of memory, a kernel that is not there.
        except Exception as error:
            raise ExportError(
                f"{self.backend} failed on a batch of {batch}: {error}; try another --backend"
            ) from error

    def _batch(self) -> int:
        """A batch size that all members take, near to what they are tuned for."""
        ranges = [one.manifest.batch_on(self.backend) for one in self.artifacts]
        least, most = max(r.min for r in ranges), min(r.max for r in ranges)
        if least > most:
            raise InputError(
                f"the artifacts take batches of {', '.join(map(str, ranges))}, which have no size "
                "in common; rebuild them with one --batch"
            )
        return min(max(min(r.opt for r in ranges), least), most)


def _best_class(logits: NDArray[Any]) -> NDArray[np.int64]:
    """``[B]``: of equal ones the lowest; -1 where an output is not finite."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, logits.argmax(axis=1), -1).astype(np.int64)


def _surprise(logits: NDArray[Any], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy ``[B]`` in nats, ``MOST_SURPRISE`` at most and where there is no number."""
    known = np.isfinite(logits).all(axis=1) & (truth >= 0)
    safe = np.where(known[:, None], logits, 0.0)
    found = -policy.log_softmax(safe)[np.arange(len(truth)), np.maximum(truth, 0)]
    return np.asarray(np.where(known, np.minimum(found, MOST_SURPRISE), MOST_SURPRISE))
