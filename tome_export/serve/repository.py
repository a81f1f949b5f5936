"""Model repositories: what is written appears whole, and what was there stays as it was.

A server may be reading the repository at any moment, and takes every folder at its top for a
model, hidden ones too: one without a config keeps it from starting. So new models are made outside
and renamed in; a file of a model that is there is replaced by a rename, a whole version by an
exchange of two folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from tome_export.artifact import MANIFEST, locked, writing_to
from tome_export.artifact.files import link_or_copy
from tome_export.errors import InputError
from tome_export.serve.config import (
    HEADER,
    LABELS,
    ModelFolder,
    config_from_text,
    config_text,
    interface_of,
    is_version,
)
from tome_export.serve.names import FIXED

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG = "config.pbtxt"

DATA = ".data"
"""Ends the name of a file of weights beside an ONNX model."""

CASCADE_SETTINGS = "cascade.json"
"""In a version of a cascade: the calibrated policy, and the models that it asks."""

STAGING = ".tome-export-staging"
"""Ends the name of the folder where models are made."""

VIEW = ".view"
"""In there: the models by themselves and whole, to be tried out. No model has such a name."""

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


@dataclass(frozen=True)
class WrittenModel:
    """What became of a model: its versions now, and whether anything of it changed."""

    name: str
    versions: tuple[int, ...]
    status: Literal["written", "unchanged"]


@dataclass
class _Change:
    """What has to be done for one model.

    ``entries`` are its files and version folders that are new or replaced, in the order in which
    they may be seen (``.`` is the whole folder); ``stale`` are files of ours that it has no more.
    """

    folder: ModelFolder
    entries: list[str] = field(default_factory=lambda: ["."])
    stale: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.entries or self.stale)


def check_repository(repository: Path) -> Path:
    """The absolute path of a place where a repository is or may be; else ``InputError``."""
    path = Path(os.path.normpath(repository.absolute()))
    if not path.name:
        raise InputError(f"repository is {path}, which has no name; give a directory of its own")
    if path.exists() and not path.is_dir():
        raise InputError(f"repository {path} is a file; give a directory")
    real = path.resolve()
    inside = next((p for p in (real, *real.parents) if (p / MANIFEST).is_file()), None)
    if inside is not None:
        where = "is an artifact" if inside == real else f"is inside the artifact {inside}"
        raise InputError(f"repository {path} {where}; give a directory of its own")
    return path


def versions_of(model: Path) -> tuple[int, ...]:
    """The versions in a model's folder, as the server counts them."""
    if not model.is_dir():
        return ()
    names = [entry.name for entry in model.iterdir() if entry.is_dir()]
    return tuple(sorted(int(name) for name in names if is_version(name)))


def models_in(repository: Path) -> tuple[str, ...]:
    """Names of the models in a repository."""
    if not repository.is_dir():
        return ()
    return tuple(sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}")))


def choose_version(repository: Path, folder: ModelFolder, asked: int | None) -> int:
    """The version to write: the one asked for, or that with the same files, or the first."""
    model = repository / folder.name
    existing = versions_of(model)
    if asked is not None or not existing:
        return asked or 1
    (version,) = _versions_in(folder)
    same = [v for v in existing if _is_same_version(model / str(v), folder, version)]
    if same:
        return same[-1]
    if _signature(config_of(model)) != _signature(folder.config):
        raise _incompatible(model, existing[-1])
    raise InputError(
        f"{model} has version {existing[-1]} of other files; give --version {existing[-1] + 1} to "
        f"add one, --version {existing[-1]} --force to replace it, or another --name"
    )


def write(
    repository: Path,
    folders: Sequence[ModelFolder],
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> list[WrittenModel]:
    """Add models, or versions of models, to a repository, which is made if it is missing.

    Models, versions and files that are there with the same content are not touched. All checks come
    before the first change, ``check`` last, with a repository of these models and no others.
    Without ``force`` only models that hold nothing of their own (decoding, labels, ensemble,
    router; not a cascade) are replaced.
    """
    repository = check_repository(repository)
    with writing_to(repository), _locked(repository):
        named = {folder.name: folder for folder in folders}
        changes = [
            _change(model, folder, force or _hands_over(model, named.get(f"{folder.name}{FIXED}")))
            for folder in folders
            for model in [repository / folder.name]
        ]
        if any(changes) or check is not None:
            whole = [change.folder.name for change in changes if "." in change.entries]
            staying = [name for name in models_in(repository) if name not in whole]
            with _staging(repository, staying) as made:

                def known() -> Iterator[Path]:
                    yield from made.rglob(f"*{DATA}")
                    for name in filter(lambda name: is_ours(repository / name), staying):
                        yield from (repository / name).glob(f"*/*{DATA}")

                if check is not None:
                    for folder in folders:
                        _stage(made / VIEW / folder.name, _Change(folder), known)
                    check(made / VIEW)
                for change in changes:
                    view = made / VIEW / change.folder.name
                    _stage(made / change.folder.name, change, known, view)
                for change in changes:
                    _publish(made / change.folder.name, repository / change.folder.name, change)
    return [
        WrittenModel(name, versions_of(repository / name), "written" if change else "unchanged")
        for name, change in zip(named, changes, strict=True)
    ]


def _change(model: Path, folder: ModelFolder, force: bool) -> _Change:
    if not model.exists():
        return _Change(folder)
    check_ours(model)
    old, new = config_of(model), folder.config
    fits = _signature(old) == _signature(new)
    replaceable = force or (_is_derived(old) and _is_derived(new))
    wanted = _versions_in(folder)
    changed = [v for v in sorted(wanted) if not _is_same_version(model / v, folder, v)]
    for version in changed:
        if not (model / version).exists():
            continue
        if not force and f"{version}/{CASCADE_SETTINGS}" in folder.files:
            raise cascade_exists(model)
        if not replaceable and not fits:
            raise _incompatible(model, int(version))
        if not replaceable:
            raise InputError(
                f"{model / version} has other files; give --version {versions_of(model)[-1] + 1} "
                "to add a version, or --force to replace this one"
            )
    if not fits:  # all versions of a model share one config
        others = [version for version in versions_of(model) if str(version) not in wanted]
        if others:
            raise _incompatible(model, others[-1])
        return _Change(folder)
    files = {name: content for name, content in _files(folder).items() if not _is_versioned(name)}
    # What a version needs (labels) is there before it, as far as both may be seen at once.
    entries = [name for name, content in files.items() if not _holds(model / name, content)]
    ours = [model / LABELS, *filter(_is_ours, model.glob("configs/*.pbtxt"))]
    stale = [p for p in ours if p.is_file() and p.relative_to(model).as_posix() not in files]
    return _Change(folder, [*entries, *changed], stale)


def _hands_over(model: Path, behind: ModelFolder | None) -> bool:
    """Whether the only version of a model is what a model behind it is to serve from now on."""
    versions = [str(version) for version in versions_of(model)]
    return (
        behind is not None
        and len(versions) == 1
        and _is_same_version(model / versions[0], behind, versions[0])
    )


def config_of(model: Path) -> ModelConfig:
    """The config in a model's folder; raises ``InputError`` if it is none."""
    file = model / CONFIG
    try:
        text = file.read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a model config ({error}); correct or remove it") from error
    return config_from_text(text, str(file))


def check_ours(model: Path) -> None:
    """Raise ``InputError`` for the folder of a model that we did not write."""
    if not is_ours(model):
        raise InputError(
            f"{model} is there and its {CONFIG} is not one that 'tome-export serve' wrote; give "
            f"another --name than {model.name}"
        )


def is_ours(model: Path) -> bool:
    """Whether a model's folder is one that we wrote."""
    return _is_ours(model / CONFIG)


def _is_ours(config: Path) -> bool:
    return config.is_file() and config.read_bytes().startswith(HEADER.encode())


def cascade_exists(model: Path) -> InputError:
    """What is said of a cascade that another would replace."""
    return InputError(
        f"{model} is there, with the thresholds of its own calibration; give another --name, or "
        "--force to replace it"
    )


def _incompatible(model: Path, version: int) -> InputError:
    """What is said of a version that the new config does not fit."""
    only = versions_of(model) == (version,)
    fix = f", or --version {version} --force to replace that one" if only else ""
    return InputError(
        f"{model} has version {version} with another platform, batch, inputs or outputs, "
        f"and versions share one config; give another --name{fix}"
    )


def _signature(config: ModelConfig) -> object:
    return config.platform, config.max_batch_size, interface_of(config)


def _is_derived(config: ModelConfig) -> bool:
    """Whether it is one of the models around a model."""
    return bool(config.platform == "ensemble" or config.backend in ("python", "dali"))


def _is_versioned(name: str) -> bool:
    return PurePosixPath(name).parts[0].isdecimal()


def _versions_in(folder: ModelFolder) -> set[str]:
    return {PurePosixPath(name).parts[0] for name in folder.files if _is_versioned(name)}


def _files(folder: ModelFolder) -> dict[str, Path | bytes]:
    return {**folder.files, CONFIG: config_text(folder.config).encode()}


def _is_same_version(target: Path, folder: ModelFolder, version: str) -> bool:
    """Whether a version folder holds the same files as the model has under a version."""
    wanted = {
        PurePosixPath(name).relative_to(version).as_posix(): content
        for name, content in folder.files.items()
        if PurePosixPath(name).parts[0] == version
    }
    # Servers and interpreters leave caches beside the files, such as __pycache__.
    found = {p.name for p in target.iterdir() if p.is_file()} if target.is_dir() else set()
    return found == {*wanted} and all(_holds(target / n, c) for n, c in wanted.items())


def _holds(path: Path, content: Path | bytes) -> bool:
    if not path.is_file():
        return False
    if isinstance(content, bytes):
        return path.stat().st_size == len(content) and path.read_bytes() == content
    return filecmp.cmp(path, content, shallow=False)


def _stage(
    folder: Path, change: _Change, known: Callable[[], Iterator[Path]], view: Path | None = None
) -> None:
    """Make what is new of a model in the staging folder; what the view has is not copied again.

    Weights that models have in common are stored once: ``known`` gives the files of weights that
    are there.
    """
    for name, content in _files(change.folder).items():
        if not {".", name, PurePosixPath(name).parts[0]} & {*change.entries}:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if view is not None and (view / name).is_file():
            (view / name).rename(target)
        elif isinstance(content, bytes):
            target.write_bytes(content)
        else:
            others = known() if content.suffix == DATA else ()
            twin = next((one for one in others if _holds(one, content)), None)
            if twin is None:
                shutil.copyfile(content, target)
            else:
                link_or_copy(twin, target)


def _publish(staged: Path, model: Path, change: _Change) -> None:
    for entry in change.entries:
        target = model / entry
        target.parent.mkdir(exist_ok=True)
        if target.is_dir():
            exchange(staged / entry, target)
        else:
            (staged / entry).rename(target)
    for path in change.stale:
        path.unlink()


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Make the repository if it is missing and keep other writers out."""
    made = not repository.exists()
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # /proc
        raise InputError(f"cannot make the folder {repository}; give another directory") from error
    try:
        with locked(repository):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it has models now
                repository.rmdir()


@contextlib.contextmanager
def _staging(repository: Path, staying: Sequence[str]) -> Iterator[Path]:
    """A folder on the same filesystem that no server looks into; what a killed command left goes.

    Best beside the repository. Where that is another filesystem or not ours to write, inside a
    model of those that stay, where folders that are no numbers are ignored; else at its top.
    """
    inside = [repository / name / STAGING for name in staying]
    beside = repository.with_name(f".{repository.name}{STAGING}")
    places = [beside, *inside[:1], repository / STAGING]
    for place in (*places, *inside):
        with contextlib.suppress(OSError):
            shutil.rmtree(place)
    for place in places:
        try:
            place.mkdir()
        except OSError as error:
            if place is places[-1] or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            continue
        try:
            if not _renames_into(place, repository):
                continue
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return


def _renames_into(place: Path, repository: Path) -> bool:
    """Whether one is on the mount of the other, which device numbers do not tell."""
    probe, landed = place / "probe", repository / f"{STAGING}-probe"
    probe.touch()
    try:
        probe.rename(landed)  # a file, which servers do not look at
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    finally:
        landed.unlink(missing_ok=True)
    return True


def exchange(first: Path, second: Path) -> None:
    """Swap two folders; in one step where the kernel and the filesystem know how."""
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if rename is not None and rename(*arguments) == 0:
        return
    aside = first.with_name(f"{first.name}.old")
    second.rename(aside)
    try:
        first.rename(second)
    except BaseException:
        if not second.exists():
            aside.rename(second)
        raise
    aside.rename(first)
