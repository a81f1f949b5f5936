"""What a page is made of; the template gives each part its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tome_export.report.plot import Chart


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Its words.
        tone: Empty, ``bad`` for what is wrong, or ``note`` for the small print.
    """

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption for those who cannot see the chart beside it.

    Attributes:
        caption: What it holds.
        headers: One per column.
        rows: Cells as text; the first of a row names it.
        sides: ``l`` or ``r`` per column; all to the right but the first where it is empty.
        marked: Indices of rows that stand out.
    """

    kind: ClassVar[str] = "table"
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    sides: str = ""
    marked: frozenset[int] = frozenset()

    @property
    def alignment(self) -> str:
        """``l`` or ``r`` of each column."""
        return self.sides or "l" + "r" * (len(self.headers) - 1)


@dataclass(frozen=True)
class Drawing:
    """A chart."""

    kind: ClassVar[str] = "drawing"
    chart: Chart


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Pictures of merged tokens that a slider leads through the layers.

    Attributes:
        pictures: See ``report.pictures``.
        data: What the page's script draws from.
        depth: Number of layers.
        last: What the slider says at the last layer.
    """

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Any]
    data: Mapping[str, Any]
    depth: int
    last: str


Block = Text | Table | Drawing | Commands | Gallery


@dataclass(frozen=True)
class Section:
    """A part of the page with a title.

    Attributes:
        name: Its anchor.
        title: Shown.
        blocks: What it holds.
        command: Where there is no data: the command that adds it.
        adds: What that command adds, as the end of a sentence.
    """

    name: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    command: str | None = None
    adds: str = ""
