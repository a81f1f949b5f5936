"""What a page is made of; the template gives each part its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph; its tone is empty, or ``bad`` for what is wrong."""

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
class Chart:
    """A chart in both sizes of ``plot``, as markup, and what screen readers say of it."""

    kind: ClassVar[str] = "chart"
    caption: str
    svgs: tuple[str, ...]


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """One image with the drawing of its last layer.

    Attributes:
        name: Shown below it.
        width: Pixels of the image as the model sees it.
        height: Likewise.
        href: The image as a URL that holds it.
        paths: Outline, fill and stroke of each token of several patches.
        dropped: Dropped patches as SVG elements; empty if there are none.
        stroke: Width of an outline, in pixels of the image.
        caption: What the drawing shows, for those who cannot see it.
    """

    name: str
    width: int
    height: int
    href: str
    paths: Sequence[tuple[str, str, str]]
    dropped: str
    stroke: float
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures of merged tokens that a slider leads through the layers.

    Attributes:
        pictures: The pictures.
        data: What the page's script draws from.
        depth: Number of layers.
        last: What the slider says at the last layer.
    """

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]
    data: Mapping[str, Any]
    depth: int
    last: str


Block = Text | Table | Chart | Commands | Gallery


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
    blocks: Sequence[Block] = ()
    command: str | None = None
    adds: str = ""
