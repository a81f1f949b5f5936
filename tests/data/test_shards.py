"""Which labels of a shard are read, and that all else is said: nothing counts twice or silently."""

from __future__ import annotations

import json
import os
import tarfile

import pytest

from tests.data import conftest as layouts
from tome_export.data.find import find_data, shared_path
from tome_export.data.labels import Classes
from tome_export.errors import InputError

png = layouts.png


def shard(path, *members):
    """A tar file; ``members`` are names with content, or with a number for a picture."""
    data = [(name, png(one) if isinstance(one, int) else one) for name, one in members]
    return layouts.write_tar(path, data)


def listed(data, classes):
    return find_data((str(data),), classes)


def fails(data, classes):
    with pytest.raises(InputError) as caught:
        find_data(data if isinstance(data, tuple) else (str(data),), classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Labels of tar files.


def test_captions_are_said_to_be_no_labels(tmp_path, named):
    path = shard(tmp_path / "s.tar", ("0.png", 0), ("0.txt", b"owl"))
    assert listed(path, named).labels is None
    assert listed(path, named).notes[0].endswith("; not read are .txt (1)")
    # Where there are labels, captions are no news.
    path = shard(tmp_path / "t.tar", ("0.png", 0), ("0.txt", b"an owl"), ("0.cls", b"3"))
    assert (listed(path, named).labels.tolist(), listed(path, named).notes) == ([3], [])


@pytest.mark.parametrize("key", ["label", "labels", "class", "cls"])
@pytest.mark.parametrize("value", [3, "owl", 3.0])
def test_labels_in_json(tmp_path, named, key, value):
    data = json.dumps({"width": 8, key: value}).encode()
    path = shard(tmp_path / "s.tar", ("0.png", 0), ("0.json", data))
    assert listed(path, named).labels.tolist() == [3]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("0.json", b'{"category_id": 3}', '.json without "label" or "labels" or "class" or "cls" '
         "(1)"),
        ("0.json", b"[3]", '.json without "label" or "labels" or "class" or "cls" (1)'),
        ("0.json", b'{"x": "' + b"y" * (1 << 20) + b'"}', ".json of more than 1 MiB (1)"),
        ("0.label", b"3", ".label (1)"),
        ("0.cls.npy", b"3", ".npy (1)"),
    ],
)  # fmt: skip
def test_labels_that_are_not_read_are_said(tmp_path, named, name, data, said):
    source = listed(shard(tmp_path / "s.tar", ("0.png", 0), (name, data)), named)
    assert source.labels is None
    assert source.notes == [
        'no labels: they are read of .cls, or of .json with "label" or "labels" or "class" or '
        f'"cls"; not read are {said}'
    ]
    assert listed(tmp_path / "s.tar", None).notes == []  # of features, where none are wanted


def test_several_labels_of_one_image(tmp_path, ten):
    path = shard(tmp_path / "s.tar", ("0.png", 0), ("0.fine.cls", b"1"), ("0.coarse.cls", b"2"))
    assert fails(path, ten) == (
        "s.tar:0.png has 2 labels (fine.cls, coarse.cls); expected one, such as cls"
    )


def test_a_wrong_label_is_told_before_the_shards_behind_it_are_read(tmp_path, ten):
    first = shard(tmp_path / "0.tar", ("0.png", 0), ("0.cls", b"10"), ("1.png", 1))
    (tmp_path / "1.tar").write_bytes(b"no tar file")
    assert fails((str(first), str(tmp_path / "1.tar")), ten).startswith("0.tar:0.png ")


def test_an_index_of_a_shard_is_one_also_where_classes_are_called_by_numbers(tmp_path):
    shifted = Classes(3, ("1", "2", "3"))
    path = shard(tmp_path / "s.tar", ("0.png", 0), ("0.cls", b"1"))
    assert listed(path, shifted).labels.tolist() == [1]
    # Text may be either.
    path = shard(tmp_path / "t.tar", ("0.png", 0), ("0.json", b'{"label": "1"}'))
    assert fails(path, shifted) == (
        "t.tar:0.png has label 1, which is the name of the model's class 0 and the number of "
        "another; give numbers and say so with --classes-in-order"
    )
    assert listed(path, Classes(3, ("1", "2", "3"), in_order=True)).labels.tolist() == [1]


# Samples of tar files.


def test_one_key_twice_apart_from_each_other(tmp_path, ten):
    path = shard(tmp_path / "s.tar", ("a.png", 0), ("b.png", 1), ("a.png", 2))
    assert fails(path, ten) == (
        f"{path} has two images under one key, a, apart from each other; write the shard with one "
        "image for each"
    )
    # Of another shard, it is another.
    (tmp_path / "t").mkdir()
    for name in ("0.tar", "1.tar"):
        shard(tmp_path / "t" / name, ("a.png", 0))
    assert len(listed(tmp_path / "t", ten)) == 2


def test_what_is_no_image_of_a_sample_is_said(tmp_path, ten):
    path = tmp_path / "s.tar"
    shard(path, ("0.png", 0), ("0.seg.png", 1), ("0.cls", b"1"), ("._0.png", b"x"), ("__a.png", 3),
          ("__a.cls", b"2"), ("x\n.y/1.png", 4), ("d/.hidden.png", 5))  # fmt: skip
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(link)
    source = listed(path, ten)
    assert [item.name for item in source.items([0, 1])] == ["s.tar:0.png", "s.tar:__a.png"]
    assert source.labels.tolist() == [1, 2]
    assert sorted(source.notes) == [
        f"left out of {path} are 1 images beside one of a shorter name, as of masks",
        f"left out of {path} are 1 images of names without key",
        f"left out of {path} are 1 images that are links",
        f"left out of {path} are 2 images whose names begin with a dot",
    ]


# A shard that is given twice.


@pytest.mark.parametrize("kind", ["same", "relative", "link", "hard link", "star", "braces"])
@pytest.mark.parametrize("end", ["tar", "parquet"])
def test_a_shard_that_is_given_twice(tmp_path, ten, kind, end, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = f"{tmp_path}/s-000.{end}"
    if end == "tar":
        layouts.write_tar(tmp_path / "s-000.tar", layouts.members(2))
    else:
        layouts.write_parquet(tmp_path / "s-000.parquet", [png(0)], [1])
    if kind.endswith("link"):
        (os.link if kind == "hard link" else os.symlink)(first, f"again.{end}")
    data, second = {
        "same": ((first, first), ""),
        "relative": ((first, f"s-000.{end}"), f", also as {first}"),
        "link": ((first, f"again.{end}"), f", also as {first}"),
        "hard link": ((first, f"again.{end}"), f", also as {first}"),
        "star": ((f"{tmp_path}/s-*.{end}", first), ""),
        "braces": ((f"{tmp_path}/s-{{000..000}}.{end}", f"{tmp_path}/s-00{{0,0}}.{end}"), ""),
    }[kind]
    given = data[1] if second else first
    assert fails(data, ten) == f"the shard {given} is given twice{second}; give each once"
    # Also where a folder holds a link to one of its own.
    if kind.endswith("link"):
        assert fails(tmp_path, ten) == (
            f"the shard {first} is given twice, also as {tmp_path}/again.{end}; give each once"
        )


def test_hard_links_are_the_same_images(tmp_path):
    layouts.write_tar(tmp_path / "a.tar", layouts.members(2))
    os.link(tmp_path / "a.tar", tmp_path / "b.tar")
    assert shared_path([f"{tmp_path}/a.tar"], [f"{tmp_path}/b.tar"]) == tmp_path / "b.tar"


def test_what_is_beside_the_shards_of_a_folder_is_said(tmp_path, ten):
    layouts.write_tar(tmp_path / "s.tar", layouts.members(2))
    (tmp_path / "._s.tar").write_bytes(b"x")
    assert listed(tmp_path, ten).notes == []
    layouts.write_tree(tmp_path, ["cat/a.png"])
    assert listed(tmp_path, ten).notes == [
        f"read of {tmp_path} are its shards only; beside them are cat"
    ]


def test_parts_of_a_data_set_in_one_folder_are_said(tmp_path, ten):
    names = ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")
    for name in names:
        layouts.write_parquet(tmp_path / f"{name}.parquet", [png(0)], [1])
    source = listed(tmp_path, ten)
    assert len(source) == 3
    assert source.notes == [
        f"read as one are the shards of test, train in {tmp_path}; a star, as in 'test*', takes "
        "those of one name"
    ]
    assert listed(tmp_path / "train-*", ten).notes == []


# Parquet.


def table(path, **columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_labels_that_are_not_read_are_said(tmp_path, ten):
    path = table(tmp_path / "a.parquet", image=[png(0)], category=[3], width=[8])
    source = listed(path, ten)
    assert source.labels is None
    assert source.notes == [
        "no labels: they are read of the column label or labels, or of the only one of classes; "
        "not read are category, width"
    ]
    assert listed(path, None).notes == []
    path = table(tmp_path / "b.parquet", image=[png(0)], label=[-1])
    assert listed(path, ten).notes == ["no labels: the column label is empty"]


def test_parquet_with_one_column_of_classes(tmp_path, named):
    import datasets

    kinds = {"image": datasets.Image(), "pet": datasets.ClassLabel(names=["owl", "cat"])}
    rows = {"image": [{"bytes": png(0), "path": None}], "pet": [0]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(path)
    assert listed(path, named).labels.tolist() == [3]


def test_parquet_labels_of_other_types(tmp_path, named):
    # pandas writes whole numbers as floats where some were missing.
    path = table(tmp_path / "a.parquet", image=[png(0), png(1)], labels=[3.0, 1.0])
    assert listed(path, named).labels.tolist() == [3, 1]
    path = table(tmp_path / "b.parquet", image=[png(0)], label=[float("nan")])
    assert listed(path, named).labels is None
    path = table(tmp_path / "c.parquet", image=[png(0)], labels=[[1, 2]])
    assert fails(path, named).startswith("c.parquet:row 0 has label '[1, 2]'; expected an index")


def test_parquet_with_classes_of_other_names_needs_a_reason(tmp_path):
    import datasets

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["nul", "een", "twee"])}
    rows = {"image": [{"bytes": png(0), "path": None}], "label": [2]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(path)
    names = ("zero", "one", "two")
    assert fails(path, Classes(3, names)) == (
        "a.parquet has the classes nul, een, twee, which are not among the model's labels, such as "
        "zero, one, two; rename them, or say --classes-in-order if the numbers are the model's"
    )
    source = listed(path, Classes(3, names, in_order=True))
    assert source.labels.tolist() == [2]
    assert source.notes == ["3 classes, matched by number (--classes-in-order)"]


def test_a_damaged_page_of_parquet(tmp_path, ten):
    path = table(tmp_path / "a.parquet", image=[png(n) for n in range(4)], label=[1, 2, 3, 4])
    data = bytearray(path.read_bytes())
    start = data.index(b"IHDR") - 40
    data[start - 20 : start + 8] = b"\xff" * 28
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cannot be read from the shard|not a whole Parquet file"):
        listed(path, ten).items([0])[0].load()


def test_more_rows_than_images_can_be_in_a_file(tmp_path, ten):
    path = table(tmp_path / "a.parquet", image=[b""] * 100_000)
    assert fails(path, ten) == (
        f"{path} says that it has 100000 rows in {path.stat().st_size} bytes, which are no images; "
        "write it anew"
    )
