"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from tome_export.merge.schedule import INFLECTION
from tome_export.reducers import DEFAULT, REDUCERS
from tome_export.spec import (
    ACTIVATIONS,
    ATTENTION_FORMS,
    MERGE_OPS,
    OPSETS,
    SELECT_FEATURES,
    TOWERS,
    BatchRange,
)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_SHIFT = {"m": 20, "g": 30}


class Batch(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """``MIN:OPT:MAX`` or one number."""

    name = "MIN:OPT:MAX"

    def convert(self, value: Any, _param: Any, _context: Any) -> BatchRange:
        """See ``BatchRange.parse``."""
        return value if isinstance(value, BatchRange) else BatchRange.parse(value)


class Memory(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A size with its unit, such as ``512MiB`` or ``4GiB``, to bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, context: Any) -> int:
        """Bytes; units are binary."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)\s*([mg])(?:ib?|b)?", value.strip(), re.IGNORECASE)
        if found is None:
            self.fail(
                f"{value!r} is not a size with a unit, such as 512MiB or 4GiB", param, context
            )
        return int(found[1]) << _SHIFT[found[2].lower()]


class File(click.Path):
    """The path of a file or folder; an empty one would be the current folder."""

    def convert(self, value: Any, param: Any, context: Any) -> Any:
        """A path as it is given."""
        if value == "":
            self.fail("an empty name; give a path, . for the current folder", param, context)
        return super().convert(value, param, context)


FILE = File(path_type=Path)


def grouped(*decorators: Decorator) -> Decorator:
    """Options as one decorator."""
    return lambda function: reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


def _set_verbose(context: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        context.obj.verbose = True


# main() looks for these two itself, because errors may come before options are parsed.
output_options = grouped(
    click.option("--json", is_flag=True, expose_value=False, help="Print one JSON object."),
    click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        help="Show what happens within each stage.",
    ),
    click.option(
        "--debug", is_flag=True, expose_value=False, help="Show tracebacks and library output."
    ),
)

engine_options = grouped(
    click.option(
        "--workspace",
        "workspace_bytes",
        type=Memory(),
        help="Most scratch memory of the engine, such as 512MiB or 4GiB.",
    ),
    click.option(
        "--optimization-level",
        type=int,
        metavar="0-5",
        help="0 builds fastest, 5 searches longest.  [default: 3]",
    ),
    click.option(
        "--timing-cache",
        type=FILE,
        metavar="FILE",
        help="Tactic timings, read if there and written after the build (TensorRT).",
    ),
    click.option(
        "--version-compatible",
        is_flag=True,
        help="The engine also runs on later TensorRT of the same major version.",
    ),
    click.option(
        "--hardware-compatible",
        is_flag=True,
        help="The engine runs on every GPU from the Ampere generation on.",
    ),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        multiple=True,
        metavar="X.Y",
        help="Build for this GPU, such as 8.9, or current; repeatable (TensorRT-RTX engines, "
        "plugin kernels).",
    ),
)

engine_choice = click.option(
    "--engine",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "none"]),
    default="auto",
    show_default=True,
    help="auto: TensorRT where it and a GPU are, else TensorRT-RTX, else none.",
)

images_option = click.option(
    "--images",
    type=FILE,
    metavar="FOLDER",
    help="Check parity on these images.  [default: those that come along]",
)

order_option = click.option(
    "--classes-in-order",
    is_flag=True,
    help="Class folders, sorted, and numbers of labels are the model's classes in their order, "
    "whatever they are called.",
)

self_test_option = click.option(
    "--self-test/--no-self-test",
    default=None,
    help="Have a server answer about one image before anything is written.  [default: where one is "
    "on this machine]",
)

query_option = click.option(
    "--query",
    type=FILE,
    metavar="FILE.npy",
    help="What the model takes besides images (reducer query): one vector, or one per image.",
)

tower_options = (
    click.option(
        "--tower",
        "kind",
        type=click.Choice(TOWERS),
        help="Cut the vision tower of a language model from a CLIP or LLaVA checkpoint.",
    ),
    click.option(
        "--select-layer",
        type=int,
        metavar="N",
        help="Tower: the hidden state it gives; layers behind are cut.  [default: the model's own]",
    ),
    click.option(
        "--select-feature",
        type=click.Choice(SELECT_FEATURES),
        help="Tower: without or with the class token.  [default: the model's own]",
    ),
    click.option(
        "--projector/--no-projector",
        default=None,
        help="Tower: the checkpoint's projector in the same graph.  [default: no projector]",
    ),
)

video_options = (
    click.option(
        "--frames", type=int, metavar="N", help="Video: frames of one.  [default: the model's own]"
    ),
    click.option(
        "--merge-layers",
        metavar="8,9,10",
        help="Video: layers, from 0, that join neighbouring clips and merge across them.",
    ),
    click.option(
        "--merge-frames", metavar="2,2,3", help="Video: how many clips each of them joins."
    ),
    click.option(
        "--merge-proportions",
        metavar="30,10",
        help="Video: percent of the tokens to merge across clips, and inside them from there on.",
    ),
    click.option(
        "--frame-position/--no-frame-position",
        default=None,
        help="Video: add the learned vector of each clip as it is joined.  [default: add]",
    ),
)

reducer_options = grouped(
    click.option(
        "--reducer",
        type=click.Choice(list(REDUCERS)),
        default=DEFAULT,
        show_default=True,
        help="How tokens become fewer; see docs/reducers.md.",
    ),
    click.option(
        "--reducer-option",
        "reducer_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the reducer; repeatable.",
    ),
)

weights_options = grouped(
    click.option(
        "--weights",
        default="pretrained",
        show_default=True,
        metavar="pretrained|random|PATH",
        help="PATH: a .safetensors file, or a .pth, .ckpt or .pth.tar file of tensors.",
    ),
    click.option(
        "--weights-key",
        default="",
        metavar="KEY",
        help="Which of the weights in PATH.  [default: averaged ones (EMA) before plain ones]",
    ),
)

activation_option = click.option(
    "--activation",
    type=click.Choice(ACTIVATIONS),
    help="What makes scores of the model's output; none: a regression's numbers.  [default: what "
    "the model says]",
)

model_options = grouped(
    click.option("--r", type=int, help="Tokens to merge per layer.  [default: the model's own]"),
    click.option(
        "--schedule",
        metavar="|".join([*INFLECTION, "12,10,8", "FILE"]),
        help="How r is spread over the layers, or r of each, or a file that 'tome-export tune' "
        "wrote.  [default: constant]",
    ),
    click.option("--fp16", is_flag=True, help="Half precision."),
    click.option("--bf16", is_flag=True, help="bfloat16."),
    click.option("--fp32", is_flag=True, help="Single precision, the default."),
    weights_options,
    click.option("--seed", default=0, show_default=True, help="Of random weights."),
    activation_option,
    click.option(
        "--prop-attn/--no-prop-attn",
        default=None,
        help="Proportional attention.  [default: the model's and reducer's own]",
    ),
    reducer_options,
    click.option(
        "--dense", is_flag=True, help="Give the features of every patch: merged, then unmerged."
    ),
    click.option(
        "--source-map", is_flag=True, help="Give also which final token each patch went into."
    ),
    click.option(
        "--entropy",
        is_flag=True,
        help="Give also how evenly the image is spread over its tokens, 0 to 1; see "
        "docs/over-merging.md.",
    ),
    click.option(
        "--compress",
        metavar="avgpool:12x12|resampler[:FILE]",
        help="Last stage of a tower or of --dense: the mean over each cell of a smaller grid, or a "
        "perceiver resampler.",
    ),
    click.option(
        "--compress-option",
        "compress_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="An option of the compressor, such as latents=64; repeatable.",
    ),
    *tower_options,
    *video_options,
    click.option(
        "--batch",
        type=Batch(),
        help="Batch sizes; one number fixes it.  [default: 1:8:32; 8 with --merge-op plugin]",
    ),
    click.option(
        "--plugin-batch-range",
        is_flag=True,
        help="Let --merge-op plugin take several batch sizes, although TensorRT keeps GPU memory "
        "at every change (NVIDIA/TensorRT issue 4849).",
    ),
    click.option(
        "--merge-op",
        type=click.Choice(MERGE_OPS),
        default="auto",
        show_default=True,
        help="auto: plugin for a TensorRT engine of one batch size, where it pays, else matmul; "
        "index_add is for ONNX Runtime only.",
    ),
    click.option(
        "--attention",
        type=click.Choice(ATTENTION_FORMS),
        default="auto",
        show_default=True,
        help="auto: fused for an engine, in parts for fp32 and for ONNX Runtime on a GPU; "
        "fused-fp32: fp16 with float32 sums, for TensorRT; see docs/attention.md.",
    ),
    click.option(
        "--opset",
        type=click.IntRange(*OPSETS),
        default=OPSETS[-1],
        show_default=True,
        help="Of the ONNX model: ONNX Runtime 1.18 takes 21, 1.22 takes 22; below 23 attention is "
        "in parts. See docs/runtimes.md.",
    ),
)
