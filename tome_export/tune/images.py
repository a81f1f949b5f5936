"""The images that a schedule is tuned on, in memory, and how they are split."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.data.decode import pixels_or_reason
from tome_export.data.find import SAMPLES, find_data, labelled_source
from tome_export.data.labels import Classes
from tome_export.data.source import Source, samples_source
from tome_export.errors import InputError, UsageError
from tome_export.progress import Progress

if TYPE_CHECKING:
    from tome_export.models import Recipe

LIMIT = 2048
"""Most images taken where the user sets no limit."""

IMAGE_MACS = 4e12
"""MACs of one pass over all images that are taken where the user sets no limit."""

SEARCH_MACS = 1e12
"""MACs of one pass over the images of the search, at the unmerged model's cost."""

FEWEST = 32
"""Images below which no set is made smaller to save MACs."""

SPLIT = 64
"""Images from which on some are kept from the search, for validation."""

HOLD_OUT = 300
"""Images from which on half of those kept from the search are kept from the choice as well."""

MOST_BYTES = 4 << 30
"""Most memory that the images may take."""


@dataclass(frozen=True)
class TuneImages:
    """Images in the order in which they are used: search, validation, held out.

    Attributes:
        pixels: ``[B, C, H, W]`` float32.
        labels: ``[B]``; None where only agreement with the unmerged model can be counted.
        search: How many, from the first on, the search looks at.
        chosen_on: How many, those of the search included, the choice looks at; the validation
            images lie between the two. The rest are held out: nothing looks at them but the last
            measurement of what was chosen.
        source: What the user gave, or ``samples``.
        available: Images that there are.
        unreadable: Those met that could not be read.
        notes: What a user should know.
    """

    pixels: NDArray[np.float32]
    labels: NDArray[Any] | None
    search: int
    chosen_on: int
    source: str
    available: int
    unreadable: int
    notes: tuple[str, ...]

    @property
    def metric(self) -> str:
        """What is counted."""
        return "top1" if self.labels is not None else "agreement"

    def first(self, count: int) -> TuneImages:
        """The first images alone, as the time limit leaves no more; split in the same parts."""
        whole = len(self.pixels)
        note = f"{count} of {whole} images are used: the time limit leaves no more"
        return replace(
            self,
            pixels=self.pixels[:count],
            labels=None if self.labels is None else self.labels[:count],
            search=max(1, self.search * count // whole),
            chosen_on=max(1, self.chosen_on * count // whole),
            notes=(*self.notes, note),
        )


def tune_images(
    recipe: Recipe,
    macs: int,
    classes: Classes,
    data: tuple[str, ...],
    labels: Path | None,
    limit: int | None,
    seed: int,
    progress: Progress,
    until: float = math.inf,
) -> TuneImages:
    """Read images, drawn and ordered by the seed.

    Args:
        recipe: With the preprocessing that fits the model.
        macs: MACs per image of the unmerged model.
        classes: Of the model.
        data: A folder or shards, or ``samples``.
        labels: File of labels for a folder.
        limit: Most images; None for as many as a search in minutes can take.
        seed: Of the draw and the split.
        progress: Told how many are read.
        until: In seconds of ``time.monotonic``; after that no more than ``FEWEST`` are read.

    Raises:
        InputError: if there is no image that can be read, or the labels do not fit the model.
        UsageError: if the limit is below 1, or more than memory should be used for, or labels are
            given for what has its own.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}; expected at least 1 image")
    found = _source(recipe, classes, data, labels)
    most = limit or int(min(LIMIT, max(FEWEST, IMAGE_MACS // macs)))
    order = np.random.default_rng(seed).permutation(len(found))
    pixels, index, unreadable, reason = _read(found, order, most, recipe, progress, until)
    if not index:
        raise InputError(
            f"none of the {len(found)} images of {found.text} can be read ({reason}); give others"
        )
    count = len(index)
    notes = [*found.notes]
    if unreadable:
        notes.append(f"{unreadable} images could not be read and were left out ({reason})")
    if count + unreadable < len(found):
        late = " and --time-limit" if count < min(most, len(found) - unreadable) else ""
        sets = "set" if late else "sets"
        notes.append(f"{count} of {len(found)} images are used; --limit{late} {sets} how many")
    search = chosen_on = count
    if count >= SPLIT:
        search = min(count // 2, max(FEWEST, int(SEARCH_MACS // macs)))
        chosen_on = search + (count - search) // 2 if count >= HOLD_OUT else count
    else:
        notes.append(
            f"{count} images are few: none is kept from the search, so nothing validates its "
            "result; give more with --data"
        )
    known = None if found.labels is None else np.asarray(found.labels)[index]
    return TuneImages(
        pixels, known, search, chosen_on, found.text, len(found), unreadable, tuple(notes)
    )


def _source(recipe: Recipe, classes: Classes, data: tuple[str, ...], labels: Path | None) -> Source:
    from tome_export.data.samples import MAX_PHOTOGRAPH_PIXELS, sample_pixels

    if data != (SAMPLES,):
        return find_data(data, classes, labels)
    if labels is not None:
        raise UsageError("--labels are for a folder of images; the samples have their own")
    # Labels of the recipe's own classes, not of a checkpoint's.
    labelled = labelled_source(recipe) if classes.names == recipe.labels else None
    return labelled or samples_source(sample_pixels(recipe, MAX_PHOTOGRAPH_PIXELS), None)


def _read(
    source: Source,
    order: NDArray[Any],
    most: int,
    recipe: Recipe,
    progress: Progress,
    until: float,
) -> tuple[NDArray[np.float32], list[int], int, str]:
    """Images until there are enough: pixels, places in the source, unreadable, a reason."""
    from tome_export.data.preprocess import pixels_from_bytes

    decode = partial(pixels_from_bytes, preprocessing=recipe.preprocessing)
    shape = recipe.preprocessing.input_size
    wanted = min(most, len(source))
    if wanted > (room := MOST_BYTES // (4 * math.prod(shape))):
        raise UsageError(
            f"--limit is {most}; {wanted} images of {'x'.join(map(str, shape))} numbers take more "
            f"than {MOST_BYTES >> 30} GiB, give at most {room}"
        )
    pixels = np.empty((wanted, *shape), np.float32)
    index: list[int] = []
    unreadable, reason = 0, ""
    for place in map(int, order):
        if len(index) == wanted or (len(index) >= FEWEST and time.monotonic() >= until):
            break
        found = pixels_or_reason(source.items((place,))[0], decode)
        if isinstance(found, str):
            unreadable, reason = unreadable + 1, found
            continue
        pixels[len(index)] = found
        index.append(place)
        progress.step("images", len(index), wanted)
    return pixels[: len(index)], index, unreadable, reason


def sized(recipe: Recipe, input_size: tuple[int, int, int]) -> Recipe:
    """The recipe with the input size that the model has."""
    return replace(recipe, preprocessing=replace(recipe.preprocessing, input_size=input_size))
