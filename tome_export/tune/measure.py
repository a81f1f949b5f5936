"""What is counted of an image, and what ranks schedules: outputs beside the unmerged model's.

Targets bound the sum over the images of what is counted of each, which is at most 1. It is what a
user asks for, and with few images too coarse to rank by where it is whether an image is right. So
schedules are ranked by their damage, never negative and 0 for the unmerged model's own output:

    classes      right or wrong                            Kullback-Leibler divergence in nats
    similarity   cosine of features, correlation of maps   one minus it
    retrieval    the nearest neighbour is the unmerged's   one minus the cosine

A squared error would rank maps by those images whose map has the largest numbers. Pearson's
correlation of a map is the cosine of its numbers less their mean, so that one formula serves all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact.goal import Metric
from tome_export.data.metrics import correlations, cosines, unit_vectors
from tome_export.errors import InputError
from tome_export.spec import Activation

if TYPE_CHECKING:
    from torch import Tensor

    from tome_export.tune.images import TuneImages

Compare = Callable[..., NDArray[np.float64]]
"""What compares arrays."""

SAME = 1e-6
"""Difference of cosines within which two images are as near as each other, above rounding."""

FEWEST_NEIGHBOURS = 3
"""Images of which one can have another neighbour than before."""


class Measure(ABC):
    """Compares outputs with those of the unmerged model, image by image.

    Tensors of the argument ``reference`` are of the unmerged model, of the same images.
    """

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """What is counted."""

    def kept(self, output: Tensor) -> Tensor:
        """What is compared of a model's output ``[B, ...]``, images first."""
        return output.float()

    @abstractmethod
    def damage(self, output: Tensor, reference: Tensor) -> Tensor:
        """How far each image's output is from the unmerged model's ``[B]`` float64."""

    def difference(self, output: Tensor, reference: Tensor) -> Tensor | None:  # noqa: ARG002
        """Mean absolute difference of each image's map ``[B]``; None where there are no maps."""
        return None

    @abstractmethod
    def counted(self, output: Tensor, reference: Tensor, first: int, damage: Tensor) -> Tensor:
        """What is counted of each image ``[B]``, or what ``counted_of_part`` makes it of.

        Args:
            output: Of a batch.
            reference: Of the same batch.
            first: Index of the batch's first image.
            damage: Of the batch ``[B]``.
        """

    def counted_of_part(self, found: Tensor, reference: Tensor) -> Tensor:  # noqa: ARG002
        """What is counted of each image ``[n]``, from ``counted`` of all images of a part."""
        return found

    def of_unmerged(self, reference: Tensor) -> Tensor:
        """What is counted of the unmerged model itself ``[B]``."""
        return reference.new_ones(len(reference))

    def checked(self, images: TuneImages, reference: Tensor, *, targeted: bool) -> TuneImages:  # noqa: ARG002
        """The images, with notes where the measure tells little of them, or refused for that.

        ``targeted`` says that what is counted is the target.
        """
        return images

    def defined(self, reference: Tensor) -> Tensor:
        """The images ``[B]`` bool that can be compared."""
        return reference.new_ones(len(reference)).bool()


@dataclass(frozen=True)
class ClassMeasure(Measure):
    """Classes that stay right.

    Attributes:
        activation: ``softmax`` or ``sigmoid``.
        labels: Labels of all images ``[B]``; None to count agreement with the unmerged model.
    """

    activation: Activation = "softmax"
    labels: NDArray[Any] | None = None

    @property
    def metric(self) -> Metric:
        """See ``Measure``: labels say what is right, if there are any."""
        return "agreement" if self.labels is None else "top1"

    def kept(self, output: Tensor) -> Tensor:
        """Log probabilities ``[B, G, C]`` float64 of the C answers to each of G questions.

        It is one question of all classes, or of a sigmoid a no and a yes for each class.
        """
        import torch

        wide = output.double()
        if self.activation != "sigmoid":
            return wide.log_softmax(dim=1)[:, None]
        return torch.stack([torch.zeros_like(wide), wide], dim=2).log_softmax(dim=2)

    def damage(self, output: Tensor, reference: Tensor) -> Tensor:
        """See ``Measure``: the divergence of the probabilities from the unmerged model's."""
        # Rounding can take a divergence of zero below it.
        return (reference.exp() * (reference - output)).sum(dim=(1, 2)).clamp_min(0.0)

    def counted(self, output: Tensor, reference: Tensor, first: int, damage: Tensor) -> Tensor:  # noqa: ARG002
        """See ``Measure``: 1 where an image has the label, or all that the unmerged model says."""
        import torch

        expected = reference.argmax(dim=2)
        if self.labels is not None:
            labels = torch.from_numpy(self.labels[first : first + len(output)].astype("int64"))
            expected = labels.to(output.device)[:, None]
        if output.shape[1] > expected.shape[1]:
            # A label of one class, where each has a yes or no: that of the surest yes.
            return output[:, :, 1].argmax(dim=1) == expected[:, 0]
        return (output.argmax(dim=2) == expected).all(dim=1)

    def of_unmerged(self, reference: Tensor) -> Tensor:
        """See ``Measure``."""
        return self.counted(reference, reference, 0, reference)

    def checked(self, images: TuneImages, reference: Tensor, *, targeted: bool) -> TuneImages:
        """See ``Measure``: agreement could hardly fail where all images have one answer."""
        predicted = reference.argmax(dim=2)
        same = len(predicted) > 1 and bool((predicted == predicted[:1]).all())
        if self.labels is not None or not same:
            return images
        what = (
            f"the unmerged model says the same of all {len(predicted)} images, so agreement with "
            "it tells no schedule from another"
        )
        if targeted:
            raise InputError(
                f"{what}; give images with labels (class sub-folders), or more different ones, "
                "with --data"
            )
        return images.noted(f"{what}: schedules are told apart by damage")


@dataclass(frozen=True)
class SimilarityMeasure(Measure):
    """Similarity of features ``[B, C]`` or ``[B, P, C]``, or of maps ``[B, ...]``.

    Attributes:
        maps: Whether outputs are maps, whose numbers are compared less their mean.
    """

    maps: bool = False

    @property
    def metric(self) -> Metric:
        """See ``Measure``."""
        return "similarity"

    def damage(self, output: Tensor, reference: Tensor) -> Tensor:
        """See ``Measure``: one minus the cosine or correlation, of features of patches the mean.

        An output that has no direction counts as unlike any other.
        """
        similar = correlations if self.maps else cosines
        return (1 - self._of_arrays(similar, output, reference).nan_to_num(nan=0.0)).clamp_min(0.0)

    def difference(self, output: Tensor, reference: Tensor) -> Tensor | None:
        """See ``Measure``."""
        import torch

        if not self.maps:
            return None
        return (output - reference).abs().flatten(1).mean(dim=1, dtype=torch.float64)

    def counted(self, output: Tensor, reference: Tensor, first: int, damage: Tensor) -> Tensor:  # noqa: ARG002
        """See ``Measure``: the similarity."""
        return 1 - damage

    def defined(self, reference: Tensor) -> Tensor:
        """See ``Measure``: a constant map has no correlation, features of zeros no cosine."""
        similar = correlations if self.maps else cosines
        return self._of_arrays(similar, reference, reference).isfinite()

    def _of_arrays(self, compare: Compare, *tensors: Tensor) -> Tensor:
        import torch

        found = compare(*(one.cpu().numpy() for one in tensors))
        return torch.from_numpy(found).to(tensors[0].device)


@dataclass(frozen=True)
class RetrievalMeasure(SimilarityMeasure):
    """Whether images keep their nearest neighbour, by the cosine of their features ``[B, C]``.

    Each part of the images is searched on its own: features of the merged model among features of
    the merged model, as in a collection that is embedded anew.
    """

    @property
    def metric(self) -> Metric:
        """See ``Measure``."""
        return "retrieval"

    def counted(self, output: Tensor, reference: Tensor, first: int, damage: Tensor) -> Tensor:  # noqa: ARG002
        """See ``Measure``: the features, as neighbours are known once all of a part are."""
        return output

    def counted_of_part(self, found: Tensor, reference: Tensor) -> Tensor:
        """See ``Measure``: 1 where the neighbour is one that the unmerged model has no nearer."""
        nearest = self._cosines(found).argmax(dim=1, keepdim=True)
        unmerged = self._cosines(reference)
        return (unmerged.gather(1, nearest) >= unmerged.amax(dim=1, keepdim=True) - SAME)[:, 0]

    def checked(self, images: TuneImages, reference: Tensor, *, targeted: bool) -> TuneImages:  # noqa: ARG002
        """See ``Measure``: parts are to have enough images, and repeated ones are told of."""
        data = images.data
        first, repeated = 0, 0
        for part in (data.search, data.validation, data.held_out):
            if 0 < part < FEWEST_NEIGHBOURS:
                raise InputError(
                    f"--measure retrieval looks for the nearest neighbour among {part} images; "
                    f"expected {FEWEST_NEIGHBOURS} or more, give more images with --data"
                )
            if part:
                near = self._cosines(reference[first : first + part]).amax(dim=1)
                repeated += int((near >= 1 - SAME).sum())
            first += part
        if not repeated:
            return images
        return images.noted(
            f"{repeated} of {first} images have another with the same features, which stays their "
            "nearest neighbour however many tokens merge: retrieval flatters"
        )

    def _cosines(self, features: Tensor) -> Tensor:
        """Cosine of each of ``[n, C]`` to each ``[n, n]``; that to itself is below all others."""
        directions = self._of_arrays(unit_vectors, features).nan_to_num(nan=0.0)
        return (directions @ directions.T).fill_diagonal_(-2.0)


def comparable(
    measure: Measure, images: TuneImages, reference: Tensor
) -> tuple[TuneImages, Tensor]:
    """The images whose unmerged output can be compared with another, and those outputs."""
    defined = measure.defined(reference)
    if bool(defined.all()):
        return images, reference
    left = int((~defined).sum())
    what = (
        f"the unmerged model's output is constant or not finite for {left} of {len(defined)} "
        "images, so nothing can be similar to it"
    )
    mask = defined.cpu().numpy()
    if not mask[: images.data.search].any():
        raise InputError(f"{what}; give other images with --data")
    return images.where(mask).noted(f"{what}: they are left out"), reference[defined]
