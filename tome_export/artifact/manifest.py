"""``build.json``: everything later commands need of a build, and what a colleague would ask."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tome_export.artifact.document import Batch, Document, Part, short
from tome_export.artifact.parity import ParitySummary
from tome_export.errors import InputError
from tome_export.merge.schedule import VideoOptions
from tome_export.spec import (
    AttentionForm,
    BackendName,
    PatchGrid,
    Precision,
    Preprocessing,
    SelectFeature,
    TensorInfo,
    TowerOptions,
)

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

Absent: Any = Field(default=None, exclude_if=lambda value: value is None)
"""Default of an entry that is left out of the file where it is None."""


class Weights(Part):
    """Where the weights come from.

    Attributes:
        kind: ``pretrained``, ``random``, ``file``, ``bundled`` or ``function``.
        source: For people: hub repository, file name, or how they were drawn.
        sha256: Of the weights file, where there is one.
        seed: Of random weights.
        stored_dtype: Type of the values in the weights file.
        state_sha256: Digest of the library model's weights by name, shape and value.
    """

    kind: str
    source: str
    sha256: str | None
    seed: int | None
    stored_dtype: str
    state_sha256: str


class ModelInfo(Part):
    """The model that was built.

    Attributes:
        name: As given to ``build``.
        folder: Absolute path of the checkpoint of ``hf:<folder>``; None for any other model.
        family: Name of the patch that merges in it.
        timm_name: Name of the architecture in timm, where it has one.
        description: For people.
        weights: Where its weights come from.
        learned_sha256: Digest of what reducer and compressor learned; None where nothing was.
        random_weights: Whether the weights are random, and so not meant for use.
    """

    name: str
    folder: str | None
    family: str
    timm_name: str | None
    description: str
    weights: Weights
    learned_sha256: str | None
    random_weights: bool


class Component(Part):
    """A reducer or compressor by name, with its options."""

    name: str
    options: dict[str, Any]


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
    r: tuple[int, ...]
    prop_attn: bool
    prefix: int
    class_token: bool
    scored: bool
    merge_op: str
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

    tokens_in: int
    r: int
    tokens_out: int
    behind_block: bool
    macs: int
    macs_unmerged: int
    clips: int | None = Absent
    joined: int | None = Absent
    cross: int | None = Absent
    prefix: int | None = Absent


class Macs(Part):
    """Multiply-accumulates per image or video, and how many times fewer merging makes them."""

    merged: int
    unmerged: int
    ratio: float


class Tensor(Part):
    """One input or output of the ONNX model; a dynamic batch is ``"batch"`` in the shape."""

    name: str
    shape: tuple[int | Literal["batch"], ...]
    dtype: str


class OutputForm(Part):
    """Which outputs were asked for beside the model's own; see ``BuildRequest``."""

    dense: bool
    source_map: bool
    entropy: bool


class Tower(Part):
    """What the side of a language model is to be configured with.

    Attributes:
        kind: As in ``spec.TowerOptions``, like the next three.
        select_layer: See there.
        select_feature: See there.
        projector: See there.
        tokens: Visual tokens of one image.
        width: Of each.
        grid: Their rows and columns; None where they are not on a grid.
    """

    kind: str | None = Absent
    select_layer: int | None = Absent
    select_feature: SelectFeature | None = Absent
    projector: bool | None = Absent
    tokens: int
    width: int
    grid: tuple[int, int] | None

    @property
    def options(self) -> TowerOptions:
        """Its options, as given to a build."""
        return TowerOptions(self.kind, self.select_layer, self.select_feature, self.projector)


class Graph(Part):
    """How the ONNX model is written.

    Attributes:
        opset: Of the standard operators.
        attention: Its form; docs/attention.md.
        attention_note: Why it has this form.
        nodes: Number of nodes.
    """

    opset: int
    attention: AttentionForm
    attention_note: str
    nodes: int


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
        layers: The engine's layers as its inspector gives them; None where it could not be read.
        notes: Whatever a user should know: options without effect here, fall-backs, warnings.
    """

    backend: BackendName
    version: str
    file: str
    size_bytes: int
    build_seconds: float
    batch: Batch
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    targets: tuple[str, ...]
    network_layers: int
    plugin_layers: int
    version_compatible: bool
    layers: tuple[Any, ...] | None
    notes: tuple[str, ...]


class FileRecord(Part):
    """Size and digest of a file."""

    bytes: int
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
        layers: Of each layer.
        video: Frames of one video, and where they are joined; None for a model of images.
        macs: Its cost.
        precision: Of weights and activations.
        batch: Batch sizes that the ONNX model takes.
        input: The pixels.
        inputs: Every input, the pixels first.
        output: The main output.
        outputs: Every output, the main one first.
        form: Which outputs were asked for.
        compressor: Last stage of a tower; None for none.
        tower: For a language model; None for any other model.
        preprocessing: How an image becomes the input.
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
    tokens: tuple[int, ...]
    tokens_in: int
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

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        """Raise for what the types cannot say."""
        for name in self.files:
            # A name that leads elsewhere would let a manifest point at any file of the machine.
            plain = PurePosixPath(name)
            parts = set(plain.parts)
            if name != str(plain) or parts & {"..", "/", MANIFEST} or not parts or "\0" in name:
                raise ValueError(
                    f"lists the file {short(name)}, expected a plain name or one in a folder"
                )
        return self

    def check_whole(self, file: Path) -> None:
        """Make sure that every file that the entries speak of is listed.

        Args:
            file: Where the manifest is from, for messages.

        Raises:
            InputError: if one is not.
        """
        wanted = {"": MODEL} | {name: engine.file for name, engine in self.engines.items()}
        for engine, name in wanted.items():
            if name not in self.files:
                of = f"{short(name)}, the file of its {engine} engine" if engine else name
                raise InputError(f"{file} does not list {of}; {self.remedy}")


class _Header(BaseModel):
    """What tells a manifest of ours, of whatever version, from another tool's ``build.json``."""

    model_config = ConfigDict(extra="ignore")
    format: int
    files: dict[str, Any]


def listed_files(folder: Path) -> set[str] | None:
    """Names of the files that a manifest of whatever format lists; None if it is not ours."""
    try:
        return {*_Header.model_validate_json((folder / MANIFEST).read_bytes(), strict=True).files}
    except (ValidationError, OSError):
        return None


def read_manifest(folder: Path) -> Manifest:
    """Read and check the ``build.json`` of a directory.

    Raises:
        InputError: if it is none, of another format, or edited into something unusable.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{folder} is not an artifact: it has no {MANIFEST}; give the directory that "
            "'tome-export build' wrote"
        )
    manifest = Manifest.read(file)
    manifest.check_whole(file)
    return manifest
