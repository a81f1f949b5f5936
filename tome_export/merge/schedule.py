"""How many tokens each layer merges: ToMe's constant and inflected schedules, and free lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tome_export.errors import InputError
from tome_export.merge.spec import clamp_r

INFLECTION = {"constant": 0.0, "decreasing": -1.0, "increasing": 1.0}
"""Named schedules and their inflection (ToMe, section 4.1 and appendix C)."""


@dataclass(frozen=True)
class LayerTokens:
    """Token counts of one layer, per sequence: ``joined * tokens_in - cross - r == tokens_out``.

    An image is one sequence. A model that takes several frames begins with a sequence per frame;
    a layer can join neighbouring ones ahead of its attention, and merge tokens across them there.

    Attributes:
        tokens_in: Tokens of a sequence that enters the layer.
        r: Tokens removed behind the attention.
        tokens_out: Tokens of a sequence that the next layer sees.
        behind_block: Whether they are removed behind the MLP, and not in front of it.
        sequences: Sequences of one input during attention.
        joined: Sequences that became one ahead of the attention; 1 for none.
        cross: Tokens merged across them, ahead of the attention.
    """

    tokens_in: int
    r: int
    tokens_out: int
    behind_block: bool = False
    sequences: int = 1
    joined: int = 1
    cross: int = 0

    @property
    def attended(self) -> int:
        """Tokens of a sequence that attention sees."""
        return self.joined * self.tokens_in - self.cross

    @property
    def total_in(self) -> int:
        """Tokens of all sequences that enter the layer."""
        return self.sequences * self.joined * self.tokens_in

    @property
    def total_out(self) -> int:
        """Tokens of all sequences that leave the layer."""
        return self.sequences * self.tokens_out


@dataclass(frozen=True)
class Schedule:
    """Tokens to merge per layer, before clamping.

    Either ``r`` with ``inflect`` in [-1, 1] (the mean over layers is r; -1 merges early, +1 late),
    or ``per_layer``, which is padded with zeros to the model's depth.
    """

    r: int = 0
    inflect: float = 0.0
    per_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for value in self.per_layer if self.per_layer is not None else (self.r,):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"r is {value!r}; expected a whole number of tokens, 0 or more")
            if value < 0:
                raise InputError(f"r is {value}; expected 0 or more tokens to merge per layer")
        if not -1.0 <= self.inflect <= 1.0:
            raise InputError(
                f"inflection is {self.inflect}; expected -1 (decreasing) to 1 (increasing)"
            )

    @classmethod
    def of(cls, value: int | tuple[int, float] | list[int] | Schedule) -> Schedule:
        """Read the forms of the official code: r, a tuple (r, inflect), or a list per layer.

        Raises:
            InputError: if a number is negative or not whole, or the inflection out of range.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, int):
            return cls(r=value)
        if isinstance(value, list):
            return cls(per_layer=tuple(value))
        if isinstance(value, tuple) and len(value) == 2:
            r, inflect = value
            if not isinstance(inflect, int | float):
                raise InputError(f"inflection is {inflect!r}; expected a number from -1 to 1")
            return cls(r=r, inflect=float(inflect))
        raise InputError(f"schedule is {value!r}; expected r, (r, inflection) or a list of r")

    @classmethod
    def parse(cls, text: str, r: int | None) -> Schedule:
        """Read the command line's ``--schedule`` with its ``--r``.

        Args:
            text: ``constant``, ``decreasing``, ``increasing``, or numbers such as ``12,10,8``.
            r: Mean tokens merged per layer; None with a list of numbers.

        Raises:
            InputError: if the text is none of these, or both r and a list are given.
        """
        if text in INFLECTION:
            return cls(r=0 if r is None else r, inflect=INFLECTION[text])
        try:
            numbers = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise InputError(
                f"schedule is {text!r}; expected {', '.join(INFLECTION)}, or whole numbers "
                "per layer such as 12,10,8"
            ) from None
        if r is not None:
            raise InputError(
                f"schedule {text!r} already gives r for every layer; drop --r {r} or the schedule"
            )
        return cls(per_layer=numbers)

    def resolve(self, depth: int) -> tuple[int, ...]:
        """Tokens asked to be merged in each of ``depth`` layers, before clamping.

        The arithmetic, truncation included, is that of the official implementation's
        ``parse_r``: linear from ``int(r (1 - inflect))`` to ``2r`` minus that.

        Raises:
            InputError: if a list is longer than the depth.
        """
        if self.per_layer is not None:
            if len(self.per_layer) > depth:
                raise InputError(
                    f"schedule has {len(self.per_layer)} entries; the model has {depth} layers, "
                    "give at most one entry per layer"
                )
            return self.per_layer + (0,) * (depth - len(self.per_layer))
        first = int(self.r * (1.0 - self.inflect))
        step = (2 * self.r - 2 * first) / (depth - 1) if depth > 1 else 0.0
        return tuple(int(first + step * layer) for layer in range(depth))

    def of_one_frame(self) -> Schedule:
        """The schedule, for a model that takes one image.

        Raises:
            InputError: if it joins the tokens of several frames.
        """
        return self

    def tokens(
        self,
        depth: int,
        tokens: int,
        prefix: int,
        limit: Callable[[int, int], int] | None = None,
        *,
        behind_block: bool = False,
    ) -> tuple[LayerTokens, ...]:
        """Clamped token counts of every layer.

        Args:
            depth: Number of transformer blocks.
            tokens: Tokens N that enter the first block, prefix tokens included.
            prefix: Protected tokens at the front.
            limit: The most tokens a layer can remove, of its tokens and prefix; None for the limit
                of bipartite matching.
            behind_block: See ``LayerTokens``.
        """
        layers = []
        for wanted in self.resolve(depth):
            most = clamp_r(tokens, tokens, prefix) if limit is None else limit(tokens, prefix)
            r = max(0, min(wanted, most))
            layers.append(LayerTokens(tokens, r, tokens - r, behind_block))
            tokens -= r
        return tuple(layers)

    def __str__(self) -> str:
        if self.per_layer is not None:
            return ",".join(str(r) for r in self.per_layer)
        names = {value: name for name, value in INFLECTION.items()}
        return f"r={self.r} {names.get(self.inflect, f'inflect={self.inflect:g}')}"
