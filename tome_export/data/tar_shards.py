"""Tar shards, whose samples are those that ``webdataset`` groups.

The images are not read through its loaders, which give a stream from the first image on: an
evaluation takes images evenly from all, goes on where it was killed, and hands chunks to processes
and machines in any order. So ``tarfile`` says where members lie.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tome_export.data.decode import reason_of
from tome_export.data.folders import some, suffix
from tome_export.data.labels import Classes
from tome_export.data.source import Item, Source, printable, require_size
from tome_export.errors import InputError

LABEL_MEMBERS = (".cls", ".json")
"""Members of a tar file that may hold a label; the first that a sample has is its label."""

LABEL_KEYS = ("label", "labels", "class", "cls")
"""Keys of a ``.json`` member that hold its label; the first that is there does."""

MAX_LABEL_BYTES = 1 << 20
"""Largest member that is read for a label."""

META = re.compile(r"__[^/]*__($|/)")
"""Names of webdataset's own notes."""

_ANY_KEY = " or ".join(f'"{key}"' for key in LABEL_KEYS)


def tar_source(
    text: str, paths: Sequence[Path], suffixes: Collection[str], classes: Classes | None
) -> Source:
    """The samples of tar shards, of which headers and labels only are read.

    A sample is what webdataset makes one of: members next to each other whose paths are the same
    up to the first dot of the file's name. What follows that dot names the member within it.
    """
    from webdataset.tariterators import group_by_keys

    source, shards = Source("tar", text, paths), [_Shard(path, suffixes) for path in paths]
    source.read = read_member
    for number, shard in enumerate(shards):
        before, keys, path = len(source), set[int](), shard.path
        try:
            for sample in group_by_keys(shard.members(with_labels=classes is not None)):
                images = _named(sample, suffixes)
                key = printable(sample["__key__"])
                if len(images) > 1:
                    raise InputError(
                        f"{path} has {len(images)} images under one key, {key} "
                        f"({printable(some(images, 3))}); webdataset's key ends at the first dot "
                        "of a file's name, write the shard with one image for each"
                    )
                label = _label_members(sample)
                if not images:
                    shard.left_out["labels without an image beside them"] += bool(label)
                # Where the shard is cut, the label of the last image may be lost with its tail.
                if not images or (shard.cut and not label):
                    continue
                if (hashed := hash(sample["__key__"])) in keys:
                    raise InputError(
                        f"{path} has two images under one key, {key}, apart from each other; write "
                        "the shard with one image for each"
                    )
                keys.add(hashed)
                source.add(sample[images[0]][0], number, *sample[images[0]][1:])
                if classes is not None and label:
                    source.classes.append(
                        _class(source.items([len(source) - 1])[0], label, classes)
                    )
                shard.left_out["images beside one of a shorter name, as of masks"] += (
                    sum(f".{field.rpartition('.')[2]}" in suffixes for field in sample) - 1
                )
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
    left_out = sum((shard.left_out for shard in shards), Counter[str]())
    source.notes += [f"left out of {text} are {n} {what}" for what, n in left_out.items()]
    if not len(source):
        found = f"no images in {text}; expected members such as 000001.jpg with 000001.cls"
        raise InputError("; ".join([found, *source.notes]))
    if classes is not None:
        if (labelled := len(source.classes)) not in (0, len(source)):
            raise InputError(
                f'{text} has labels (.cls, or .json with "{LABEL_KEYS[0]}") for {labelled} of '
                f"{len(source)} images; label all or none"
            )
        not_read = sum((shard.not_read for shard in shards), Counter[str]())
        if not source.classes and not_read:
            shown = some([f"{name} ({n})" for name, n in not_read.most_common()])
            source.notes.append(
                f"no labels: they are read of .cls, or of .json with {_ANY_KEY}; not read are "
                f"{printable(shown)}"
            )
    return source


def read_member(path: str, _name: str, start: int, size: int, shown: str) -> bytes:
    """The content of an image in a tar file; see ``Reader``."""
    require_size(size, shown)
    with Path(path).open("rb") as stream:
        stream.seek(start)
        data = stream.read(size)
    if len(data) < size:
        raise InputError(
            f"{shown} is cut short: {len(data)} of {size} bytes are in the shard; copy the shard "
            "again"
        )
    return data


def _named(sample: dict[str, Any], suffixes: Collection[str]) -> list[str]:
    """Members of a sample by how they end: ``jpg``, or if there is none ``left.jpg``."""
    fields = [f for f, value in sample.items() if not f.startswith("__") and value is not None]
    exact = [field for field in fields if f".{field}" in suffixes]
    return exact or [f for f in fields if f".{f.rpartition('.')[2]}" in suffixes]


def _label_members(sample: dict[str, Any]) -> dict[str, Any]:
    """The members of a sample that hold its label: of several kinds only the first."""
    kinds = [_named(sample, (kind,)) for kind in LABEL_MEMBERS]
    return {field: sample[field] for field in next(filter(None, kinds), [])}


def _class(item: Item, label: dict[str, Any], classes: Classes) -> int:
    if len(label) > 1:
        raise InputError(
            f"{item.name} has {len(label)} labels ({printable(', '.join(label))}); expected one, "
            f"such as {next(iter(label)).rpartition('.')[2]}"
        )
    (value,) = label.values()
    return classes.index(value, item.name)


class _Shard:
    """One pass over the headers of a tar file."""

    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        self.path, self.suffixes = path, suffixes
        self.cut = False
        self.left_out = Counter[str]()
        self.not_read = Counter[str]()

    def members(self, with_labels: bool) -> Iterator[dict[str, Any]]:
        """Images as name, offset and size, labels as they are; as webdataset passes them on."""
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
                if reason := _no_sample(member):
                    self.left_out[f"images {reason}"] += ending in self.suffixes
                    continue
                if ending not in (*self.suffixes, *LABEL_MEMBERS):
                    self.not_read[ending or "names without an ending"] += 1
                    continue
                found: Any = (member.name, member.offset_data, member.size)
                if ending in LABEL_MEMBERS:
                    found = self._label(archive, member, ending) if with_labels else ""
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
        return InputError(f"{self.path} is damaged ({reason_of(error)[:200]}); copy it again")

    def _label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, form: str) -> Any:
        """An index or text; None where there is none."""
        if member.size > MAX_LABEL_BYTES:
            self.not_read[f"{form} of more than {MAX_LABEL_BYTES >> 20} MiB"] += 1
            return None
        stream = archive.extractfile(member)
        try:
            data = stream.read() if stream is not None else b""
        except (tarfile.ReadError, OSError):  # the shard ends here, as the next header will tell
            return None
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
            self.not_read[f".json without {_ANY_KEY}"] += 1
        return label


def _no_sample(member: tarfile.TarInfo) -> str:
    """Why webdataset makes no sample of a member; nothing where it does."""
    from webdataset.tariterators import base_plus_ext

    if member.islnk() or member.issym():
        return "that are links"
    if member.name.rpartition("/")[2].startswith("."):
        return "whose names begin with a dot"  # as macOS adds them: the key would be the folder's
    key = base_plus_ext(member.name)[0]
    return "" if member.isfile() and key and not META.match(member.name) else "of names without key"
