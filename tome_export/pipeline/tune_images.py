"""The images that a schedule is tuned on, in memory, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.errors import InputError, UsageError
from tome_export.pipeline.progress import Progress

if TYPE_CHECKING:
    from tome_export.evaluation.source import Source
    from tome_export.models import Recipe

SAMPLES = "samples"

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


@dataclass(frozen=True)
class TuneImages:
    """Images in the order in which they are used: those of the search first.

    Attributes:
        pixels: ``[B, C, H, W]`` float32.
        labels: ``[B]``; None where only agreement with the unmerged model can be counted.
        search: How many, from the first on, the search looks at.
        source: What the user gave, or ``samples``.
        available: Images that there are.
        unreadable: Those met that could not be read.
        notes: What a user should know.
    """

    pixels: NDArray[np.float32]
    labels: NDArray[Any] | None
    search: int
    source: str
    available: int
    unreadable: int
    notes: tuple[str, ...]

    @property
    def metric(self) -> str:
        """What is counted."""
        return "top1" if self.labels is not None else "agreement"


def tune_images(
    recipe: Recipe,
    macs: int,
    classes: int,
    data: tuple[str, ...],
    limit: int | None,
    seed: int,
    progress: Progress,
) -> TuneImages:
    """Read images, drawn and ordered by the seed.

    Args:
        recipe: With the preprocessing that fits the model.
        macs: MACs per image of the unmerged model.
        classes: Outputs of the model.
        data: A folder or shards, or ``samples``.
        limit: Most images; None for as many as a search in minutes can take.
        seed: Of the draw and the split.
        progress: Told how many are read.

    Raises:
        InputError: if there is no image that can be read, or the labels do not fit the model.
        UsageError: if the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}; expected at least 1 image")
    found = _source(recipe, classes, data)
    most = limit or int(min(LIMIT, max(FEWEST, IMAGE_MACS // macs)))
    order = np.random.default_rng(seed).permutation(len(found))
    pixels, index, unreadable, reason = _read(found, order, most, recipe, progress)
    if not pixels:
        raise InputError(
            f"none of the {len(found)} images of {found.text} can be read ({reason}); give others"
        )
    count = len(pixels)
    notes = [*found.notes]
    if unreadable:
        notes.append(f"{unreadable} images could not be read and were left out ({reason})")
    if count + unreadable < len(found):
        notes.append(f"{count} of {len(found)} images are used; --limit sets how many")
    search = count
    if count >= SPLIT:
        search = min(count // 2, max(FEWEST, int(SEARCH_MACS // macs)))
    else:
        notes.append(
            f"{count} images are few: none is kept from the search, so nothing validates its "
            "result; give more with --data"
        )
    labels = None if found.labels is None else np.asarray(found.labels)[index]
    return TuneImages(
        np.stack(pixels), labels, search, found.text, len(found), unreadable, tuple(notes)
    )


def _source(recipe: Recipe, classes: int, data: tuple[str, ...]) -> Source:
    from tome_export.evaluation.find import find_data
    from tome_export.evaluation.source import ArraySource, Classes
    from tome_export.models.preprocess import IMAGE_SUFFIXES
    from tome_export.models.samples import MAX_PHOTOGRAPH_PIXELS, labelled_samples, sample_pixels

    if data != (SAMPLES,):
        names = recipe.label_names(classes)
        by_label = Classes(classes, names)
        try:
            return find_data(data, IMAGE_SUFFIXES, by_label)
        except InputError:
            # A flat folder has no labels, which is no fault here.
            folder = Path(data[0])
            if len(data) > 1 or not folder.is_dir() or any(p.is_dir() for p in folder.iterdir()):
                raise
            return find_data(data, IMAGE_SUFFIXES, None)
    labelled = labelled_samples(recipe)
    if labelled is not None:
        return ArraySource(labelled[0], labelled[1].astype(np.int32))
    return ArraySource(sample_pixels(recipe, MAX_PHOTOGRAPH_PIXELS), None)


def _read(
    source: Source, order: NDArray[Any], most: int, recipe: Recipe, progress: Progress
) -> tuple[list[NDArray[np.float32]], list[int], int, str]:
    """Images until there are enough: pixels, places in the source, unreadable, a reason."""
    from tome_export.models.preprocess import pixels_from_bytes

    pixels: list[NDArray[np.float32]] = []
    index: list[int] = []
    unreadable, reason = 0, ""
    wanted = min(most, len(source))
    for place in map(int, order):
        if len(pixels) == wanted:
            break
        item = source.item(place)
        try:
            data = item.load()
            if isinstance(data, bytes):
                data = pixels_from_bytes(data, item.name, recipe.preprocessing)
        except (InputError, OSError) as error:
            unreadable, reason = unreadable + 1, str(error)
            continue
        pixels.append(data)
        index.append(place)
        progress.detail(f"images: {len(pixels)}/{wanted}")
    return pixels, index, unreadable, reason


def sized(recipe: Recipe, input_size: tuple[int, int, int]) -> Recipe:
    """The recipe with the input size that the model has."""
    return replace(recipe, preprocessing=replace(recipe.preprocessing, input_size=input_size))
