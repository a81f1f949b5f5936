"""``build.json``: everything later commands need of a build, and what a colleague would ask."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tome_export.artifact.document import (
    LONGEST_PLACE,
    Batch,
    Count,
    Document,
    Part,
    PathText,
    Positive,
    Size,
    SizeText,
    Whole,
    fault_of,
    short,
)
from tome_export.artifact.files import open_regular
from tome_export.artifact.parity import ParitySummary
from tome_export.errors import InputError
from tome_export.merge.schedule import LayerTokens
from tome_export.spec import (
    ENTROPY,
    FEATURES,
    INPUT_NAME,
    LOGITS,
    OPSETS,
    SOURCE_MAP,
    Activation,
    AttentionForm,
    BackendName,
    BatchRange,
    Lowering,
    OutputKind,
    PatchGrid,
    Precision,
    Preprocessing,
    SelectFeature,
    TensorInfo,
    TowerOptions,
    is_fill,
)
from tome_export.video import VIDEO_FEATURES
from tome_export.video.options import VideoOptions

LONGEST_NAME = 255
"""Bytes of a file's name, as Linux has them."""

LONGEST_SIDE = 65536
"""Pixels of an image that becomes an input, each way."""

LEAST, MOST_CROP = 1e-6, 8.0
"""Standard deviations are not below, nor above its inverse; shares of a side that are cut out."""

FORMAT = 1
"""Version of ``build.json``; raised when a reader of the old form would misread the new."""

MANIFEST = "build.json"
MODEL = "model.onnx"

RESULTS = {
    "parity.json": "check",
    "bench.json": "bench",
    "eval.json": "eval",
    "report.html": "report",
}
"""What was found out about a model, which is usable without -> the command that finds it."""

Made = TypeVar("Made")

Absent: Any = Field(default=None, exclude_if=lambda value: value is None)
"""Default of an entry that is left out of the file where it is None."""


class Weights(Part):
    """Where the weights come from.

    Attributes:
        kind: ``pretrained``, ``random``, ``file``, ``bundled`` or ``function``.
        source: For people: hub repository, file name, or how they were drawn.
        sha256: sha256 of the weights file, where there is one.
        seed: Seed of random weights.
        stored_dtype: Type of the values in the weights file.
        key: Where in the weights file they are; empty if they are all that it holds.
        resampled_from: Rows and columns of the patches that its positions are for, where they were
            resampled for those of this model.
        state_sha256: Digest of the library model's weights by name, shape and value.
        common_sha256: The same without embeddings of positions, which are others at another image
            size; empty in artifacts of before.
    """

    kind: Literal["pretrained", "random", "file", "bundled", "function"]
    source: PathText
    sha256: str | None
    seed: Whole | None
    stored_dtype: str
    key: str = ""
    resampled_from: tuple[Size, Size] | None = Absent
    state_sha256: str
    common_sha256: str = ""


class ModelInfo(Part):
    """The model that was built.

    Attributes:
        name: As given to ``build``.
        folder: Absolute path of the checkpoint of ``hf:<folder>``; None for any other model.
        family: Name of the patch that merges in it.
        timm_name: Name of the architecture in timm, where it has one.
        description: For people.
        weights: Where its weights come from.
        image_size: Height and width of the images as asked for; None for the model's own.
        learned_sha256: Digest of what reducer and compressor learned; None where nothing was.
        random_weights: Whether the weights are random, and so not meant for use.
    """

    name: PathText
    folder: PathText | None
    family: str
    timm_name: str | None
    description: str
    weights: Weights
    image_size: SizeText | None = Absent
    learned_sha256: str | None
    random_weights: bool

    def resolvable_name(self, weights: str | None = None) -> str:
        """What ``models.resolve`` finds the model by, from any current folder.

        Weights that are a folder stand for that of the checkpoint.
        """
        if self.folder is None:
            return self.name
        if weights is not None and Path(weights).is_dir():
            return f"hf:{weights}"
        if not Path(self.folder).is_dir():
            raise InputError(
                f"the artifact was built from the checkpoint folder {self.folder}, which is not "
                "there; put it back, or give its path with --weights"
            )
        return f"hf:{self.folder}"


class Component(Part):
    """A reducer or compressor by name, with its options."""

    name: str
    options: dict[str, Any]

    def made(self, cls: type[Made]) -> Made:
        """What the entry describes."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        unknown = next((key for key in self.options if key not in names), None)
        if unknown is not None:
            expected = f"expected {', '.join(names)}" if names else "it has none"
            raise InputError(
                f"{MANIFEST} has option {short(unknown)} of {self.name}; {expected}, rebuild the "
                "artifact"
            )
        try:
            return TypeAdapter(cls).validate_json(json.dumps(self.options), strict=True)
        except ValidationError as error:
            reason = fault_of(error, self.options)
            raise InputError(
                f"the entry of {self.name} in {MANIFEST} {reason}; rebuild the artifact"
            ) from error


class MergeInfo(Part):
    """How the model merges.

    Attributes:
        reducer: How tokens become fewer.
        schedule: For people, such as ``r=8 constant``.
        r: Tokens removed in every layer.
        prop_attn: Whether attention is proportional to token sizes.
        prefix: Protected tokens in front of the patches.
        class_token: Whether the first of them is a class token.
        scored: Whether the reducer ranks tokens by a score of its own.
        merge_op: ``matmul``, ``index_add`` or ``plugin``.
        note: Why it is written so, where that was not asked for.
    """

    reducer: Component
    schedule: str
    r: tuple[Count, ...]
    prop_attn: bool
    prefix: Count
    class_token: bool
    scored: bool
    merge_op: Literal[Lowering, "plugin"]
    note: str = ""


class Layer(Part):
    """Token counts and costs of one layer; of one clip where the model takes videos.

    Attributes:
        tokens_in: Tokens that enter it.
        r: Tokens removed.
        tokens_out: Tokens that the next layer sees.
        behind_block: Whether they are removed behind the MLP, and not in front of it.
        macs: Multiply-accumulates per image or video.
        macs_unmerged: The same without merging.
        clips: Clips of one video during attention; None for a model of images, as the next three.
        joined: Clips that became one ahead of the attention.
        cross: Tokens merged across them.
        prefix: Protected tokens of each clip.
    """

    tokens_in: Count
    r: Count
    tokens_out: Count
    behind_block: bool
    macs: Count
    macs_unmerged: Count
    clips: Count | None = Absent
    joined: Count | None = Absent
    cross: Count | None = Absent
    prefix: Count | None = Absent

    @property
    def counts(self) -> LayerTokens:
        """The token counts alone."""
        return LayerTokens(
            self.tokens_in,
            self.r,
            self.tokens_out,
            self.behind_block,
            self.clips or 1,
            self.joined or 1,
            self.cross or 0,
        )


class Macs(Part):
    """Multiply-accumulates per image or video, and how many times fewer merging makes them."""

    merged: Annotated[Count, Field(ge=1)]
    unmerged: Annotated[Count, Field(ge=1)]
    ratio: Positive


class Tensor(Part):
    """One input or output of the ONNX model; a dynamic batch is ``"batch"`` in the shape."""

    name: str
    shape: tuple[Size | Literal["batch"], ...]
    dtype: str


class OutputForm(Part):
    """Which outputs were asked for beside the model's own; see ``BuildRequest``.

    Attributes:
        dense: Features of every patch in place of the model's own output.
        source_map: Also which final token each patch went into.
        entropy: Also the token-size entropy of each image.
        kind: What the main output is; its name says nothing of it, a segmentation's are logits too.
        note: Why the model's own output is taken for what it is.
    """

    dense: bool
    source_map: bool
    entropy: bool
    kind: OutputKind
    note: str = ""


class Tower(Part):
    """What the side of a language model is to be configured with.

    Attributes:
        kind: As in ``spec.TowerOptions``, like the next three.
        select_layer: See there.
        select_feature: See there.
        projector: See there.
        tokens: Visual tokens of one image.
        width: Numbers in each visual token.
        grid: Rows and columns of the visual tokens; None where they are not on a grid.
    """

    kind: str | None = Absent
    select_layer: Whole | None = Absent
    select_feature: SelectFeature | None = Absent
    projector: bool | None = Absent
    tokens: Size
    width: Size
    grid: tuple[Size, Size] | None

    @property
    def options(self) -> TowerOptions:
        """Its options, as given to a build."""
        return TowerOptions(self.kind, self.select_layer, self.select_feature, self.projector)


class Graph(Part):
    """How the ONNX model is written.

    Attributes:
        opset: Opset of the standard operators.
        attention: Its form; docs/attention.md.
        attention_note: Why it has this form.
        nodes: Number of nodes.
    """

    opset: Annotated[int, Field(ge=OPSETS[0], le=OPSETS[1])]
    attention: AttentionForm
    attention_note: str
    nodes: Count

    @model_validator(mode="after")
    def _has_its_operators(self) -> Graph:
        if self.attention.startswith("fused") and self.opset < OPSETS[1]:
            raise ValueError(f"opset {self.opset} has no operator for {self.attention} attention")
        return self


class PluginInfo(Part):
    """The kernels that were compiled for TensorRT's plugin, for which GPUs, and by what."""

    kernels: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    compiler: str


class EngineInfo(Part):
    """An engine that was built.

    Attributes:
        backend: Name of the backend.
        version: Version of its library; an engine runs with exactly this one unless it was built
            ``version_compatible``.
        file: Name of the engine file.
        size_bytes: Its size.
        build_seconds: Wall time of parsing and building.
        batch: The optimisation profile.
        inputs: Inputs by name.
        outputs: Outputs by name.
        targets: Compute capabilities it was built for.
        network_layers: Layers of the parsed network, before the builder fuses them.
        plugin_layers: Those of them that are plugins.
        version_compatible: Whether it brings a runtime of its own: code that loading it runs.
        stripped: Whether it has no weights, and is given those of the ONNX model before it runs.
        layers: The engine's layers as its inspector gives them; None where it could not be read.
        notes: Whatever a user should know: options without effect here, fall-backs, warnings.
    """

    backend: BackendName
    version: str
    file: PathText
    size_bytes: Count
    build_seconds: Positive
    batch: Batch
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    targets: tuple[str, ...]
    network_layers: Count
    plugin_layers: Count
    version_compatible: bool
    stripped: bool = False
    layers: tuple[Any, ...] | None
    notes: tuple[str, ...]


class FileRecord(Part):
    """Size and digest of a file."""

    bytes: Count
    sha256: str


class Manifest(Document):
    """The content of ``build.json``.

    Attributes:
        format: Version of this file.
        model: What was built.
        merge: How it merges.
        tokens: Tokens that leave each layer, of a whole image or video.
        tokens_in: Tokens that enter the first.
        patches: How an image is cut into patches; None where they are no grid.
        layers: Tokens and MACs of each layer.
        video: Frames of one video, and where they are joined; None for a model of images.
        macs: MACs per image, or video, merged and unmerged.
        precision: Precision of weights and activations.
        batch: Batch sizes that the ONNX model takes.
        input: The pixels.
        inputs: Every input, the pixels first.
        output: The main output.
        outputs: Every output, the main one first.
        form: Which outputs were asked for.
        compressor: Last stage of a tower; None for none.
        tower: For a language model; None for any other model.
        preprocessing: How an image becomes the input.
        activation: What makes scores of the logits; None where the output is features.
        labels: Names of the classes; None where the output is features or nobody names them.
        onnx: How the graph is written.
        plugins: Kernels of the plugin; None where the merge is not a plugin.
        engines: Name of the backend -> its engine.
        engine_note: Which engines can be had here, for people.
        parity: The last check; None if there was none.
        versions: Package -> version, of this one and of what it used.
        files: File name in the artifact -> its size and digest.
    """

    remedy: ClassVar[str] = "rebuild the artifact or copy it again"

    format: Literal[1]
    model: ModelInfo
    merge: MergeInfo
    tokens: tuple[Count, ...]
    tokens_in: Count
    patches: PatchGrid | None
    layers: tuple[Layer, ...]
    video: VideoOptions | None
    macs: Macs
    precision: Precision
    batch: Batch
    input: Tensor
    inputs: tuple[Tensor, ...]
    output: Tensor
    outputs: tuple[Tensor, ...]
    form: OutputForm
    compressor: Component | None
    tower: Tower | None
    preprocessing: Preprocessing
    activation: Activation | None
    labels: tuple[str, ...] | None
    onnx: Graph
    plugins: PluginInfo | None = None
    engines: dict[str, EngineInfo] = Field(default_factory=dict)
    engine_note: str
    parity: ParitySummary | None = None
    versions: dict[str, str]
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @property
    def merges(self) -> bool:
        """Whether any layer removes tokens."""
        return any(self.merge.r) or (self.video is not None and self.video.merging is not None)

    @property
    def output_kind(self) -> OutputKind:
        """What the main output is."""
        return self.form.kind

    def batch_on(self, backend: str) -> BatchRange:
        """Batch sizes that a backend takes: those of its engine, or else of the ONNX model."""
        return (self.engines.get(backend) or self).batch

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        self._check_files()
        self._check_layers()
        self._check_preprocessing()
        self._check_tensors()
        if (self.activation is not None) != (self.output_kind == "classes"):
            raise ValueError(
                f"has activation {self.activation} of the output {short(self.output.name)}, which "
                f"is {self.output_kind}; expected one of classes and none of anything else"
            )
        if self.labels is not None and self.output.shape[1:2] != (len(self.labels),):
            raise ValueError(
                f"has {len(self.labels)} labels for the output {self.output.name} "
                f"{[*self.output.shape]}, expected one label per logit"
            )
        return self

    def _check_files(self) -> None:
        for name in self.files:
            # A name that leads elsewhere would let a manifest point at any file of the machine.
            plain = PurePosixPath(name)
            parts = set(plain.parts)
            longest = max((len(os.fsencode(part)) for part in parts), default=0)
            if (
                name != str(plain)
                or parts & {"..", "/", MANIFEST}
                or not 0 < longest <= LONGEST_NAME
                or len(name) > LONGEST_PLACE
                or "\0" in name
            ):
                raise ValueError(
                    f"lists the file {short(name)}, expected a plain name or one in a folder"
                )
        for name, engine in self.engines.items():
            if name != engine.backend or engine.file in (MODEL, *RESULTS):
                raise ValueError(
                    f"has the engine {short(name)} of {engine.backend} in {short(engine.file)}, "
                    "expected a file of its own by the name of its backend"
                )

    def _check_layers(self) -> None:
        """The counts of each layer follow from those of the one before."""
        layers, merge = self.layers, self.merge
        if not len(layers) == len(self.tokens) == len(merge.r):
            raise ValueError(
                f"has {len(layers)} layers, {len(self.tokens)} tokens and {len(merge.r)} merge.r, "
                "expected one of each per layer"
            )
        if not layers:
            raise ValueError("has layers [], expected one or more")
        total = self.tokens_in
        for index, (layer, r, tokens) in enumerate(zip(layers, merge.r, self.tokens, strict=True)):
            counts = layer.counts
            out = counts.attended - r
            found = counts.total_in, layer.r, layer.tokens_out, tokens
            if found != (total, r, out, counts.sequences * out) or out < 1:
                raise ValueError(
                    f"has layers[{index}] of {layer.tokens_in} tokens less r {layer.r} to "
                    f"{layer.tokens_out}, which does not fit merge.r, tokens or the layer before"
                )
            total = tokens

    def _check_tensors(self) -> None:
        """Names and shapes are those that a build of this form gives."""
        main = self.output.name
        if self.input.name != INPUT_NAME:
            raise ValueError(f"has the input {short(self.input.name)}, expected {INPUT_NAME}")
        kind = self.output_kind
        names = {"classes": (LOGITS,), "features": (FEATURES, VIDEO_FEATURES), "map": (main,)}[kind]
        names = (FEATURES,) if self.form.dense else names
        if main not in names or main in (INPUT_NAME, SOURCE_MAP, ENTROPY):
            expected = "a name of its own" if main in names else " or ".join(names)
            raise ValueError(f"has the output {short(main)} of kind {kind}, expected {expected}")
        if not self.inputs or self.inputs[0] != self.input:
            raise ValueError(f"has inputs that do not begin with {INPUT_NAME} as input has it")
        form = self.form
        asked = {SOURCE_MAP: form.source_map, ENTROPY: form.entropy}
        listed = [main, *(name for name, given in asked.items() if given)]
        if [tensor.name for tensor in self.outputs] != listed or self.outputs[0] != self.output:
            raise ValueError(f"has outputs other than {', '.join(listed)}, as output and form say")
        if len({tensor.name for tensor in self.inputs}) < len(self.inputs):
            raise ValueError("has two inputs of one name")
        batch = self.batch.max if self.batch.is_static else "batch"
        for tensor in (*self.inputs, *self.outputs):
            if tensor.shape[:1] != (batch,) or "batch" in tensor.shape[1:]:
                raise ValueError(
                    f"has {tensor.name} of shape {[*tensor.shape]}, expected {batch!r} and sizes "
                    f"behind it, as batch is {self.batch}"
                )
        frames = () if self.video is None else self.input.shape[1:2]
        wanted = (batch, *frames, *self.preprocessing.pixel_shape)
        dtype = self.preprocessing.pixel_dtype
        if (self.input.dtype, self.input.shape) != (dtype, wanted):
            raise ValueError(
                f"has {INPUT_NAME} of {short(self.input.dtype)} {[*self.input.shape]}, expected "
                f"{dtype} {[*wanted]}, as preprocessing has input_size and form"
            )

    def _check_preprocessing(self) -> None:
        """An image can become an input by it."""
        recipe, grid = self.preprocessing, self.patches
        channels, *sides = recipe.input_size
        if channels not in (1, 3) or not all(1 <= side <= LONGEST_SIDE for side in sides):
            raise ValueError(
                f"has preprocessing.input_size {[*recipe.input_size]}, expected 1 or 3 channels of "
                f"1 to {LONGEST_SIDE} pixels each way"
            )
        for name, values in (("mean", recipe.mean), ("std", recipe.std)):
            if len(values) != channels:
                raise ValueError(
                    f"has preprocessing.{name} {short([*values])}, expected {channels}, one per "
                    "channel"
                )
        if not all(LEAST <= value <= 1 / LEAST for value in recipe.std):
            raise ValueError(
                f"has preprocessing.std {short([*recipe.std])}, expected numbers above 0"
            )
        if not all(abs(value) <= 1 / LEAST for value in recipe.mean):
            raise ValueError(
                f"has preprocessing.mean {short([*recipe.mean])}, expected levels of pixels"
            )
        if not is_fill(recipe.fill, channels):
            raise ValueError(
                f"has preprocessing.fill {short([*recipe.fill])}, expected none or {channels} "
                "levels from 0 to 255"
            )
        largest = max(sides) / max(recipe.crop_pct, LEAST)
        if not 0 < recipe.crop_pct <= MOST_CROP or largest > LONGEST_SIDE:
            raise ValueError(
                f"has preprocessing.crop_pct {recipe.crop_pct}, expected a share of the image, "
                "above 0"
            )
        if grid is not None and min(grid.rows, grid.cols, grid.height, grid.width) < 1:
            raise ValueError(f"has patches {grid}, expected rows, cols, height and width above 0")

    def check_whole(self, file: Path) -> None:
        """Make sure that every file that the entries speak of is listed."""
        wanted = {"": MODEL} | {name: engine.file for name, engine in self.engines.items()}
        for engine, name in wanted.items():
            if name not in self.files:
                of = f"{short(name)}, the file of its {engine} engine" if engine else name
                raise InputError(f"{file} does not list {of}; {self.remedy}")


class _Header(BaseModel):
    """What tells a manifest of ours, of whatever version, from another tool's ``build.json``."""

    model_config = ConfigDict(extra="ignore")
    format: Count
    files: dict[str, Any]


def listed_files(folder: Path) -> set[str] | None:
    """Names of the files that a manifest of whatever format lists; None if it is not ours."""
    try:
        return {*_Header.model_validate_json((folder / MANIFEST).read_bytes(), strict=True).files}
    except (ValidationError, OSError):
        return None


def read_manifest(folder: Path) -> Manifest:
    """Read and check the ``build.json`` of a directory."""
    file = folder / MANIFEST
    if not os.path.lexists(file):
        sizes = sorted(str(path.parent) for path in folder.glob(f"*x*/{MANIFEST}"))
        give = f"one of {', '.join(sizes)}" if sizes else "the directory"
        raise InputError(
            f"{folder} is not an artifact: it has no {MANIFEST}; give {give} that "
            "'tome-export build' wrote"
        )
    with open_regular(folder, MANIFEST) as stream:
        manifest = Manifest.parse(stream.read(), file)
    manifest.check_whole(file)
    return manifest
