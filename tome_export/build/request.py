"""What to build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tome_export.engine import EngineOptions
from tome_export.errors import UsageError
from tome_export.merge.schedule import Schedule
from tome_export.reducers import DEFAULT
from tome_export.spec import (
    OPSETS,
    Activation,
    AttentionForm,
    BatchRange,
    ImageSize,
    InputForm,
    MergeOp,
    Precision,
    TowerOptions,
    check_opset,
)
from tome_export.video.options import VideoOptions


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: Recipe name, ``timm:<name>`` or ``module:function``.
        output: The artifact directory.
        schedule: Tokens to remove per layer; None for what the reducer's options say, or else the
            recipe's recommended r.
        precision: Precision of weights and activations.
        weights: ``pretrained``, ``random`` or the path of a checkpoint.
        weights_key: Where in that file they are; see ``weights.files.read_checkpoint``.
        seed: Seed of random weights.
        activation: What makes scores of the output; None for what the model says.
        prop_attn: Proportional attention; None for the recipe's and the reducer's own setting.
        reducer: Name of the reducer.
        reducer_options: Its options, each ``key=value``.
        dense: Give the features of every patch in place of the model's own output.
        source_map: Give also which final token each patch went into.
        entropy: Give also the token-size entropy of each image.
        compress: Last stage of a tower, such as ``avgpool:12x12``; None for none.
        compress_options: Its options, each ``key=value``.
        tower: Options of a vision tower; none for any other model.
        video: Frames of one video and how they are joined; none for a model of images.
        image_size: Size of the images; None for the model's own. See docs/image-size.md.
        merge_op: How the merge is written into the graph.
        attention: How attention is written into the graph; see docs/attention.md.
        opset: Opset of the ONNX model; an older runtime needs a lower one, see docs/runtimes.md.
        engine: ``auto``, ``tensorrt``, ``tensorrt-rtx`` or ``none``.
        engine_options: Engine settings, without a batch range.
        batch: Batch sizes the model takes; None for 1:8:32, and for 8 alone with ``plugin``.
        plugin_batch_range: Let ``plugin`` take more than one batch size, whose price is memory.
        input: In which form the graph takes pixel values; see docs/raw-pixels.md.
        images: Folder of images for the parity check; None for those that come along.
        check: Whether to check parity; without it the artifact says that it was not checked.
        force: Replace an existing artifact.
        schedule_file: What ``tune`` wrote; it then gives the schedule, and goes into the artifact.

    Raises:
        UsageError: if the batch range stands in the engine options, or options exclude each other.
    """

    model: str
    output: Path
    schedule: Schedule | None = None
    precision: Precision = "fp32"
    weights: str = "pretrained"
    weights_key: str = ""
    seed: int = 0
    activation: Activation | None = None
    prop_attn: bool | None = None
    reducer: str = DEFAULT
    reducer_options: tuple[str, ...] = ()
    dense: bool = False
    source_map: bool = False
    entropy: bool = False
    compress: str | None = None
    compress_options: tuple[str, ...] = ()
    tower: TowerOptions = field(default_factory=TowerOptions)
    video: VideoOptions = field(default_factory=VideoOptions)
    image_size: ImageSize | None = None
    merge_op: MergeOp = "auto"
    attention: AttentionForm = "auto"
    opset: int = OPSETS[-1]
    engine: str = "auto"
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    batch: BatchRange | None = None
    plugin_batch_range: bool = False
    input: InputForm = "float32"
    images: Path | None = None
    check: bool = True
    force: bool = False
    schedule_file: Path | None = None

    def __post_init__(self) -> None:
        check_opset(self.opset, self.precision, self.attention)
        if self.activation is not None and self.dense:
            raise UsageError(
                f"--activation {self.activation} is for class scores, and --dense gives features; "
                "leave one of them out"
            )
        given = self.engine_options.batch
        if given != BatchRange():
            raise UsageError(
                f"engine options have the batch range {given}; give the request's own batch, which "
                "the model and its engine share"
            )


def check_sizes(sizes: Sequence[ImageSize | None]) -> None:
    """Raise ``UsageError`` unless there is an image size, and each of them only once."""
    if not sizes or None in sizes:
        raise UsageError("no image size is given; expected one or more, such as 224,448x224")
    twice = next((size for size, count in Counter(sizes).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"image size {twice} is given twice; give each size once")
