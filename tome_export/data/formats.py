"""Folders, tar shards and Parquet files, each listed by the rules of those who made the format.

Samples of a tar file are those that ``webdataset`` groups; columns and classes of a Parquet file
are those that Hugging Face ``datasets`` reads from its schema, and a listing is one of its tables.
The images themselves are not read through its loaders: they give a data set either as a stream
from its first image on or after copying every image into a cache, whereas an evaluation takes
images evenly from all, goes on where it was killed, and hands chunks to processes and machines in
any order. So ``pyarrow`` reads row groups, and ``tarfile`` says where members lie. Nor are folders
listed by ``imagefolder``: it takes the innermost folder for the class where torchvision's
``ImageFolder`` takes the outermost, makes splits of folders named ``test``, and ends at a link to
nowhere or a name that is not UTF-8, where all other images are wanted.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tome_export.data.labels import Classes, class_folders, labels_from_file, numbered_classes
from tome_export.data.source import Source, printable, stamp
from tome_export.errors import InputError

MAX_LABEL_BYTES = 1 << 20
"""Largest ``.json`` or ``.cls`` member that is read."""

LABELS = ("label", "labels")
"""Columns of a Parquet file that hold its labels."""


def folder_source(
    folder: Path, suffixes: Collection[str], classes: Classes | None, labels: Path | None
) -> Source:
    """The images of a folder, by class sub-folder, flat, or labelled by a file; see ``find``."""
    root = folder.absolute()
    source = Source("folder", printable(str(folder)), [root])
    tops: list[str] = []
    names: list[str] = []
    for below, folders, files in _walked(root):
        tops = tops if below else folders
        for name in sorted(files):
            if _suffix(name) in suffixes:
                try:
                    mark = stamp(root / below / name)
                except OSError:  # a link that leads nowhere: unreadable, but listed
                    mark = "missing"
                names.append(f"{below}{name}")
                source.add(names[-1], mark=mark)
    flat = any("/" not in name for name in names)
    if classes is not None and labels is not None:
        source.classes = labels_from_file(labels, names, folder, classes)
    elif classes is not None and not flat and tops:
        index, note = class_folders(tops, classes)
        source.notes.append(note)
        source.classes = [index[name.partition("/")[0]] for name in names]
    if not names:
        raise InputError(
            f"no images under {folder}; expected class sub-folders with, or flat, files ending in "
            f"{', '.join(suffixes)}, or .tar or .parquet shards"
        )
    if classes is not None and labels is None and flat and any("/" in name for name in names):
        raise InputError(
            f"{folder} has images both beside and inside sub-folders; keep one layout, or give "
            "every image's class with --labels"
        )
    return source


def _walked(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each folder below: relative path with its slash, the folders in it, and all else in it."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); allow it to be read")

    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = Path(place).stat()
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if (status.st_dev, status.st_ino) in seen:  # a link may lead back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below = Path(place).relative_to(root).as_posix()
        yield "" if below == "." else f"{below}/", [*folders], files


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a million names)


def tar_source(
    text: str, paths: Sequence[Path], suffixes: Collection[str], classes: Classes | None
) -> Source:
    """The samples of tar shards, of which headers and labels only are read.

    A sample is what webdataset makes one of: members next to each other whose paths are the same
    up to the first dot of the file's name. What follows that dot names the member within it.
    """
    from webdataset.tariterators import group_by_keys

    source, lonely = Source("tar", text, paths), 0
    for number, path in enumerate(paths):
        before = len(source)
        shard = _Shard(path, suffixes)
        try:
            for sample in group_by_keys(shard.members()):
                images = _named(sample, suffixes)
                label = next(
                    (sample[f] for s in (".cls", ".json") for f in _named(sample, (s,))), None
                )
                if len(images) > 1:
                    raise InputError(_several(path, sample["__key__"], images))
                if not images:
                    lonely += label is not None
                # Where the shard is cut, the label of the last image may be lost with its tail.
                elif label is not None or not shard.cut:
                    name, start, length = sample[images[0]]
                    source.add(name, number, start, length)
                    if classes is not None and label is not None:
                        where = printable(f"{path.name}:{name}")
                        source.classes.append(classes.index(label, where))
        except ValueError as error:
            reason = printable(str(error.args[0]).partition(" dict_keys")[0])
            raise InputError(
                f"{path} is no shard of webdataset ({reason}); write it anew"
            ) from None
        if shard.cut:
            source.notes.append(
                f"{printable(str(path))} is cut short after {len(source) - before} images; copy "
                "it again"
            )
    if not len(source):
        raise InputError(
            f"no images in {text}; expected members such as 000001.jpg with 000001.cls"
        )
    if lonely and classes is not None:
        source.notes.append(
            f"{lonely} labels have no image beside them in the shard and are not used"
        )
    if len(source.classes) not in (0, len(source)):
        raise InputError(
            f'{text} has labels (.cls, or .json with "label") for {len(source.classes)} of '
            f"{len(source)} images; label all or none"
        )
    return source


def _named(sample: dict[str, Any], suffixes: Collection[str]) -> list[str]:
    """Members of a sample by how they end: ``jpg``, or if there is none ``left.jpg``."""
    fields = [f for f, value in sample.items() if not f.startswith("__") and value is not None]
    exact = [field for field in fields if f".{field}" in suffixes]
    return exact or [f for f in fields if f".{f.rpartition('.')[2]}" in suffixes]


def _several(path: Path, key: str, images: list[str]) -> str:
    shown = ", ".join(map(printable, images[:3])) + (", …" if len(images) > 3 else "")
    return (
        f"{path} has {len(images)} images under one key, {printable(key)} ({shown}); webdataset's "
        "key ends at the first dot of a file's name, write the shard with one image for each"
    )


class _Shard:
    """One pass over the headers of a tar file."""

    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        self.path, self.suffixes, self.cut = path, suffixes, False

    def members(self) -> Iterator[dict[str, Any]]:
        """Images as name, offset and size, labels as they are; as webdataset passes them on."""
        try:
            archive = tarfile.open(self.path, "r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError:
            raise InputError(
                f"{self.path} is not an uncompressed tar file; webdataset's shards are not "
                "compressed, unpack it or write it anew"
            ) from None
        with archive:
            while (member := self._next(archive)) is not None:
                suffix = _suffix(member.name)
                # What macOS adds, and webdataset's own notes.
                if not member.isfile() or Path(member.name).name.startswith((".", "__")):
                    continue
                found: Any = (member.name, member.offset_data, member.size)
                if suffix not in self.suffixes:
                    if suffix not in (".cls", ".json") or member.size > MAX_LABEL_BYTES:
                        continue
                    found = self._label(archive, member, suffix)
                yield {"fname": member.name, "data": found, "__url__": str(self.path)}

    def _next(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        try:
            member = archive.next()
        except (tarfile.ReadError, OSError):
            self.cut = True
            return None
        # The module would keep every header that it has seen.
        vars(archive)["members"] = []
        if member is None:
            # The module takes the end of the file for the mark of the end.
            with self.path.open("rb") as stream:
                stream.seek(vars(archive)["offset"])
                self.cut = stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
        return member

    def _label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Any:
        stream = archive.extractfile(member)
        try:
            data = stream.read() if stream is not None else b""
        except tarfile.ReadError:  # the shard ends here, as the next header will tell
            return None
        try:
            text = data.decode()
            values = {"label": text.strip()} if suffix == ".cls" else json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(
                f"{self.path}:{printable(member.name)} cannot be read as a label; expected "
                f"{'a class index' if suffix == '.cls' else 'JSON with a label'}"
            ) from None
        return values.get("label") if isinstance(values, dict) else None


def parquet_source(text: str, paths: Sequence[Path], classes: Classes | None) -> Source:
    """The rows of Parquet files, of which footers and labels only are read."""
    import pyarrow
    from pyarrow import parquet

    source = Source("parquet", text, paths)
    labelled = []
    for number, path in enumerate(paths):
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError):
            raise InputError(f"{path} is not a whole Parquet file; copy it again") from None
        with file:
            features = _features(file.schema_arrow, path)
            source.column = _image_column(features, source.column, path)
            before = len(source)
            for group in range(file.num_row_groups):
                for row in range(file.metadata.row_group(group).num_rows):
                    source.add(f"row {len(source) - before}", number, group, row)
            if classes is not None:
                labels, note = _labels(file, features, path, classes)
                labelled.append(bool(labels))
                source.classes += labels
                source.notes += [note] if note and note not in source.notes else []
    if not len(source):
        raise InputError(f"no images in {text}; the Parquet files have no rows")
    if any(labelled) and not all(labelled):
        raise InputError(f"{text} has labels in some of its files only; label all or none")
    return source


def _features(schema: Any, path: Path) -> Any:
    """Columns as ``datasets`` wrote them: which hold images, and names of classes."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise InputError(
            f"{path} has a description by Hugging Face datasets that cannot be read ({reason}); "
            "write it anew"
        ) from None


def _image_column(features: Any, expected: str, path: Path) -> str:
    """That of the files before, else ``image``, else the only one of images."""
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    column = expected or ("image" if "image" in features or len(images) != 1 else images[0])
    if column not in features:
        raise InputError(
            f"{path} has the columns {', '.join(features)}; expected {column!r} and {LABELS[0]!r}"
        )
    return column


def _labels(file: Any, features: Any, path: Path, classes: Classes) -> tuple[list[int], str]:
    """A file's labels, none where it has none, and how names of classes were matched."""
    from datasets import ClassLabel

    column = next((name for name in LABELS if name in features), None)
    values = file.read(columns=[column])[column].to_pylist() if column is not None else []
    # Hugging Face marks test images without a label with -1.
    if all(value in (None, -1) for value in values):
        return [], ""
    names, note = getattr(features[column], "names", None), ""
    if isinstance(features[column], ClassLabel) and names and classes.by_name:
        index, note = numbered_classes(names, classes, path.name)
        values = [v if v is None or not 0 <= v < len(index) else index[v] for v in values]
    return [classes.index(v, f"{path.name}:row {row}") for row, v in enumerate(values)], note
