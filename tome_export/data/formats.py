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

import contextlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tome_export.data.folders import some, suffix, walk
from tome_export.data.labels import Classes, class_folders, labels_from_file, numbered_classes
from tome_export.data.source import Source, printable, stamp
from tome_export.errors import InputError

LABEL_MEMBERS = (".cls", ".json", ".txt")
"""Members of a tar file that may hold a label; the first that a sample has is its label."""

LABEL_KEYS = ("label", "labels", "class", "cls")
"""Keys of a ``.json`` member that hold its label; the first that is there does."""

MAX_LABEL_BYTES = 1 << 20
"""Largest of them that is read."""

META = re.compile(r"__[^/]*__($|/)")
"""Names of webdataset's own notes."""

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
    left_out: list[str] = []
    for below, folders, files in walk(root, left_out):
        tops = tops if below else folders
        for name in files:
            if suffix(name) in suffixes:
                try:
                    mark = stamp(root / below / name)
                except OSError:  # a link that leads nowhere: unreadable, but listed
                    mark = "missing"
                names.append(f"{below}{name}")
                source.add(names[-1], mark=mark)
    left_out = [f"left out of {source.text} are {printable(one)}" for one in left_out]
    source.notes += left_out
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
            + "".join(f"; {note}" for note in left_out)
        )
    if classes is not None and labels is None and flat and any("/" in name for name in names):
        raise InputError(
            f"{folder} has images both beside and inside sub-folders; keep one layout, or give "
            "every image's class with --labels"
        )
    return source


def tar_source(
    text: str, paths: Sequence[Path], suffixes: Collection[str], classes: Classes | None
) -> Source:
    """The samples of tar shards, of which headers and labels only are read.

    A sample is what webdataset makes one of: members next to each other whose paths are the same
    up to the first dot of the file's name. What follows that dot names the member within it.
    """
    from webdataset.tariterators import group_by_keys

    source, labels, left_out = Source("tar", text, paths), _TarLabels(classes), Counter[str]()
    for number, path in enumerate(paths):
        before = len(source)
        shard, keys = _Shard(path, suffixes, labels), set[int]()
        try:
            for sample in group_by_keys(shard.members()):
                images, marked = _named(sample, suffixes), _named(sample, LABEL_MEMBERS)
                key = printable(sample["__key__"])
                if len(images) > 1:
                    raise InputError(_several(path, key, images))
                if not images:
                    labels.lonely += bool(_named(sample, LABEL_MEMBERS[:2]))
                # Where the shard is cut, the label of the last image may be lost with its tail.
                elif marked or not shard.cut:
                    if (hashed := hash(sample["__key__"])) in keys:
                        raise InputError(
                            f"{path} has two images under one key, {key}, apart from each other; "
                            "write the shard with one image for each"
                        )
                    keys.add(hashed)
                    name, start, length = sample[images[0]]
                    source.add(name, number, start, length)
                    labels.add(sample, printable(f"{path.name}:{name}"))
                    shard.left_out["images beside one of a shorter name, as of masks"] += sum(
                        f".{field.rpartition('.')[2]}" in suffixes for field in sample
                    ) - len(images)
        except ValueError as error:
            reason = printable(str(error.args[0]).partition(" dict_keys")[0])
            raise InputError(
                f"{path} is no shard of webdataset ({reason}); write it anew"
            ) from None
        left_out.update(shard.left_out)
        if shard.cut:
            source.notes.append(
                f"{printable(str(path))} is cut short after {len(source) - before} images; copy "
                "it again"
            )
    source.notes += [f"left out of {text} are {n} {what}" for what, n in left_out.items() if n]
    if not len(source):
        raise InputError(
            f"no images in {text}; expected members such as 000001.jpg with 000001.cls"
            + "".join(f"; {note}" for note in source.notes)
        )
    source.classes = labels.of_all(source)
    return source


class _TarLabels:
    """The labels of samples, in what of their members they may be."""

    def __init__(self, classes: Classes | None) -> None:
        self.classes = classes
        self.lonely = 0
        self.others = Counter[str]()
        self._found: list[int] = []
        self._texts: list[int] = []
        self._no_class = ""

    def add(self, sample: dict[str, Any], where: str) -> None:
        """The next image's label, if its sample has one."""
        if self.classes is None:
            return
        for form in LABEL_MEMBERS:
            fields = _named(sample, (form,))
            if not fields:
                continue
            if form == ".txt":
                # It may be a caption: a label only where that of every image is one.
                try:
                    self._texts.append(self.classes.index(sample[fields[0]], where))
                except InputError as error:
                    self._no_class = self._no_class or str(error)
            elif len(fields) > 1:
                raise InputError(
                    f"{where} has {len(fields)} labels ({printable(', '.join(fields))}); expected "
                    f"one, such as {form[1:]}"
                )
            else:
                self._found.append(self.classes.index(sample[fields[0]], where))
            return

    def of_all(self, source: Source) -> list[int]:
        """The label of each image, or none; what is not used is told to the source."""
        if self.classes is None:
            return []
        if self.lonely:
            source.notes.append(
                f"{self.lonely} labels have no image beside them in the shard and are not used"
            )
        if self._found:
            if len(self._found) < len(source):
                raise InputError(
                    f"{source.text} has labels (.cls, or .json with "
                    f'"{LABEL_KEYS[0]}") for {len(self._found)} of {len(source)} images; label all '
                    "or none"
                )
            return self._found
        if len(self._texts) == len(source):
            source.notes.append("labels are read of .txt, each of which is a class")
            return self._texts
        if self._texts or self._no_class:
            reason = self._no_class or f"only {len(self._texts)} of {len(source)} images have one"
            source.notes.append(f".txt is not used for labels: {reason}")
        if self.others:
            shown = some([f"{name} ({count})" for name, count in self.others.most_common()])
            source.notes.append(
                f"no labels: they are read of .cls, of .json with {_or(LABEL_KEYS)}, and of .txt "
                f"if all are classes; not read are {printable(shown)}"
            )
        return []


def _or(names: Sequence[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def _named(sample: dict[str, Any], suffixes: Collection[str]) -> list[str]:
    """Members of a sample by how they end: ``jpg``, or if there is none ``left.jpg``."""
    fields = [f for f, value in sample.items() if not f.startswith("__") and value is not None]
    exact = [field for field in fields if f".{field}" in suffixes]
    return exact or [f for f in fields if f".{f.rpartition('.')[2]}" in suffixes]


def _several(path: Path, key: str, images: list[str]) -> str:
    return (
        f"{path} has {len(images)} images under one key, {key} "
        f"({printable(some(images, 3))}); webdataset's key ends at the first dot of a file's "
        "name, write the shard with one image for each"
    )


class _Shard:
    """One pass over the headers of a tar file."""

    def __init__(self, path: Path, suffixes: Collection[str], labels: _TarLabels) -> None:
        self.path, self.suffixes, self.labels = path, suffixes, labels
        self.cut = False
        self.left_out = Counter[str]()

    def members(self) -> Iterator[dict[str, Any]]:
        """Images as name, offset and size, labels as they are; as webdataset passes them on."""
        from webdataset.tariterators import base_plus_ext

        try:
            archive = tarfile.open(self.path, "r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError:
            raise InputError(
                f"{self.path} is not an uncompressed tar file; webdataset's shards are not "
                "compressed, unpack it or write it anew"
            ) from None
        except Exception as error:
            raise self._damaged(error) from None
        with archive:
            while (member := self._next(archive)) is not None:
                ending = suffix(member.name)
                if reason := _no_sample(member, base_plus_ext(member.name)[0]):
                    self.left_out[f"images {reason}"] += ending in self.suffixes
                    continue
                found: Any = (member.name, member.offset_data, member.size)
                if ending not in self.suffixes:
                    if ending not in LABEL_MEMBERS:
                        self.labels.others[ending or "names without an ending"] += 1
                        continue
                    # Without classes, that there is one is enough.
                    found = self.labels.classes is None or self._label(archive, member, ending)
                elif member.issparse():
                    raise InputError(
                        f"{self.path}:{printable(member.name)} is stored with holes; write the "
                        "shard without --sparse"
                    )
                yield {"fname": member.name, "data": found, "__url__": str(self.path)}

    def _next(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        try:
            member = archive.next()
        except (tarfile.ReadError, OSError):
            self.cut = True
            return None
        # The module raises what it happens to meet in a header of nonsense.
        except Exception as error:
            raise self._damaged(error) from None
        # The module would keep every header that it has seen.
        vars(archive)["members"] = []
        if member is None:
            # The module takes the end of the file for the mark of the end.
            with self.path.open("rb") as stream:
                stream.seek(vars(archive)["offset"])
                self.cut = stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
        return member

    def _damaged(self, error: Exception) -> InputError:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        return InputError(f"{self.path} is damaged ({reason}); copy it again")

    def _label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, form: str) -> Any:
        """An index or text; None where there is none."""
        if member.size > MAX_LABEL_BYTES:
            self.labels.others[f"{form} of more than {MAX_LABEL_BYTES >> 20} MiB"] += 1
            return None
        stream = archive.extractfile(member)
        try:
            data = stream.read() if stream is not None else b""
        except (tarfile.ReadError, OSError):  # the shard ends here, as the next header will tell
            return None
        if form == ".txt":
            return data.decode(errors="replace").strip()
        try:
            text = data.decode().strip()
            values = json.loads(text) if form == ".json" else {}
        except (ValueError, RecursionError):
            raise InputError(
                f"{self.path}:{printable(member.name)} cannot be read as a label; expected "
                f"{'a class index' if form == '.cls' else 'JSON with a label'}"
            ) from None
        if form == ".cls":
            # An index also where a class is called by a number.
            return int(text) if text.isdecimal() and len(text) < 20 else text
        label = None
        if isinstance(values, dict):
            label = next((values[k] for k in LABEL_KEYS if values.get(k) is not None), None)
        if label is None:
            self.labels.others[f".json without {_or(LABEL_KEYS)}"] += 1
        return label


def _no_sample(member: tarfile.TarInfo, key: str | None) -> str:
    """Why webdataset makes no sample of a member; nothing where it does."""
    if member.islnk() or member.issym():
        return "that are links"
    name = member.name.rpartition("/")[2]
    if name.startswith("."):  # as macOS adds them: its key would be that of the folder
        return "whose names begin with a dot"
    return "" if member.isfile() and key and not META.match(member.name) else "of names without key"


def parquet_source(text: str, paths: Sequence[Path], classes: Classes | None) -> Source:
    """The rows of Parquet files, of which footers and labels only are read."""
    source = Source("parquet", text, paths)
    labelled = []
    notes: dict[str, None] = {}
    for number, path in enumerate(paths):
        with _parquet_file(path) as file:
            features = _features(file.schema_arrow, path)
            source.column = _image_column(features, source.column, path)
            before = len(source)
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            # An image is more than a byte: this many are not there, whatever the footer says.
            size = path.stat().st_size
            if min(groups, default=0) < 0 or sum(groups) > size:
                raise InputError(
                    f"{path} says that it has {sum(groups)} rows in {size} bytes, which are no "
                    "images; write it anew"
                )
            for group, rows in enumerate(groups):
                for row in range(rows):
                    source.add(f"row {len(source) - before}", number, group, row)
            if classes is not None:
                labels, note = _labels(file, features, path, classes)
                labelled.append(bool(labels))
                source.classes += labels
                notes |= {note: None} if note else {}
    source.notes += notes
    if not len(source):
        raise InputError(f"no images in {text}; the Parquet files have no rows")
    if any(labelled) and not all(labelled):
        raise InputError(f"{text} has labels in some of its files only; label all or none")
    return source


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """A file of which any part may be damaged: Arrow raises errors of its own and of Python's."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except InputError:
        raise
    except Exception:
        raise InputError(f"{path} is not a whole Parquet file; copy it again") from None


def _features(schema: Any, path: Path) -> Any:
    """Columns as ``datasets`` wrote them: which hold images, and names of classes."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    # It calls what the description names with what that gives.
    except Exception as error:
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
            f"{path} has the columns {printable(some(list(features), 20))}; expected {column!r} "
            f"and {LABELS[0]!r}"
        )
    return column


def _labels(file: Any, features: Any, path: Path, classes: Classes) -> tuple[list[int], str]:
    """A file's labels, none where it has none, and how they were found or matched."""
    from datasets import ClassLabel, Image

    numbered = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    column = next((name for name in LABELS if name in features), None)
    column = column or (numbered[0] if len(numbered) == 1 else None)
    if column is None:
        others = [name for name, feature in features.items() if not isinstance(feature, Image)]
        if others := [name for name in others if name != "image"]:
            return [], (
                f"no labels: they are read of the column {' or '.join(LABELS)}, or of the only one "
                f"of classes; not read are {printable(some(others))}"
            )
        return [], ""
    values = file.read(columns=[column])[column].to_pylist()
    # Hugging Face marks test images without a label with -1, pandas with a number that is none.
    if all(value in (None, -1) or value != value for value in values):
        return [], f"no labels: the column {printable(column)} is empty"
    names, note = getattr(features[column], "names", None), ""
    if column in numbered and names and classes.by_name:
        index, note = numbered_classes([*map(str, names)], classes, path.name)
        values = [v if v is None or not 0 <= v < len(index) else index[v] for v in values]
    return [classes.index(v, f"{path.name}:row {row}") for row, v in enumerate(values)], note
