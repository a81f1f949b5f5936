"""How many tokens each layer merges: ToMe's constant and inflected schedules, and free lists.

Those of videos too, whose frames are joined on the way (TempMe, arXiv 2409.01156).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tome_export.errors import InputError
from tome_export.merge.spec import clamp_r

INFLECTION = {"constant": 0.0, "decreasing": -1.0, "increasing": 1.0}
"""Named schedules and their inflection (ToMe, section 4.1 and appendix C)."""


@dataclass(frozen=True)
class LayerTokens:
    """Token counts of one layer: ``tokens_in - r == tokens_out``.

    Attributes:
        tokens_in: Tokens that enter the layer.
        r: Tokens removed.
        tokens_out: Tokens that the next layer sees.
        behind_block: Whether they are removed behind the MLP, and not in front of it.
    """

    tokens_in: int
    r: int
    tokens_out: int
    behind_block: bool = False

    @property
    def sequences(self) -> int:
        """Sequences of one input that the block works on, each for itself."""
        return 1

    @property
    def attended(self) -> int:
        """Tokens of a sequence that attention sees."""
        return self.tokens_in

    @property
    def total_in(self) -> int:
        """Tokens of one image or video that enter the layer."""
        return self.tokens_in

    @property
    def total_out(self) -> int:
        """Tokens of one image or video that leave the layer."""
        return self.sequences * self.tokens_out


@dataclass(frozen=True, kw_only=True)
class ClipTokens(LayerTokens):
    """Token counts of one layer, per clip; a clip is what attention sees as one sequence.

    ``joined * tokens_in - cross - r == tokens_out``.

    Attributes:
        clips: Clips of one video during attention.
        joined: Clips that became one ahead of the attention; 1 for none.
        cross: Tokens merged across them, ahead of the attention.
        prefix: Protected tokens of each clip, at its front.
    """

    clips: int
    joined: int
    cross: int
    prefix: int

    @property
    def sequences(self) -> int:
        """Sequences of one video that the block works on."""
        return self.clips

    @property
    def total_in(self) -> int:
        """Tokens of one video that enter the layer."""
        return self.clips * self.joined * self.tokens_in

    @property
    def attended(self) -> int:
        """Tokens of one clip that attention sees."""
        return self.joined * self.tokens_in - self.cross


@dataclass(frozen=True)
class FrameMerging:
    """Where and how far the frames of a video are joined and merged.

    Attributes:
        layers: Blocks, counted from 0, that join neighbouring clips ahead of their attention.
        frames: For each of them, how many neighbouring clips become one.
        proportions: Percent of a joined clip's tokens to merge across its parts, and percent of
            what is left to merge by keys behind the attention (TempMe, section 3.3).
        position: Add a learned vector per clip between matching and averaging.

    Raises:
        InputError: if layers and frames do not belong together, or a number is out of range.
    """

    layers: tuple[int, ...] = (8, 9, 10)
    frames: tuple[int, ...] = (2, 2, 3)
    proportions: tuple[float, float] = (30, 10)
    position: bool = True

    def __post_init__(self) -> None:
        layers, frames = _listed(self.layers), _listed(self.frames)
        if not self.layers:
            raise InputError("no layer joins frames; expected layers in order, such as 8,9,10")
        if min(self.layers) < 0 or any(
            a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)
        ):
            raise InputError(
                f"layers that join frames are {layers}; expected them in rising order, counted "
                "from 0, such as 8,9,10"
            )
        if len(self.frames) != len(self.layers):
            raise InputError(
                f"{len(self.layers)} layers ({layers}) join {len(self.frames)} numbers of frames "
                f"({frames}); expected one number per layer"
            )
        if min(self.frames) < 2:
            raise InputError(
                f"clips to join are {frames}; expected 2 or more for every layer, such as 2,2,3"
            )
        if len(self.proportions) != 2 or not all(0 <= p <= 100 for p in self.proportions):
            raise InputError(
                f"proportions are {_listed(self.proportions)}; expected two percentages from 0 to "
                "100, across frames and inside them, such as 30,10"
            )

    @classmethod
    def parse(cls, layers: str, frames: str, proportions: str, position: bool) -> FrameMerging:
        """Read the command line's lists, such as ``8,9,10``, ``2,2,3`` and ``30,10``.

        Raises:
            InputError: if one is not a list of numbers, or they do not belong together.
        """
        inter = _numbers(proportions, "proportions", "30,10", float)
        if len(inter) != 2:
            raise InputError(
                f"proportions are {proportions!r}; expected two percentages, across frames and "
                "inside them, such as 30,10"
            )
        return cls(
            tuple(int(v) for v in _numbers(layers, "layers that join frames", "8,9,10", int)),
            tuple(int(v) for v in _numbers(frames, "clips to join", "2,2,3", int)),
            (inter[0], inter[1]),
            position,
        )

    def check(self, depth: int, frames: int) -> None:
        """Refuse a model or a number of frames that this does not fit.

        Args:
            depth: Number of blocks.
            frames: Frames of one video.

        Raises:
            InputError: naming what does not fit.
        """
        if self.layers[-1] >= depth:
            raise InputError(
                f"layer {self.layers[-1]} is to join frames; the model has layers 0 to {depth - 1}"
            )
        product = 1
        for count in self.frames:
            product *= count
        if frames % product:
            raise InputError(
                f"{frames} frames cannot be joined {_listed(self.frames)} at a time; expected a "
                f"multiple of {product}"
            )

    def clips_entering(self, frames: int) -> dict[int, int]:
        """For each layer that joins, how many clips of one video enter it.

        Args:
            frames: Frames of one video.
        """
        entering, clips = {}, frames
        for layer, joined in zip(self.layers, self.frames, strict=True):
            entering[layer], clips = clips, clips // joined
        return entering

    def __str__(self) -> str:
        position = "" if self.position else ", no frame position"
        return (
            f"layers {_listed(self.layers)} join {_listed(self.frames)} clips, "
            f"{_listed(self.proportions)} %{position}"
        )


@dataclass(frozen=True)
class VideoOptions:
    """What a video tower is to take and how it joins frames.

    Attributes:
        frames: Frames of one video; None for the recipe's own number.
        merging: Where frames are joined; None for never.
    """

    frames: int | None = None
    merging: FrameMerging | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise InputError(f"{self.frames} frames were asked for; expected 1 or more")


@dataclass(frozen=True)
class Schedule:
    """Tokens to merge per layer, before clamping.

    Either ``r`` with ``inflect`` in [-1, 1] (the mean over layers is r; -1 merges early, +1 late),
    or ``per_layer``, which is padded with zeros to the model's depth. With ``frames``, of videos
    only, that is for the layers ahead of the first that joins frames.
    """

    r: int = 0
    inflect: float = 0.0
    per_layer: tuple[int, ...] | None = None
    frames: FrameMerging | None = None

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
            limit: The most tokens a layer can remove, of its tokens and prefix; None for the
                limit of bipartite matching, half of those that are not protected.
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
        frames = "" if self.frames is None else f"; {self.frames}"
        if self.per_layer is not None:
            return ",".join(str(r) for r in self.per_layer) + frames
        names = {value: name for name, value in INFLECTION.items()}
        return f"r={self.r} {names.get(self.inflect, f'inflect={self.inflect:g}')}{frames}"


def clip_tokens(
    resolved: Sequence[int], merging: FrameMerging | None, frames: int, tokens: int, prefix: int
) -> tuple[ClipTokens, ...]:
    """Token counts of every layer of a video tower (TempMe, section 3.3).

    Layers ahead of the first that joins merge the scheduled number of tokens inside each frame;
    from it on the proportions say how many. Products are truncated as in the public code.

    Args:
        resolved: Tokens asked to be merged in each layer; those from the first joining layer on do
            not count.
        merging: Where frames are joined; None for never.
        frames: Frames of one video.
        tokens: Tokens N of one frame that enter the first block, protected ones included.
        prefix: Protected tokens of one frame.

    Raises:
        InputError: if the merging does not fit the depth or the frames.
    """
    if merging is not None:
        merging.check(len(resolved), frames)
    joins = dict(zip(merging.layers, merging.frames, strict=True)) if merging else {}
    inter, intra = (p / 100 for p in merging.proportions) if merging else (0.0, 0.0)
    first = merging.layers[0] if merging else len(resolved)
    clips, layers = frames, []
    for layer, wanted in enumerate(resolved):
        joined = joins.get(layer, 1)
        clips, prefix, whole = clips // joined, prefix * joined, tokens * joined
        cross = clamp_r(whole, int(whole * inter), prefix) if joined > 1 else 0
        asked = wanted if layer < first else int((whole - cross) * intra)
        r = clamp_r(whole - cross, asked, prefix)
        left = whole - cross - r
        counts = ClipTokens(tokens, r, left, clips=clips, joined=joined, cross=cross, prefix=prefix)
        layers.append(counts)
        tokens = left
    return tuple(layers)


def unmerged_end(layers: Sequence[ClipTokens]) -> tuple[ClipTokens, ...]:
    """The layers without the last one's merge behind its attention.

    For towers whose output is read from tokens that the clips only are attended to by: what the
    last merge makes is read by nobody.
    """
    *rest, last = layers
    return (*rest, replace(last, r=0, tokens_out=last.attended))


def _numbers(text: str, what: str, example: str, kind: type) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{what} are {text!r}; expected numbers such as {example}") from None


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
