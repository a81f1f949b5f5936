"""Plain values that travel between the stages: no torch, no numpy, nothing heavy."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from tome_export.errors import InputError, UsageError

Precision = Literal["fp32", "fp16", "bf16"]
Lowering = Literal["index_add", "matmul"]
MergeOp = Literal["auto", Lowering, "plugin"]
AttentionForm = Literal["auto", "fused", "fused-fp32", "parts"]
BackendName = Literal["tensorrt", "tensorrt-rtx"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Resize = Literal["crop", "squash", "letterbox", "pad"]
CropOffset = Literal["round", "floor"]
InputForm = Literal["float32", "uint8", "uint8-nchw"]
"""How pixel values are handed to a graph: ``float32`` is ``[B, C, H, W]``, scaled and normalised;
``uint8`` is ``[B, H, W, C]``, an image's own pixels; ``uint8-nchw`` the same, ``[B, C, H, W]``."""
SelectFeature = Literal["patch", "cls_patch"]
Activation = Literal["softmax", "sigmoid", "none"]
OutputKind = Literal["classes", "features", "map"]
"""What the main output is: one number per class ``[B, K]``, features of the image or of its tokens
``[B, ...]``, or what a model's own head makes of the grid of patches, such as a depth map."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
INPUT_FORMS: tuple[InputForm, ...] = get_args(InputForm)

TOWERS = ("llava",)
SELECT_FEATURES: tuple[SelectFeature, ...] = get_args(SelectFeature)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
"""What makes scores of logits: ``softmax`` of one class out of several, ``sigmoid`` of a yes or no
for each class, which one logit always is, ``none`` of the numbers of a regression."""

INPUT_NAME = "pixel_values"
LOGITS, FEATURES = "logits", "features"
SOURCE_MAP, ENTROPY = "source_map", "entropy"


OPSETS = (17, 23)
"""Lowest and highest ONNX opset of a graph; the highest, the default, has Attention."""

BF16_OPSET = 22
"""First opset whose convolution takes bfloat16."""


def lowering_of(merge_op: MergeOp) -> Lowering:
    """The lowering behind a merge op; ``matmul`` is that of nodes for the plugin too."""
    return next((name for name in LOWERINGS if name == merge_op), "matmul")


def check_opset(opset: int, precision: Precision, attention: AttentionForm) -> None:
    """Refuse what cannot be written in an opset."""
    least, most = OPSETS
    if not least <= opset <= most:
        raise UsageError(f"opset is {opset}; expected {least} to {most}")
    if attention.startswith("fused") and opset < most:
        raise UsageError(
            f"--attention {attention} is an operator of opset {most}, and --opset is {opset}; use "
            f"--attention parts, or --opset {most}"
        )
    if precision == "bf16" and opset < BF16_OPSET:
        raise UsageError(
            f"--opset is {opset} with --bf16, whose convolution ONNX has from opset {BF16_OPSET} "
            f"on; use --fp16, or --opset {BF16_OPSET} or above"
        )


def default_activation(outputs: int) -> Activation:
    """That of a classifier which does not say otherwise: one logit is a sigmoid."""
    return "sigmoid" if outputs == 1 else "softmax"


def answers(logits: Any, activation: Activation) -> Any:
    """What a classifier says of each image of ``logits [B, K]``, an array or a tensor.

    It is ``[B, 1]``, the class of the largest logit; of a sigmoid ``[B, K]`` bool, the classes
    whose probability is above one half.
    """
    return logits > 0 if activation == "sigmoid" else logits.argmax(1)[:, None]


MAX_BATCH = 65536
"""Images or videos in a batch: of the smallest models, 64 GB."""


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes an exported model accepts, and the one it is tuned for.

    Raises:
        InputError: unless ``1 <= min <= opt <= max``, and no more than ``MAX_BATCH``.
    """

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                f"batch range is {self.min}:{self.opt}:{self.max}; "
                "expected 1 <= MIN <= OPT <= MAX, for example 1:8:32"
            )
        if self.max > MAX_BATCH:
            raise InputError(
                f"batch range goes up to {self.max:.0e}; expected at most {MAX_BATCH} images"
            )

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Read ``MIN:OPT:MAX``, or one number for a fixed batch size."""
        parts = text.split(":")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            return cls(*numbers * 3)
        if len(numbers) == 3:
            return cls(*numbers)
        raise InputError(
            f"batch range is {text!r}; expected MIN:OPT:MAX or one number, for example 1:8:32"
        )

    @property
    def is_static(self) -> bool:
        """Whether only one batch size is accepted."""
        return self.min == self.max

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


MAX_SIDE = 16384
"""Pixels of a side: 2^20 patches of 16 pixels, whose attention no machine holds."""


@dataclass(frozen=True)
class ImageSize:
    """Height and width of a model's images in pixels.

    Raises:
        InputError: unless both are 1 to ``MAX_SIDE``.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise InputError(
                f"image size is {self}; expected sides of 1 to {MAX_SIDE} pixels, such as 448x224"
            )

    @classmethod
    def parse(cls, text: str) -> ImageSize:
        """Read ``HEIGHTxWIDTH``, or one number for a square."""
        found = re.fullmatch(r"([+-]?\d+)(?:[xX]([+-]?\d+))?", text.strip(), re.ASCII)
        if found is None or max(map(len, found.groups(""))) > 9:
            raise InputError(
                f"image size is {text!r}; expected HEIGHTxWIDTH in pixels, such as 448x224, or one "
                "number for a square"
            )
        return cls(int(found[1]), int(found[2] or found[1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes ``pixel_values [B, C, H, W]`` float32.

    The image is converted to RGB (``C == 3``) or grey (``C == 1``), resized with PIL's
    ``interpolation``, cut to ``[H, W]`` around its centre, scaled to [0, 1], then ``(x - mean) /
    std`` per channel. With ``h, w = floor(H / crop_pct), floor(W / crop_pct)`` it is resized

    - ``crop``: so that it covers ``[h, w]`` in its own shape; of a square the shorter side has that
      length and the longer one is truncated (timm's ``center``, torchvision, open_clip's
      ``shortest``, most of Transformers' processors).
    - ``squash``: to ``[h, w]``, whatever its shape (timm's and open_clip's ``squash``, those of
      Transformers' processors whose size is a height and a width).
    - ``letterbox``: so that it fits into ``[h, w]`` in its own shape (timm's ``border``,
      open_clip's ``longest``).
    - ``pad``: to ``[h, w]``, after it was laid in the middle of the smallest canvas of the shape of
      ``[H, W]`` that holds it (LLaVA's ``pad``, which knows squares only).

    A model of another ``form`` than ``float32`` does the last two steps itself, in its graph.
    ``input_size`` is C, H and W in every form.

    Attributes:
        fill: Level of each channel, 0 to 255, of what the image does not cover; empty is black.
        crop_offset: How an offset that ends in a half is rounded: ``round`` to the even neighbour
            (torchvision), ``floor`` down (Transformers).
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: Interpolation
    resize: Resize = "crop"
    fill: tuple[int, ...] = ()
    crop_offset: CropOffset = "round"
    form: InputForm = "float32"

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the input."""
        return ImageSize(*self.input_size[1:])

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Shape of the pixel values of one image."""
        channels, height, width = self.input_size
        return (height, width, channels) if self.form == "uint8" else self.input_size

    @property
    def pixel_dtype(self) -> Literal["float32", "uint8"]:
        """Type of the pixel values."""
        return "float32" if self.form == "float32" else "uint8"


def is_fill(levels: object, channels: int) -> bool:
    """Whether levels can be ``Preprocessing.fill`` for images of so many channels."""
    if not isinstance(levels, tuple | list) or len(levels) not in (0, channels):
        return False
    return all(type(level) is int and 0 <= level <= 255 for level in levels)


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of an engine or a served model; ``-1`` in the shape is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PatchGrid:
    """How an image is cut into patches, row by row from its upper left corner.

    Pixels right of and below the last whole patch belong to none.

    Attributes:
        rows: Patches from top to bottom.
        cols: Patches from left to right.
        height: Height of a patch in pixels.
        width: Width of a patch in pixels.
    """

    rows: int
    cols: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.rows * self.cols


@dataclass(frozen=True)
class TowerOptions:
    """What a language model takes of a vision tower; None leaves it to the model's configuration.

    Attributes:
        kind: ``llava``; None for a model that is no tower, or is one by itself.
        select_layer: Index into the hidden states: 0 is what enters the first layer, k what the
            k-th layer gives, -1 what the last one gives. Layers behind it are cut off.
        select_feature: ``patch`` leaves the class token out, ``cls_patch`` keeps it in front.
        projector: Whether the checkpoint's projector to the language model's width is part of it.
    """

    kind: str | None = None
    select_layer: int | None = None
    select_feature: SelectFeature | None = None
    projector: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def over(self, defaults: TowerOptions) -> TowerOptions:
        """These options, and those of ``defaults`` where these leave it open."""
        return TowerOptions(**{**defaults.given, **self.given})
