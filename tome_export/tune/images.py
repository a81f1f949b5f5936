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

from tome_export.artifact.schedule import TuneData
from tome_export.data.decode import pixels_or_reason
from tome_export.data.find import SAMPLES, find_data, labelled_source
from tome_export.data.labels import Classes
from tome_export.data.preprocess import pixels_from_bytes
from tome_export.data.samples import MAX_PHOTOGRAPH_PIXELS, sample_pixels
from tome_export.data.source import Source, samples_source
from tome_export.errors import InputError, UsageError
from tome_export.progress import Progress

if TYPE_CHECKING:
    from tome_export.models import Recipe
    from tome_export.spec import Preprocessing

LIMIT = 2048
"""Most images taken where the user sets no limit."""

IMAGE_MACS, SEARCH_MACS = 4e12, 1e12
"""MACs, at the unmerged model's cost, of one pass over all images that are taken where the user
sets no limit, and over the images of the search."""

GRADED_MACS = 2.5e11
"""The same of the search where what is counted is graded, and not right or wrong: means of fewer
images tell schedules apart."""

FEWEST = 32
"""Images below which no set is made smaller to save MACs."""

SPLIT, HOLD_OUT = 64, 300
"""Images from which on some are kept from the search, for validation, and from which on half of
those are kept from the choice as well."""

MOST_BYTES = 4 << 30
"""Most memory that the images may take."""


@dataclass(frozen=True)
class TuneImages:
    """Images in the order in which they are used: search, validation, held out.

    Nothing looks at those held out but the last measurement of what was chosen.

    Attributes:
        pixels: ``[B, C, H, W]`` float32.
        labels: ``[B]``; None where there is only the unmerged model to compare with.
        data: What the document says of them: how many each part has, and where they are from.
    """

    pixels: NDArray[np.float32]
    labels: NDArray[Any] | None
    data: TuneData

    @property
    def chosen_on(self) -> int:
        """Images, from the first on, that the choice looks at: of search and validation."""
        return self.data.search + self.data.validation

    def noted(self, note: str) -> TuneImages:
        """The same images with one more note."""
        notes = (*self.data.notes, note)
        return replace(self, data=self.data.model_copy(update={"notes": notes}))

    def first(self, count: int) -> TuneImages:
        """The first images alone, as the time limit leaves no more; split in the same parts."""
        whole = len(self.pixels)
        search = max(1, self.data.search * count // whole)
        chosen_on = max(1, self.chosen_on * count // whole)
        fewer = self._some(slice(count), search, chosen_on, count)
        return fewer.noted(f"{count} of {whole} images are used: the time limit leaves no more")

    def where(self, mask: NDArray[np.bool_]) -> TuneImages:
        """The images of ``mask [B]`` alone, each in the part that it was in."""
        parts = (mask[: self.data.search], mask[: self.chosen_on], mask)
        return self._some(mask, *(int(part.sum()) for part in parts))

    def _some(self, index: Any, search: int, chosen_on: int, count: int) -> TuneImages:
        """Some of the images; the first ``search`` and ``chosen_on`` of them are those parts."""
        parts = {
            "search": search, "validation": chosen_on - search, "held_out": count - chosen_on
        }  # fmt: skip
        labels = None if self.labels is None else self.labels[index]
        return TuneImages(self.pixels[index], labels, self.data.model_copy(update=parts))


def read_images(
    source: Source,
    preprocessing: Preprocessing,
    macs: int,
    limit: int | None,
    seed: int,
    progress: Progress,
    until: float = math.inf,
    output_bytes: int = 0,
    *,
    graded: bool = False,
) -> TuneImages:
    """Read images, drawn and ordered by the seed, and split them.

    ``macs`` are those per image of the unmerged model, and ``output_bytes`` what is kept of its
    outputs for each; ``limit`` None reads as many as a search in minutes can take. After ``until``,
    in seconds of ``time.monotonic``, no more than ``FEWEST`` are read. ``graded`` says that what is
    counted is not right or wrong.
    """
    shape = preprocessing.input_size
    room = MOST_BYTES // (4 * math.prod(shape) + output_bytes)
    most = limit or int(min(LIMIT, max(FEWEST, IMAGE_MACS // macs), max(1, room)))
    wanted = min(most, len(source))
    if wanted > room:
        outputs = f" and outputs of {output_bytes >> 20} MiB" if output_bytes >> 20 else ""
        raise UsageError(
            f"--limit is {most}; {wanted} images of {'x'.join(map(str, shape))} numbers{outputs} "
            f"take more than {MOST_BYTES >> 30} GiB, give at most {room}"
        )
    decode = partial(pixels_from_bytes, preprocessing=preprocessing)
    pixels = np.empty((wanted, *shape), np.float32)
    index: list[int] = []
    unreadable, reason = 0, ""
    for place in map(int, np.random.default_rng(seed).permutation(len(source))):
        if len(index) == wanted or (len(index) >= FEWEST and time.monotonic() >= until):
            break
        found = pixels_or_reason(source.items((place,))[0], decode)
        if isinstance(found, str):
            unreadable, reason = unreadable + 1, found
            continue
        pixels[len(index)] = found
        index.append(place)
        progress.step("images", len(index), wanted)
    count, notes = len(index), [*source.notes]
    if not count:
        raise InputError(
            f"none of the {len(source)} images of {source.text} can be read ({reason}); give others"
        )
    if unreadable:
        notes.append(f"{unreadable} images could not be read and were left out ({reason})")
    if count + unreadable < len(source):
        late = " and --time-limit" if count < min(most, len(source) - unreadable) else ""
        sets = "set" if late else "sets"
        notes.append(f"{count} of {len(source)} images are used; --limit{late} {sets} how many")
    search = chosen_on = count
    if count >= SPLIT:
        search = min(count // 2, max(FEWEST, int((GRADED_MACS if graded else SEARCH_MACS) // macs)))
        rest = (count - search) // 2
        chosen_on = search + (min(search, rest) if graded else rest) if count >= HOLD_OUT else count
    else:
        notes.append(
            f"{count} images are few: none is kept from the search, so nothing validates its "
            "result; give more with --data"
        )
    data = TuneData(
        source=source.text,
        available=len(source),
        search=search,
        validation=chosen_on - search,
        held_out=count - chosen_on,
        unreadable_count=unreadable,
        notes=tuple(notes),
    )
    return TuneImages(pixels[:count], None if source.labels is None else source.labels[index], data)


def tuning_source(
    recipe: Recipe, classes: Classes | None, data: tuple[str, ...], labels: Path | None
) -> Source:
    """The images that a user named; samples have labels if these are of the model's classes.

    ``classes`` are None for a model that has none.
    """
    if data != (SAMPLES,):
        return find_data(data, classes, labels)
    if labels is not None:
        raise UsageError("--labels are for a folder of images; the samples have their own")
    # Labels of the recipe's own classes, not of a checkpoint's.
    own = classes is not None and classes.names == recipe.output.labels
    labelled = labelled_source(recipe) if own else None
    return labelled or samples_source(sample_pixels(recipe, MAX_PHOTOGRAPH_PIXELS), None)
