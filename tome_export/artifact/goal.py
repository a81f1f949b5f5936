"""What a search is asked for: one target, how it is written, and what meets it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tome_export.artifact.schedule import TargetKind
from tome_export.errors import InputError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}

_ROUNDING = 1e-9
"""Slack of counts derived from shares, far below one image."""


@dataclass(frozen=True)
class Goal:
    """One target.

    Attributes:
        kind: What is bounded; the other side is made as good as it can be.
        value: Milliseconds, MACs per image or a share of them (see ``relative``), or percent.
        relative: ``target-macs`` as a percentage of the unmerged model's; ``min-accuracy`` as the
            change in points that is allowed against the unmerged model, zero or below.
    """

    kind: TargetKind
    value: float
    relative: bool = False

    @classmethod
    def min_accuracy(cls, text: str) -> Goal:
        """Read ``-0.5`` (at most half a point below the unmerged model) or ``97.2`` (percent).

        Raises:
            InputError: if the text is neither.
        """
        value = _number(text)
        relative = text.strip().startswith("-")
        if value is None or not (-100 <= value <= 0 if relative else 1 <= value <= 100):
            raise InputError(
                f"minimum accuracy is {text!r}; expected the drop that is allowed, in points, such "
                "as -0.5, or an accuracy from 1 to 100 percent such as 97.2"
            )
        return cls("min-accuracy", value, relative)

    @classmethod
    def target_macs(cls, text: str) -> Goal:
        """Read ``50%`` (of the unmerged model), ``8.7G``, ``9.5M`` or a plain number of MACs.

        Raises:
            InputError: if the text is none of these, or not above zero.
        """
        found = re.fullmatch(r"\s*([0-9.eE+]+)\s*([kmg%]?)\s*", text, re.IGNORECASE)
        value = _number(found[1]) if found else None
        if found is None or value is None or value <= 0 or (found[2] == "%" and value > 100):
            raise InputError(
                f"target MACs is {text!r}; expected a share of the unmerged model such as 50%, or "
                "MACs per image such as 8.7G or 9.5M"
            )
        if found[2] == "%":
            return cls("target-macs", value, relative=True)
        return cls("target-macs", value * _UNITS[found[2].lower()])

    @classmethod
    def target_latency(cls, value: float) -> Goal:
        """Milliseconds per batch.

        Raises:
            InputError: if that is not a number above zero.
        """
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"target latency is {value:g} ms; expected more than 0")
        return cls("target-latency-ms", value)

    def budget(self, unmerged: float) -> float | None:
        """Most cost that is allowed; None for an accuracy target.

        Args:
            unmerged: Cost of the unmerged model.
        """
        if self.kind == "min-accuracy":
            return None
        return self.value / 100 * unmerged if self.relative else self.value

    def needed(self, images: int, unmerged: int) -> int | None:
        """Images that must be right; None for a cost target.

        Args:
            images: How many there are.
            unmerged: How many of them the unmerged model gets right.
        """
        if self.kind != "min-accuracy":
            return None
        points = self.value / 100 * images
        return max(0, math.ceil((unmerged if self.relative else 0) + points - _ROUNDING))

    def __str__(self) -> str:
        if self.kind == "target-latency-ms":
            return f"latency of at most {self.value:g} ms"
        if self.kind == "target-macs":
            share = f"{self.value:g} % of the unmerged model's"
            return f"at most {share if self.relative else f'{self.value / 1e6:.2f} M'} MACs"
        if self.relative:
            return f"accuracy at most {-self.value:g} points below the unmerged model"
        return f"accuracy of at least {self.value:g} %"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
