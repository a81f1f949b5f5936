"""Numbers as people read them, on the page and in the terminal."""

from __future__ import annotations

import math

NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def macs(count: float) -> str:
    """Multiply-accumulates with their unit."""
    scale, unit = macs_unit(count)
    return f"{count / scale:,.2f} {unit}"


def macs_unit(largest: float) -> tuple[float, str]:
    """What to divide by so that the largest of some counts reads well, and the unit's name."""
    return (1e9, "GMACs") if largest >= 1e9 else (1e6, "MMACs")


def size(count: float | None) -> str:
    """Bytes in decimal units, as file managers show them."""
    if count is None:
        return NONE
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} bytes"


def small(value: float) -> str:
    """An error or a margin, with two digits that count; a dash where it is not finite."""
    if not math.isfinite(value):
        return NONE
    return "0" if value == 0 else f"{value:.1e}"


def fixed(value: float, digits: int = 2) -> str:
    """A plain number; a dash where it is not finite."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else NONE


def milliseconds(value: float | None) -> str:
    """A duration with at least three digits that count."""
    if value is None:
        return NONE
    return f"{value:,.3f}" if value < 1 else f"{value:,.2f}" if value < 100 else f"{value:,.1f}"


def times(value: float) -> str:
    """A ratio with its sign."""
    return f"{value:.2f}{TIMES}"


def span(low: str, high: str) -> str:
    """From one to the other."""
    return f"{low}{NONE}{high}"


def percent(share: float | None, digits: int | None = 1) -> str:
    """A share of one.

    Args:
        share: The share; None for a dash.
        digits: Decimals; None for as many as it needs, at most two.
    """
    if share is None:
        return NONE
    if digits is None:
        return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"
    return f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{100 * difference:+.2f}".replace("-", MINUS)
    return "0.00" if text in ("+0.00", f"{MINUS}0.00") else text


def counted(count: int, noun: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
