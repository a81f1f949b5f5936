"""Numbers as people read them, on the page and in the terminal."""

from __future__ import annotations

import math

NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def macs_unit(largest: float) -> tuple[float, str]:
    """What to divide by so that the largest of some counts reads well, and the unit's name."""
    return (1e9, "GMACs") if largest >= 1e9 else (1e6, "MMACs")


def macs(count: float) -> str:
    """Multiply-accumulates with their unit."""
    scale, unit = macs_unit(count)
    return f"{count / scale:,.2f} {unit}"


def short_macs(count: float) -> str:
    """Multiply-accumulates without their name, which a label or header has."""
    return macs(count).removesuffix("MACs")


def size(count: float | None) -> str:
    """Bytes in decimal units, as file managers show them."""
    if count is None:
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} bytes"


def number(value: float, spec: str, otherwise: str = "not finite") -> str:
    """A number by its format, if it is finite."""
    return format(value, spec) if math.isfinite(value) else otherwise


def small(value: float) -> str:
    """An error or a margin, with two digits that count; a dash where it is not finite."""
    return "0" if value == 0 else number(value, ".1e", NONE)


def fixed(value: float, digits: int = 2) -> str:
    """A plain number; a dash where it is not finite."""
    return number(value, f",.{digits}f", NONE)


def milliseconds(value: float | None) -> str:
    """A duration with at least three digits that count."""
    if value is None:
        return NONE
    return f"{value:,.{3 if value < 1 else 2 if value < 100 else 1}f}"


def times(value: float) -> str:
    """A ratio with its sign."""
    return f"{value:.2f}{TIMES}"


def span(low: str, high: str) -> str:
    """From one to the other."""
    return f"{low}{NONE}{high}"


def percent(share: float | None, digits: int | None = None) -> str:
    """A share of one; a dash for None."""
    if share is None:
        return NONE
    if not math.isfinite(share):
        return "not finite"
    text = f"{100 * share:.{2 if digits is None else digits}f}"
    return (text if digits is not None else text.rstrip("0").rstrip(".")) + " %"


def scored(value: float, metric: str, digits: int | None = None) -> str:
    """What is counted of images, by ``goal.Metric``: a mean similarity, or a share in percent."""
    return number(value, ".4f") if metric == "similarity" else percent(value, digits)


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{100 * difference:+.2f}".replace("-", MINUS)
    return "0.00" if text in ("+0.00", f"{MINUS}0.00") else text


def counted(count: int, noun: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
