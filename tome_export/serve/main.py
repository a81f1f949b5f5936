"""``tome-export serve``: a model repository from artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tome_export.artifact import Artifact, writing_to
from tome_export.artifact.bench import BENCH, Bench
from tome_export.artifact.compatibility import check_one_model, shared_facts
from tome_export.artifact.files import draft_of, write_whole
from tome_export.engine.gpu import detect
from tome_export.errors import InputError, MissingComponentError
from tome_export.progress import Progress, Silent
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    check_packages,
    folders_from_source,
)
from tome_export.serve.installation import find
from tome_export.serve.kserve import (
    KServeOptions,
    kserve_manifest,
    kserve_text,
    probe_command,
)
from tome_export.serve.pipeline_models import pipeline_folders
from tome_export.serve.repository import (
    Written,
    check_repository,
    choose_version,
    is_named_elsewhere,
    is_ours,
    models_in,
    write,
)
from tome_export.serve.routers import (
    has_router,
    of_one_shape,
    route_of,
    router_folders,
)
from tome_export.serve.self_test import try_out
from tome_export.serve.server import ServerOptions, server_options_from_repository
from tome_export.serve.source import (
    FIXED,
    TENSORRT,
    Source,
    check_free_name,
    check_name,
    default_name,
    plain_name,
    source_from_artifact,
)
from tome_export.serve.validate import validate

__all__ = [
    "KServeOptions",
    "ServeOptions",
    "ServeRequest",
    "ServeResult",
    "serve",
]


@dataclass(frozen=True)
class ServeRequest:
    """What to serve.

    Attributes:
        artifacts: Artifact directories; several are one model with different r, behind a router.
        repository: Directory of the model repository.
        options: How it is served.
        format: ``auto`` (the TensorRT engine where there is one), ``engine`` or ``onnx``.
        force: Replace a version that has other files.
        self_test: Have a server answer about one image before anything is written; None where that
            can be done on this machine.
        kserve: File for a KServe manifest; None for none.
        kserve_options: What goes into it.
    """

    artifacts: tuple[Path, ...]
    repository: Path
    options: ServeOptions = field(default_factory=ServeOptions)
    format: str = "auto"
    force: bool = False
    self_test: bool | None = False
    kserve: Path | None = None
    kserve_options: KServeOptions = field(default_factory=KServeOptions)


@dataclass(frozen=True)
class ServeResult:
    """What is in the repository now.

    Attributes:
        repository: Its directory.
        models: What was written, each after the models it needs.
        entry: The model a client asks: the router (of pipelines where there are some), the
            pipeline, or the model itself; the last one's, where there are several and no router.
        server: What a server of the repository must be started with.
        kserve: The manifest, if one was asked for.
        random_weights: Whether the model has learned nothing.
        self_test: What was tried out, or why nothing was; empty if that was not asked for.
        notes: What a user should know.
    """

    repository: Path
    models: tuple[Written, ...]
    entry: str
    server: ServerOptions
    kserve: Path | None
    random_weights: bool
    self_test: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            **vars(self),
            "repository": str(self.repository),
            "models": [vars(model) for model in self.models],
            "server": {**vars(self.server)},
            "kserve": None if self.kserve is None else str(self.kserve),
        }


@dataclass(frozen=True)
class _Served:
    """An artifact in the repository.

    Attributes:
        artifact: It.
        source: Its file that is served.
        base: What the names behind its router have in common; None if it is behind none.
        model: The model with the file.
        folder: The model that users call: the same, or one that fills batches up for it.
        pipeline: The models around it, if images are given to it; last the one that takes them.
    """

    artifact: Artifact
    source: Source
    base: str | None
    model: ModelFolder
    folder: ModelFolder
    pipeline: Sequence[ModelFolder]

    @property
    def folders(self) -> list[ModelFolder]:
        """All of it, each after those that it needs."""
        own = [self.model] if self.model is self.folder else [self.model, self.folder]
        return [*own, *self.pipeline]


def serve(
    request: ServeRequest,
    progress: Progress | None = None,
    further: Callable[[Sequence[ModelFolder]], list[ModelFolder]] | None = None,
) -> ServeResult:
    """Write artifacts into a model repository, all checked before the first file is written.

    Args:
        request: What to serve.
        progress: Told of the stages.
        further: Makes models of those of the artifacts, which are checked and written with them.

    Raises:
        UsageError: if an option is out of its range.
        InputError: if an artifact is damaged, artifacts are not of one model, or the repository
            cannot take them.
        MissingComponentError: if the packages of the ``serve`` extra are missing, or what an
            explicit self-test needs.
        ExportError: if the self-test's server does not start.
    """
    progress = progress or Silent()
    check_packages()
    repository = check_repository(request.repository)
    _check_kserve(request.kserve)
    if request.options.name is not None:
        check_free_name(request.options.name)
    many = len(request.artifacts) > 1
    progress.stage("Verify the artifacts" if many else "Verify the artifact")
    artifacts = [Artifact.open(path.absolute()) for path in request.artifacts]
    _check_alike(artifacts)
    progress.stage("Make and check the model configs")
    served = [_served(artifact, request, repository) for artifact in artifacts]
    folders = [folder for one in served for folder in one.folders]
    entry = folders[-1].name
    # One that is there already would go on routing to models that it no longer fits: refused below.
    fixed = served[0].base is not None and has_router(repository, served[0].base)
    routed = fixed or of_one_shape([one.folder.config for one in served])
    routers = _routers(served, request.options, repository) if routed else []
    folders += routers
    if len(routers) > request.options.preprocess:
        entry = routers[-1].name
    if further is not None:
        folders += further([one.folder for one in served])
    _validate(served, folders)
    stale = [name for one in served if (name := _stale(one, repository))]
    removed = [n for n in stale if request.force and not is_named_elsewhere(repository, n)]
    server = server_options_from_repository(repository, folders, removed)
    sources = [(one.artifact, one.source) for one in served]
    untested = why_untested(sources, request.self_test) if request.self_test is not False else ""
    tested = [f"No self-test: {untested}"] if untested else []

    def check(view: Path) -> None:
        progress.stage("Try the models out on one image")
        tested.append(try_out(view, repository, folders, server, gpu=_needs_gpu(sources)))
        progress.stage(f"Write {repository}")

    if request.self_test is False or untested:
        progress.stage(f"Write {repository}")
    asked = None if request.self_test is False or untested else check
    written = write(repository, folders, force=request.force, remove=removed, check=asked)
    if request.kserve is not None:
        command = probe_command(folders, entry)
        manifest = kserve_manifest(entry, request.kserve_options, server, probe=command)
        text = kserve_text(manifest).encode()
        if not request.kserve.is_file() or request.kserve.read_bytes() != text:
            with writing_to(request.kserve):
                write_whole(request.kserve, text)
    notes = {note: None for one in served for note in one.source.notes}
    notes |= {_batching(one): None for one in served if one.model is not one.folder}
    notes |= {_left(name, removed, force=request.force): None for name in stale}
    if not routed:
        notes[_unrouted(served)] = None
    notes |= {
        f"{one.artifact.path}: {one.artifact.stale[BENCH]}": None
        for one in served
        if BENCH in one.artifact.stale
    }
    return ServeResult(
        repository,
        tuple(written),
        entry,
        server,
        request.kserve,
        any(artifact.manifest.model.random_weights for artifact in artifacts),
        next(iter(tested), ""),
        tuple(notes),
    )


def _served(artifact: Artifact, request: ServeRequest, repository: Path) -> _Served:
    options = request.options
    source = source_from_artifact(artifact, request.format)
    base, name = _base_and_name(artifact, request, repository)
    check_name(name)
    asked = (
        options.preprocess
        or len(request.artifacts) > 1
        or (base is not None and has_router(repository, base))
        # Models that were served with it may be there, and go on asking it.
        or is_ours(repository / f"{name}{FIXED}")
    )
    model, *_ = folders_from_source(source, name, options, asked_by_models=asked)
    options = replace(options, version=choose_version(repository, model, options.version))
    model, *batching = folders_from_source(source, name, options, asked_by_models=asked)
    folder = [model, *batching][-1]
    around = pipeline_folders(artifact, name, options, source.batch) if options.preprocess else []
    return _Served(artifact, source, base, model, folder, around)


def _base_and_name(
    artifact: Artifact, request: ServeRequest, repository: Path
) -> tuple[str | None, str]:
    """What the names behind one router have in common, and the name of this model.

    A single model of any other name has None: it is behind no router.
    """
    default = default_name(artifact.manifest)
    end = f"_{default.rpartition('_')[2]}"
    name = request.options.name
    if name is None:
        return plain_name(artifact.manifest.model.name), default
    is_base = len(request.artifacts) > 1 or (
        has_router(repository, name) and name not in models_in(repository)
    )
    if is_base:
        return name, f"{name}{end}"
    return name.removesuffix(end) if name.endswith(end) else None, name


def _routers(
    served: Sequence[_Served], options: ServeOptions, repository: Path
) -> list[ModelFolder]:
    """What chooses among the models, and among their pipelines."""
    base, rows = served[0].base, list(zip(served, _measured_ms(served), strict=True))
    if base is None:
        return []
    models = [route_of(one.artifact, one.folder, ms) for one, ms in rows]
    pipelines = [route_of(one.artifact, one.pipeline[-1], ms) for one, ms in rows if one.pipeline]
    return router_folders(repository, base, models, pipelines, replace(options, version=None))


def _stale(one: _Served, repository: Path) -> str:
    """Name of the model of one batch size that nobody asks any more; empty if there is none."""
    name = f"{one.folder.name}{FIXED}"
    return name if one.model is one.folder and is_ours(repository / name) else ""


def _left(name: str, removed: Sequence[str], *, force: bool) -> str:
    """What became of such a model."""
    now = f"{name.removesuffix(FIXED)} holds its file itself now"
    if name in removed:
        return f"{now}: {name} is removed"
    why = "another model's config names it" if force else "give --force to remove it"
    return f"{now}, and servers go on loading {name}: {why}"


def _batching(one: _Served) -> str:
    """How a model of one batch size is called."""
    batch, model, name = one.source.batch.max, one.model.name, one.folder.name
    if batch == 1:
        return (
            f"{model} takes one image at a time; {name} hands them on to it for pipelines, routers "
            "and cascades, which can ask only models that the server batches"
        )
    return (
        f"{model} takes batches of exactly {batch}; {name} takes 1 to {batch} images of any number "
        "of requests and fills them up for it"
    )


def _unrouted(served: Sequence[_Served]) -> str:
    """Why there is no router, which would have to promise one shape."""
    outputs = "; ".join(
        f"{folder.name} {' '.join(str(list(output.dims)) for output in folder.config.output)}"
        for folder in (one.folder for one in served)
    )
    return f"No router: the shape of the output depends on r ({outputs}); ask each by its name"


def _measured_ms(served: Sequence[_Served]) -> list[float | None]:
    """Latency of one image of each, all on one backend that the server may run them on.

    Figures of different backends do not compare: unless one backend was measured for all, none
    counts as measured.
    """
    measured: list[Mapping[str, float]] = [
        Bench.read(one.artifact.path / BENCH).latency_ms
        if BENCH in one.artifact.manifest.files
        else {}
        for one in served
    ]
    platforms = {one.source.platform for one in served}
    backends = (TENSORRT,) if platforms == {"tensorrt_plan"} else ("ort-cuda", "ort-cpu")
    if len(platforms) == 1:
        for backend in backends:
            if all(backend in latency for latency in measured):
                return [latency[backend] for latency in measured]
    return [None] * len(served)


def _needs_gpu(sources: Sequence[tuple[Artifact, Source]]) -> bool:
    """Whether what is served runs on GPUs only."""
    return any(
        source.platform == "tensorrt_plan" or artifact.manifest.precision == "bf16"
        for artifact, source in sources
    )


def why_untested(sources: Sequence[tuple[Artifact, Source]], asked: bool | None) -> str:
    """Why what is served cannot be tried out on this machine; empty if it can.

    Raises:
        MissingComponentError: if it cannot, and was asked for by name.
    """
    why = ""
    try:
        find()
        if _needs_gpu(sources) and not detect().gpus:
            why = "what is served runs on GPUs, and this machine has none that CUDA sees"
    except MissingComponentError as error:
        why = str(error)
    if why and asked:
        raise MissingComponentError(f"{why}; leave --self-test out")
    return why


def _check_alike(artifacts: Sequence[Artifact]) -> None:
    """Behind one router a request may get any of the models."""
    check_one_model(
        artifacts,
        shared_facts,
        "several artifacts served together must be of one model, with different r",
    )
    first, *rest = artifacts
    for other in rest:
        if first.manifest.merge.r == other.manifest.merge.r:
            raise InputError(
                f"{first.path} and {other.path} merge the same tokens per layer; several "
                "artifacts served together must have different r"
            )


def _validate(served: Sequence[_Served], folders: Sequence[ModelFolder]) -> None:
    names = [folder.name for folder in folders]
    holding = {one.model.name: one for one in served}
    for folder in folders:
        check_name(folder.name)
        if names.count(folder.name) > 1:
            raise InputError(f"two models would be called {folder.name}; give another --name")
        one = holding.get(folder.name)
        if one is None:
            validate(folder)
        elif one.source.platform == "onnxruntime_onnx":
            from tome_export.onnx.files import check_memory, tensors_from_graph

            check_memory(one.source.files["model.onnx"])
            validate(folder, *tensors_from_graph(one.source.files["model.onnx"]))
        else:  # an engine can only be asked on its GPU, at its build
            engine = one.artifact.manifest.engines[TENSORRT]
            validate(folder, engine.inputs, engine.outputs)


def _check_kserve(path: Path | None) -> None:
    """Whether the manifest can be written, which comes last: found out by making its draft."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file for the KServe manifest")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.parent} does not exist; make it, or give another file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device, pipe or socket; give a file for the KServe manifest")
    draft = draft_of(path)
    try:
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; give another file for the KServe manifest"
        ) from error
