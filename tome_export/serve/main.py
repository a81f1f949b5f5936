"""``tome-export serve``: a model repository from artifacts.

What is asked for (``ServeRequest``) becomes model folders: those of each artifact's file, of the
pipeline around it, and routers. They are tried out on a server, then written, or nothing is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tome_export.artifact import Artifact
from tome_export.artifact.bench import BENCH, Bench
from tome_export.artifact.compatibility import check_one_model, shared_facts
from tome_export.artifact.files import check_new_file
from tome_export.engine.gpu import detect
from tome_export.errors import InputError, MissingComponentError
from tome_export.progress import Progress, Silent
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    check_packages,
    interface_of,
    model_folders,
)
from tome_export.serve.dali import path_note
from tome_export.serve.ensemble import pipeline_folders
from tome_export.serve.installation import find
from tome_export.serve.kserve import KServeOptions, write_manifest
from tome_export.serve.load import Analysis
from tome_export.serve.model_file import TENSORRT, ModelFile, model_file_from_artifact
from tome_export.serve.names import FIXED, check_chosen_name, check_name, name_end, plain_name
from tome_export.serve.repository import (
    WrittenModel,
    check_repository,
    choose_version,
    is_ours,
    models_in,
    write,
)
from tome_export.serve.router import (
    RouteList,
    has_router,
    mixed_weights_note,
    route_to,
    router_folders,
    sizes_behind,
)
from tome_export.serve.self_test import run_self_test
from tome_export.serve.server import ServerOptions, server_options_from_repository
from tome_export.spec import ImageSize

__all__ = ["KServeOptions", "ServeOptions", "ServeRequest", "ServeResult", "serve"]


@dataclass(frozen=True)
class ServeRequest:
    """What to serve.

    Attributes:
        artifacts: Artifact directories; several are one model with different r, image size or both,
            behind a router.
        repository: Directory of the model repository.
        options: How it is served.
        format: ``auto`` (the TensorRT engine where there is one), ``engine`` or ``onnx``.
        force: Replace a version that has other files.
        self_test: Have a server answer about one image first; None where that can be done here.
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
        models: What was written, each after the models it needs.
        entry: The model a client asks: the router (of pipelines where there are some), the
            pipeline, or the model itself; the last one's, where there are several and no router.
        server: What a server of the repository must be started with.
        random_weights: Whether the model has learned nothing.
        self_test: What was tried out, or why nothing was; empty if that was not asked for.
        notes: What a user should know.
        analysis: What ``serve --analyze`` has measured and chosen.
    """

    repository: Path
    models: tuple[WrittenModel, ...]
    entry: str
    server: ServerOptions
    kserve: Path | None
    random_weights: bool
    self_test: str
    notes: tuple[str, ...]
    analysis: Analysis | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            **vars(self),
            "repository": str(self.repository),
            "models": [vars(model) for model in self.models],
            "server": {**vars(self.server)},
            "kserve": None if self.kserve is None else str(self.kserve),
            "analysis": None if self.analysis is None else self.analysis.to_dict(),
        }


@dataclass(frozen=True)
class _ServedArtifact:
    """The models of one artifact: see ``model_folders`` and ``pipeline_folders``.

    ``base`` is what the names behind its router have in common; None if it is behind none.
    """

    artifact: Artifact
    file: ModelFile
    base: str | None
    models: Sequence[ModelFolder]
    pipeline: Sequence[ModelFolder]

    @property
    def image_size(self) -> ImageSize:
        """Size of its images."""
        return self.artifact.manifest.preprocessing.image_size

    @property
    def called(self) -> ModelFolder:
        """The model that users call."""
        return self.models[-1]


@dataclass(frozen=True)
class Plan:
    """What is to be in a repository: checked against it, and not written yet.

    Attributes:
        folders: All models, each after those that it needs.
        routers: Those of them that choose among others.
        entry: See ``ServeResult``.
    """

    repository: Path
    served: Sequence[_ServedArtifact]
    folders: Sequence[ModelFolder]
    routers: Sequence[ModelFolder]
    entry: str


def planned(
    request: ServeRequest,
    progress: Progress | None = None,
    further: Callable[[Sequence[ModelFolder]], list[ModelFolder]] | None = None,
) -> Plan:
    """What ``serve`` would write; raises what it raises before it tries the models out."""
    progress = progress or Silent()
    check_packages()
    repository, options = check_repository(request.repository), request.options
    if request.kserve is not None:
        check_new_file(request.kserve, force=True)
    if options.name is not None:
        check_chosen_name(options.name)
    many = len(request.artifacts) > 1
    progress.stage("Verify the artifacts" if many else "Verify the artifact")
    artifacts = [Artifact.open(path.absolute()) for path in request.artifacts]
    _check_compatible(artifacts)
    progress.stage("Make and check the model configs")
    sized = _have_several_sizes(artifacts, request, repository)
    served = [
        _served_artifact(artifact, request, repository, sized=sized) for artifact in artifacts
    ]
    folders = [folder for one in served for folder in (*one.models, *one.pipeline)]
    entry = folders[-1].name
    routers = _routers(served, folders, options, repository)
    folders += routers
    if len(routers) > options.preprocess:
        entry = routers[-1].name
    if further is not None:
        folders += further([one.called for one in served])
    _check_names(folders)
    server_options_from_repository(repository)  # finds damaged configs
    return Plan(repository, served, folders, routers, entry)


def serve(
    request: ServeRequest,
    progress: Progress | None = None,
    further: Callable[[Sequence[ModelFolder]], list[ModelFolder]] | None = None,
) -> ServeResult:
    """Write artifacts into a model repository, all checked before the first file is written.

    What ``further`` makes of the artifacts' models is checked and written with them.

    Raises:
        UsageError: if an option is out of its range.
        InputError: if an artifact is damaged, artifacts are not of one model, or the repository
            cannot take them.
        MissingComponentError: if the packages of the ``serve`` extra are missing, or what an
            explicit self-test needs.
        ExportError: if the self-test's server does not start.
    """
    progress = progress or Silent()
    plan = planned(request, progress, further)
    repository, served, folders = plan.repository, plan.served, plan.folders
    artifacts, routers = [one.artifact for one in served], plan.routers
    files = [one.file for one in served]
    untested = why_untested(files, request.self_test) if request.self_test is not False else ""
    tested = [f"No self-test: {untested}"] if untested else []

    def check(view: Path) -> None:
        progress.stage("Try the models out on one image")
        gpu = any(file.needs_gpu for file in files)
        tested.append(run_self_test(view, repository, folders, gpu=gpu))
        progress.stage(f"Write {repository}")

    testing = request.self_test is not False and not untested
    if not testing:
        progress.stage(f"Write {repository}")
    written = write(repository, folders, force=request.force, check=check if testing else None)
    server = server_options_from_repository(repository)
    if request.kserve is not None:
        write_manifest(request.kserve, folders, plan.entry, request.kserve_options, server)
    notes = [
        *(note for one in served for note in one.file.notes),
        *(_batching_note(one) for one in served if len(one.models) > 1),
        *(
            f"{one.called.name} holds its file itself now, and servers go on loading "
            f"{one.called.name}{FIXED}, which filled batches up for it: remove that folder"
            for one in served
            if len(one.models) == 1 and is_ours(repository / f"{one.called.name}{FIXED}")
        ),
        *([] if routers or len(served) == 1 else [_no_router_note(served)]),
        *filter(None, [path_note(repository) if request.options.dali else ""]),
        *filter(None, (mixed_weights_note(repository, router.name) for router in routers[:1])),
        *(
            f"{artifact.path}: {artifact.stale[BENCH]}"
            for artifact in artifacts
            if BENCH in artifact.stale
        ),
    ]
    return ServeResult(
        repository,
        tuple(written),
        plan.entry,
        server,
        request.kserve,
        any(artifact.manifest.model.random_weights for artifact in artifacts),
        "".join(tested),
        tuple(dict.fromkeys(notes)),
    )


def _check_compatible(artifacts: Sequence[Artifact]) -> None:
    """Behind one router a request may get any of the models."""
    sizes = {artifact.manifest.preprocessing.image_size for artifact in artifacts}
    check_one_model(
        artifacts,
        partial(shared_facts, any_size=len(sizes) > 1),
        "several artifacts served together must be of one model, with different r or image sizes",
    )
    for first, other in itertools.combinations(artifacts, 2):
        same = first.manifest.merge.r == other.manifest.merge.r
        if same and first.manifest.preprocessing == other.manifest.preprocessing:
            raise InputError(
                f"{first.path} and {other.path} merge the same tokens per layer; several "
                "artifacts served together must have different r or image sizes"
            )


def _have_several_sizes(
    artifacts: Sequence[Artifact], request: ServeRequest, repository: Path
) -> bool:
    """Whether models differ in image size, with those that the router has already.

    One of another size than the model's own is called by it as well: the other may come later.
    """
    name = request.options.name
    base = name or plain_name(artifacts[0].manifest.model.name)
    sizes = {str(artifact.manifest.preprocessing.image_size) for artifact in artifacts}
    if name is None and any(artifact.manifest.model.image_size for artifact in artifacts):
        return True
    chosen = name is not None and name.endswith(name_end(artifacts[0].manifest, sized=True))
    return chosen or len(sizes | sizes_behind(repository, base)) > 1


def _check_names(folders: Sequence[ModelFolder]) -> None:
    names = [folder.name for folder in folders]
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise InputError(f"two models would be called {name}; give another --name")


def _served_artifact(
    artifact: Artifact, request: ServeRequest, repository: Path, *, sized: bool
) -> _ServedArtifact:
    options = request.options
    file = model_file_from_artifact(artifact, request.format)
    file = replace(file, needs_gpu=file.needs_gpu or options.dali)
    base, name = _base_and_name(artifact, request, repository, sized=sized)
    check_name(name)
    asked = (
        options.preprocess
        or len(request.artifacts) > 1
        or (base is not None and has_router(repository, base))
        # Models that were served with it may be there, and go on asking it.
        or is_ours(repository / f"{name}{FIXED}")
    )
    model, *_ = model_folders(file, name, options, asked_by_models=asked)
    options = replace(options, version=choose_version(repository, model, options.version))
    models = model_folders(file, name, options, asked_by_models=asked)
    around = pipeline_folders(artifact, name, options, file.batch.max) if options.preprocess else []
    return _ServedArtifact(artifact, file, base, models, around)


def _base_and_name(
    artifact: Artifact, request: ServeRequest, repository: Path, *, sized: bool
) -> tuple[str | None, str]:
    """What the names behind one router have in common, and the name of this model.

    A single model of any other name has None: it is behind no router.
    """
    end = name_end(artifact.manifest, sized=sized)
    name = request.options.name
    if name is None:
        base = plain_name(artifact.manifest.model.name)
        return base, f"{base}{end}"
    is_base = len(request.artifacts) > 1 or (
        has_router(repository, name) and name not in models_in(repository)
    )
    if is_base:
        return name, f"{name}{end}"
    return name.removesuffix(end) if name.endswith(end) else None, name


def _routers(
    served: Sequence[_ServedArtifact],
    folders: Sequence[ModelFolder],
    options: ServeOptions,
    repository: Path,
) -> list[ModelFolder]:
    base, interfaces = served[0].base, dict[ImageSize, object]()
    # The tokens that a tower gives are fewer for a larger r: no model can stand in for another of
    # the same image size.
    same_interface = all(
        interfaces.setdefault(one.image_size, interface) == interface
        for one in served
        for interface in [interface_of(one.called.config)]
    )
    # A router that is there would go on routing to models that it no longer fits: it is tried.
    if base is None or not (same_interface or has_router(repository, base)):
        return []
    routes = [
        route_to(one.artifact, one.called.name, ms)
        for one, ms in zip(served, _measured_ms(served), strict=True)
    ]
    recipe = served[0].artifact.manifest.preprocessing
    listed = RouteList(routes=tuple(routes), crop_pct=recipe.crop_pct, resize=recipe.resize)
    return router_folders(repository, base, listed, folders, replace(options, version=None))


def _measured_ms(served: Sequence[_ServedArtifact]) -> list[float | None]:
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
    platforms = {one.file.platform for one in served}
    backends = (TENSORRT,) if platforms == {"tensorrt_plan"} else ("ort-cuda", "ort-cpu")
    if len(platforms) == 1:
        for backend in backends:
            if all(backend in latency for latency in measured):
                return [latency[backend] for latency in measured]
    return [None] * len(served)


def why_untested(files: Sequence[ModelFile], asked: bool | None) -> str:
    """Why what is served cannot be tried out on this machine; empty if it can."""
    why = ""
    try:
        find()
        if any(file.needs_gpu for file in files) and not detect().gpus:
            why = "what is served runs on GPUs, and this machine has none that CUDA sees"
    except MissingComponentError as error:
        why = str(error)
    if why and asked:
        raise MissingComponentError(f"{why}; leave --self-test out")
    return why


def _batching_note(one: _ServedArtifact) -> str:
    """How a model of one batch size is called."""
    batch, model, name = one.file.batch.max, one.models[0].name, one.called.name
    if batch == 1:
        return (
            f"{model} takes one image at a time; {name} hands them on to it for pipelines, routers "
            "and cascades, which can ask only models that the server batches"
        )
    return (
        f"{model} takes batches of exactly {batch}; {name} takes 1 to {batch} images of any number "
        "of requests and fills them up for it"
    )


def _no_router_note(served: Sequence[_ServedArtifact]) -> str:
    """Why there is no router, which would have to promise one shape."""
    outputs = "; ".join(
        f"{one.called.name} {' '.join(str(list(o.dims)) for o in one.called.config.output)}"
        for one in served
    )
    return f"No router: the shape of the output depends on r ({outputs}); ask each by its name"
