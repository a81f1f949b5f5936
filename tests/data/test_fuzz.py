"""Whatever a shard, a description, a file of labels or a pattern holds: a listing or one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import string
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import conftest as layouts
from tome_export.data.find import expand, find_data
from tome_export.data.labels import Classes
from tome_export.errors import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
"""Examples for each reader; more can be asked for, and are then drawn anew."""

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

CLASSES = Classes(5, ("cat", "dog", "crane", "owl", "crane"))


@contextlib.contextmanager
def one_line():
    """Nothing but an ``InputError`` of one line, or what the system says of a file."""
    try:
        yield
    except (InputError, OSError) as error:
        if "\n" in str(error) or not 0 < len(str(error)) < 6000:
            raise AssertionError from error


def tried(data, labels=None):
    """List what is there with its labels, and read it, as every command does."""
    with one_line():
        find_data((str(data),), None, labels)
    with one_line():
        source = find_data((str(data),), CLASSES, labels)
        assert not any("\n" in note for note in source.notes)
        assert source.labels is None or len(source.labels) == len(source)
        for item in source.items(range(min(3, len(source)))):
            with one_line():
                item.load()


names = st.sampled_from(["0", "1", "a/0", "v1.0", ".", "._0", "__x__", "\n", "ä", "\udcff"])
endings = st.sampled_from(
    [".png", ".PNG", ".seg.png", ".jpg", ".cls", ".a.cls", ".json", ".txt", ".npy", "", "."]
)
texts = st.sampled_from(
    [b"0", b"4", b"5", b"-1", b"owl", b"crane", b"", b"\xff", b"1" * 5000, b"[" * 5000, b"null",
     b'{"label": 1}', b'{"label": null, "class": "dog"}', b'{"label": [1]}', b'{"label": {}}',
     b'{"label": 1e400}', b'{"label": NaN}', b'{"label": true}', b"{}", b"3\n", b" 3 "]
)  # fmt: skip
anything = st.one_of(texts, st.binary(max_size=64))
members = st.lists(st.tuples(names, endings, anything), max_size=8)
edits = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.one_of(st.binary(max_size=12), st.just(b"\xff" * 8))),
    max_size=4,
)


def edited(data, edits, end):
    """Bytes overwritten here and there, and the end cut off at times."""
    changed = bytearray(data)
    for place, new in edits:
        at = place % max(1, len(changed))
        changed[at : at + len(new)] = new
    return bytes(changed[: len(changed) - end % (len(changed) + 1)])


def tar(members, form):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, ending, data in members:
            info = tarfile.TarInfo(name + ending)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzzed
@given(members, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
       edits, st.one_of(st.just(0), st.integers(0, 1 << 16)))  # fmt: skip
def test_tar_shards(folder, members, form, edits, end):
    (folder / "s.tar").write_bytes(edited(tar(members, form), edits, end))
    tried(folder / "s.tar")


@fuzzed
@given(st.sampled_from([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME,
                        tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE]),
       st.one_of(st.binary(max_size=80), st.sampled_from([b"-1 x=\n", b"9 size=a\n", b"0 \n",
                 b"12 size=-1\n", b"9" * 5000 + b" a=b\n", b"24 GNU.sparse.major=1\n"])),
       st.sampled_from([0, 5, 1 << 33, 1 << 62, (1 << 77) - 1]))  # fmt: skip
def test_headers_of_tar(folder, kind, data, size):
    info = tarfile.TarInfo("0.png")
    info.type, info.size = kind, size
    header = info.tobuf(tarfile.GNU_FORMAT)
    tail = tar([("1", ".png", b"x"), ("1", ".cls", b"3")], tarfile.GNU_FORMAT)
    (folder / "h.tar").write_bytes(tail[:2048] + header + data.ljust(512, b"\0") + tail)
    tried(folder / "h.tar")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 1 << 70), st.text(max_size=4),
              st.sampled_from(["Image", "ClassLabel", "Value", "Sequence", "List", "Array2D",
                               "Translation", "DatasetInfo", "int64", "binary", "/etc/passwd"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["_type", "names", "names_file", "num_classes", "dtype", "feature",
                             "length", "shape", "id", "decode", "image", "label"]),
            inner, max_size=4)),
    max_leaves=6,
)  # fmt: skip
columns = st.dictionaries(st.sampled_from(["image", "label", "img", "labels"]), json_values)
descriptions = st.one_of(
    json_values.map(json.dumps),
    columns.map(lambda one: json.dumps({"info": {"features": one}})),
    json_values.map(lambda one: json.dumps({"info": one})),
    st.sampled_from(["", "{", "[" * 5000, "1" * 5000, '{"info": null}', "\0"]),
)


def parquet_bytes(description):
    import pyarrow
    from pyarrow import parquet

    struct = [{"bytes": layouts.png(n), "path": None} for n in range(3)]
    table = pyarrow.table({"image": struct, "label": [0, 3, 1]})
    stream = io.BytesIO()
    described = table.replace_schema_metadata({"huggingface": description})
    parquet.write_table(described, stream, row_group_size=2)
    return stream.getvalue()


@fuzzed
@given(descriptions)
def test_descriptions_of_parquet(folder, description):
    (folder / "d.parquet").write_bytes(parquet_bytes(description))
    tried(folder / "d.parquet")


@fuzzed
@given(edits, st.one_of(st.just(0), st.integers(0, 1 << 12)))
def test_damaged_parquet(folder, edits, end):
    good = parquet_bytes(json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}))
    (folder / "b.parquet").write_bytes(edited(good, edits, end))
    tried(folder / "b.parquet")


rows = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["a.png", "ä.png", "a\N{COMBINING DIAERESIS}.png", "b/c.png",
                             "./a.png", "/a.png", "../a.png", '"a.png"', '"a', "#a.png", "path", "",
                             "\0", "x" * 5000]),
            st.text(max_size=6)),
        st.sampled_from([",", "\t", ";", ""]),
        st.one_of(st.sampled_from(["3", "owl", "crane", "9" * 5000, '"3"', "-0"]),
                  st.text(max_size=4)),
        st.sampled_from(["\n", "\r\n", "\r", "\x0b", "\u2028"])),
    max_size=6,
)  # fmt: skip


@fuzzed
@given(rows, st.binary(max_size=3))
def test_files_of_labels(folder, rows, tail):
    images = folder / "images"
    if not images.exists():
        layouts.write_tree(images, ["a.png", "ä.png", "b/c.png"])
    text = "".join(map("".join, rows)).encode("utf-8", "surrogatepass")
    (folder / "labels.csv").write_bytes(text + tail)
    tried(images, folder / "labels.csv")


patterns = st.lists(
    st.one_of(
        st.sampled_from(["{", "}", ",", "..", "{0..9}", "{a..z}", "{000..999999999}", "{,}", "*",
                         "?", "[", "]", "\0", "\\", "{1..9..0}", "{9..-9..3}", "{Z..a}"]),
        st.integers(-(1 << 70), 1 << 70).map(str),
        st.sampled_from(string.ascii_letters)),
    max_size=14,
).map("".join)  # fmt: skip


@fuzzed
@given(patterns)
def test_patterns(pattern):
    with one_line():
        assert all(map(os.path.lexists, expand(pattern)))


@fuzzed
@given(st.lists(st.sampled_from(["{", "}", ",", "1..3", "a..c", "x", "01..10..4", "5..1..2"]),
                max_size=12).map("".join))  # fmt: skip
def test_braces_stand_for_what_braceexpand_makes_of_them(pattern):
    from braceexpand import UnbalancedBracesError, braceexpand

    from tome_export.data import find

    try:
        made = list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:
        made = []
    depths = [*itertools.accumulate((c == "{") - (c == "}") for c in pattern)]
    if not pattern or min(depths) < 0:  # "}{" is no pair, though the library lets it be
        return
    if max(depths) < 2:
        assert find._has_braces(pattern) == bool(made)
    with pytest.MonkeyPatch.context() as patch:
        if len(made) > 1:
            patch.setattr(find, "MOST_NAMES", len(made) - 1)
            with pytest.raises(InputError, match="too many names"):
                find._has_braces(pattern)


def test_what_is_fuzzed_is_listed_when_whole(folder):
    """The readers get past what is mutated: else nothing would be tried."""
    (folder / "s.tar").write_bytes(
        tar([("0", ".png", b"x"), ("0", ".cls", b"3")], tarfile.GNU_FORMAT)
    )
    assert find_data((f"{folder}/s.tar",), CLASSES).labels.tolist() == [3]
    described = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
    (folder / "d.parquet").write_bytes(parquet_bytes(described))
    assert find_data((f"{folder}/d.parquet",), CLASSES).labels.tolist() == [0, 3, 1]
