"""The one target of a search or a calibration: how it is written, and what meets it."""

from __future__ import annotations

import math
import re
from typing import Literal

from tome_export.artifact.document import Part
from tome_export.errors import InputError

TargetKind = Literal["min-accuracy", "min-similarity", "target-latency-ms", "target-macs"]

Metric = Literal["top1", "agreement", "similarity", "retrieval"]
"""What counts as right: the label, or what the unmerged model or the largest member says; of models
without classes, how similar the output is to the unmerged model's, or the nearest neighbour."""

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}

_ROUNDING = 1e-9
"""Slack of counts derived from shares, far below one image."""


class Goal(Part):
    """One target; the other side is made as good as it can be.

    Attributes:
        kind: What is bounded.
        value: Milliseconds, MACs per image or a share of them (see ``relative``), percent, or for
            ``min-similarity`` a mean from 0 to 1.
        relative: ``target-macs`` as a percentage of the unmerged model's; ``min-accuracy`` as the
            change in points that is allowed against the unmerged model, zero or below.
    """

    kind: TargetKind
    value: float
    relative: bool

    @classmethod
    def min_accuracy(cls, text: str) -> Goal:
        """Read ``-0.5`` (at most half a point below the unmerged model) or ``97.2`` (percent)."""
        value, relative = _number(text), text.strip().startswith("-")
        if not (-100 <= value <= 0 if relative else 1 <= value <= 100):
            raise InputError(
                f"minimum accuracy is {text!r}; expected the drop that is allowed, in points, such "
                "as -0.5, or an accuracy from 1 to 100 percent such as 97.2"
            )
        return cls(kind="min-accuracy", value=value, relative=relative)

    @classmethod
    def target_macs(cls, text: str) -> Goal:
        """Read ``50%`` (of the unmerged model), ``8.7G``, ``9.5M`` or a plain number of MACs."""
        found = re.fullmatch(r"\s*([0-9.eE+]+)\s*([kmg%]?)\s*", text, re.IGNORECASE)
        number, unit = found.groups() if found else ("", "")
        value, relative = _number(number), unit == "%"
        if not 0 < value <= (100 if relative else math.inf):
            raise InputError(
                f"target MACs is {text!r}; expected a share of the unmerged model such as 50%, or "
                "MACs per image such as 8.7G or 9.5M"
            )
        value *= 1.0 if relative else _UNITS[unit.lower()]
        return cls(kind="target-macs", value=value, relative=relative)

    @classmethod
    def target_latency(cls, value: float) -> Goal:
        """Milliseconds per batch."""
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"target latency is {value:g} ms; expected more than 0")
        return cls(kind="target-latency-ms", value=value, relative=False)

    @classmethod
    def min_similarity(cls, value: float) -> Goal:
        """Mean over the images of what is counted of each, 0 to 1."""
        if not 0 < value <= 1:
            raise InputError(
                f"minimum similarity is {value:g}; expected a mean above 0, at most 1, such as 0.98"
            )
        return cls(kind="min-similarity", value=value, relative=False)

    @property
    def bounds_cost(self) -> bool:
        """Whether a cost is bounded, and not what is counted of the images."""
        return self.kind in ("target-macs", "target-latency-ms")

    def budget(self, unmerged: float) -> float | None:
        """Most cost that is allowed, from that of the unmerged model; None if none is bounded."""
        if not self.bounds_cost:
            return None
        return self.value / 100 * unmerged if self.relative else self.value

    def needed(self, images: int, unmerged: float) -> float | None:
        """The least sum over the images of what is counted, each at most 1; None for a cost.

        It is how many must be right, where the unmerged model has so many.
        """
        if self.bounds_cost:
            return None
        if self.kind == "min-similarity":
            return self.value * images - _ROUNDING
        points = self.value / 100 * images
        return max(0, math.ceil((unmerged if self.relative else 0) + points - _ROUNDING))

    def __str__(self) -> str:
        if self.kind == "target-latency-ms":
            return f"latency of at most {self.value:g} ms"
        if self.kind == "target-macs":
            share = f"{self.value:g} % of the unmerged model's"
            return f"at most {share if self.relative else f'{self.value / 1e6:.2f} M'} MACs"
        if self.kind == "min-similarity":
            return f"similarity of at least {self.value:g}"
        if self.relative:
            return f"accuracy at most {-self.value:g} points below the unmerged model"
        return f"accuracy of at least {self.value:g} %"


def _number(text: str) -> float:
    """A finite number; NaN, which no bound holds for, of any other text."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
