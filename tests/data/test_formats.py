"""Every layout of images and labels, and what is wrong with some."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest

from tome_export.data.find import expand, find_data, shared_path
from tome_export.data.labels import Classes
from tome_export.data.source import Source, printable, samples_source
from tome_export.errors import InputError, UsageError

spec = importlib.util.spec_from_file_location(
    "evaluation_layouts", __file__.replace("test_formats", "conftest")
)
layouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)
png = layouts.png


def listed(data, classes, labels=None):
    return find_data((str(data),), classes, labels)


def contents(source):
    return [item.load() for item in source.items(range(len(source)))]


def names_of(source):
    return [item.name for item in source.items(range(len(source)))]


def fails(data, classes, labels=None, kind=InputError):
    with pytest.raises(kind) as caught:
        listed(data, classes, labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_two_lists_share(tmp_path):
    for name in ("shards/a.tar", "shards/b.tar", "shards/more/c.tar", "flat/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shards, more, flat = (str(tmp_path / name) for name in ("shards", "shards/more", "flat"))
    # Of a folder with shards, only those count.
    assert shared_path([shards], [more]) is shared_path([shards], [flat]) is None
    assert shared_path([f"{shards}/a.tar"], [f"{shards}/b.tar"]) is None
    assert shared_path([f"{shards}/{{a,b}}.tar"], [shards]) == tmp_path / "shards/a.tar"
    assert shared_path([shards], [flat, f"{shards}/*/../b.tar"]) == tmp_path / "shards/b.tar"


def test_names_are_kept_whatever_they_are():
    given = ["a/b.png", "ä ö.png", "\udcff.png", "x" * 300]
    source = Source("folder", "x", [Path("/x")])
    for name in given:
        source.add(name)
    source.read = lambda *place: "/".join(place[:2])
    assert [item.load() for item in source.items(range(4))] == [f"/x/{name}" for name in given]


def test_class_folders_are_numbered_as_by_torchvision(tmp_path):
    names = ["10/a.png", "2/b.png", "2/deeper/c.png", "zebra/d.PNG", "Ant/e.jpg"]
    layouts.write_tree(tmp_path, [*names, "2/notes.txt"])
    (tmp_path / "Bee").mkdir()
    source = listed(tmp_path, Classes(5))
    # ImageFolder: sorted as text, an empty folder counts too, images at any depth.
    expected = {"10/a.png": 0, "2/b.png": 1, "2/deeper/c.png": 1, "Ant/e.jpg": 2, "zebra/d.PNG": 4}
    found = dict(zip(names_of(source), source.labels.tolist(), strict=True))
    assert found == expected
    assert source.kind == "folder"
    assert tuple(source.notes) == ("5 class folders for 5 outputs, matched in sorted order",)
    assert contents(source)[0] == png(0)


def test_class_folders_by_the_models_names(tmp_path, named):
    layouts.write_tree(tmp_path, ["owl/a.png", "cat/b.png"])
    source = listed(tmp_path, named)
    assert source.labels.tolist() == [0, 3]  # in sorted order they would be 0 and 1
    assert tuple(source.notes) == ("2 class folders for 5 outputs, matched by name",)


def test_too_many_class_folders(tmp_path):
    layouts.write_tree(tmp_path, [f"{c}/x.png" for c in "abc"])
    assert fails(tmp_path, Classes(2)) == (
        "the data has 3 class folders; the model has 2 outputs, give data of the same classes"
    )


def test_flat_folder_without_labels(tmp_path, ten):
    layouts.write_tree(tmp_path, ["b.png", "a.png"])
    source = listed(tmp_path, ten)
    assert source.labels is None
    assert names_of(source) == ["a.png", "b.png"]


def test_images_beside_and_inside_sub_folders(tmp_path, ten):
    layouts.write_tree(tmp_path, ["a.png", "x/b.png"])
    assert fails(tmp_path, ten) == (
        f"{tmp_path} has images both beside and inside sub-folders; keep one layout, or give "
        "every image's class with --labels"
    )
    assert listed(tmp_path, None).labels is None


def test_a_name_that_is_not_utf_8_is_shown_in_escapes_and_opened_as_it_is(tmp_path, ten):
    name = os.fsdecode(b"bad\xff\n.png")
    layouts.write_tree(tmp_path / "tree", [f"3/{name}"])
    layouts.write_tar(tmp_path / "s.tar", [(name, png(1)), ("bad.cls", b"1")])
    for data, shown in (("tree", "3/bad\\xff\\n.png"), ("s.tar", "s.tar:bad\\xff\\n.png")):
        source = listed(tmp_path / data, ten)
        assert names_of(source)[0] == shown
        assert contents(source) == [png(0 if data == "tree" else 1)]


def test_names_are_printable():
    assert printable("ä b.png") == "ä b.png"
    assert printable("a\udcff\r\u2028\ud800") == "a\\xff\\r\\u2028\\ud800"


@pytest.mark.parametrize("make", ["dangling", "circle", "pipe", "socket"])
def test_what_is_no_regular_file_is_listed_and_never_opened(tmp_path, ten, make):
    path = tmp_path / "x.png"
    if make == "pipe":
        os.mkfifo(path)
    elif make == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    else:
        path.symlink_to({"dangling": "nowhere.png", "circle": "x.png"}[make])
    (tmp_path / "a.png").write_bytes(png(0))
    source = listed(tmp_path, ten)
    assert names_of(source) == ["a.png", "x.png"]
    with pytest.raises((InputError, OSError)) as caught:
        source.items([1])[0].load()
    if make in ("pipe", "socket"):
        assert str(caught.value) == "x.png is not a regular file; expected an image"
    # Beside class folders it is one image too many, as any file would be.
    layouts.write_tree(tmp_path, ["3/b.png"])
    (tmp_path / "a.png").unlink()
    assert "has images both beside and inside sub-folders" in fails(tmp_path, ten)


def test_a_shard_that_is_no_regular_file(tmp_path, ten):
    os.mkfifo(tmp_path / "s.tar")
    assert fails(tmp_path / "s.tar", ten) == (
        f"{tmp_path / 's.tar'} is not a regular file; expected .tar or .parquet shards"
    )


def test_a_link_that_leads_up_ends_and_one_to_nowhere_is_listed(tmp_path, ten):
    layouts.write_tree(tmp_path, ["3/a.png"])
    (tmp_path / "3" / "up").symlink_to(tmp_path)
    (tmp_path / "3" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = listed(tmp_path, ten)
    assert names_of(source) == ["3/a.png", "3/gone.png"]


@pytest.mark.parametrize("make", [(), ("3/notes.txt",)], ids=["empty", "no images"])
def test_folder_without_images(tmp_path, ten, make):
    layouts.write_tree(tmp_path, list(make))
    assert fails(tmp_path, ten) == (
        f"no images under {tmp_path}; expected class sub-folders with, or flat, files ending in "
        ".bmp, .gif, .jpeg, .jpg, .png, .ppm, .tif, .tiff, .webp, or .tar or .parquet shards"
    )


def test_the_digest_follows_the_files(tmp_path, ten):
    layouts.write_tree(tmp_path, ["3/a.png", "3/b.png"])
    first = listed(tmp_path, ten).digest
    assert listed(tmp_path, ten).digest == first
    (tmp_path / "3" / "a.png").write_bytes(png(7, size=9))
    assert listed(tmp_path, ten).digest != first


# Labels from a file.


def labels_file(tmp_path, text):
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    return tmp_path / "labels.txt"


@pytest.mark.parametrize(
    "text",
    [
        "a.png,3\nsub/b, c.png,owl\n",
        "sub/b, c.png\towl\r\n\n# note\n./a.png\t3",
        "path,label\n",
        '"a.png",3\n"sub/b, c.png",owl\n',
    ],
    ids=["commas", "tabs", "header", "quoted"],
)
def test_labels_file(tmp_path, named, text):
    if text == "path,label\n":
        text += "a.png,3\nsub/b, c.png,owl\n"
    layouts.write_tree(tmp_path / "images", ["a.png", "sub/b, c.png"])
    source = listed(tmp_path / "images", named, labels_file(tmp_path, text))
    assert source.labels.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,bird\nb.png,1", "{file}, line 1 has label 'bird'; expected an index from 0 to 4, "
         "or one of its names (cat, dog, owl, …)"),
        ("a.png,crane\nb.png,1", "{file}, line 1 has label 'crane'; expected an index from 0 to "
         "4, or one of its names (cat, dog, owl, …)"),
        ("a.png,1\nb.png,5", "{file}, line 2 has label 5; the model has 5 outputs, expected 0 to "
         "4"),
        ("a.png,1\nb.png,-1", "{file}, line 2 has label -1; the model has 5 outputs, expected 0 "
         "to 4"),
        ("a.png,1", "{file} has no label for b.png; add a line for it"),
        ("a.png,1\nb.png,1\nc.png,1", "{file} labels 1 images that are not in {images}, the first "
         "is c.png in line 3; add them or remove their lines"),
        ("a.png,1\na.png,2", "{file}, line 2 repeats a.png; give each image once"),
        ("a.png 1", "{file}, line 1 is 'a.png 1'; expected 'relative/path,label' with a comma or "
         "a tab"),
    ],
)  # fmt: skip
def test_bad_labels_file(tmp_path, named, text, message):
    images = layouts.write_tree(tmp_path / "images", ["a.png", "b.png"])
    file = labels_file(tmp_path, text)
    assert fails(images, named, file) == message.format(file=file, images=images)


def test_labels_file_that_is_not_there_or_not_text(tmp_path, ten):
    images = layouts.write_tree(tmp_path / "images", ["a.png"])
    assert fails(images, ten, tmp_path / "no.txt") == (
        f"labels {tmp_path / 'no.txt'} cannot be read (No such file or directory); expected lines "
        "of 'relative/path,label'"
    )
    (tmp_path / "raw.txt").write_bytes(b"\xff\xfe\x00")
    assert "(it is not UTF-8 text)" in fails(images, ten, tmp_path / "raw.txt")


def test_a_model_without_names_says_so(tmp_path, ten):
    images = layouts.write_tree(tmp_path / "images", ["a.png"])
    assert fails(images, ten, labels_file(tmp_path, "a.png,cat")).endswith(
        "has label 'cat'; expected an index from 0 to 9, or no name, as this model brings none"
    )


# Tar shards.


@pytest.mark.parametrize("form", ["cls", "json"])
def test_tar_shards(tmp_path, ten, form):
    for number in range(2):
        layouts.write_tar(tmp_path / f"s-{number:03}.tar", layouts.members(4, form))
    for data in (tmp_path, tmp_path / "s-{000..001}.tar", tmp_path / "s-*.tar"):
        source = listed(data, ten)
        assert source.kind == "tar"
        assert source.labels.tolist() == [0, 1, 2, 0] * 2
        assert contents(source) == [png(n) for n in range(4)] * 2
        assert names_of(source)[5] == "s-001.tar:a/001.left.png"


def test_tar_labels_by_name_before_the_image_and_unlabelled(tmp_path, named):
    layouts.write_tar(tmp_path / "a.tar", [("1.cls", b"owl\n"), ("1.png", png(1))])
    assert listed(tmp_path / "a.tar", named).labels.tolist() == [3]
    layouts.write_tar(tmp_path / "b.tar", [("1.png", png(1)), ("2.png", png(2))])
    assert listed(tmp_path / "b.tar", named).labels is None
    layouts.write_tar(tmp_path / "c.tar", [("1.png", png(1)), ("2.png", png(2)), ("2.cls", b"0")])
    assert fails(tmp_path / "c.tar", named) == (
        f'{tmp_path / "c.tar"} has labels (.cls, or .json with "label") for 1 of 2 images; label '
        "all or none"
    )
    layouts.write_tar(tmp_path / "d.tar", [("1.png", png(1)), ("1.cls", b"9")])
    assert fails(tmp_path / "d.tar", named) == (
        "d.tar:1.png has label 9; the model has 5 outputs, expected 0 to 4"
    )


def test_tar_that_is_cut_short_goes_as_far_as_it_is(tmp_path, ten):
    whole = layouts.write_tar(tmp_path / "s.tar", layouts.members(8)).read_bytes()
    counts = set()
    for size in range(2600, len(whole) - 9000, 700):
        (tmp_path / "s.tar").write_bytes(whole[:size])
        source = listed(tmp_path / "s.tar", ten)
        counts.add(len(source))
        assert source.labels is None or len(source.labels) == len(source)
        assert tuple(source.notes) == (
            f"{tmp_path / 's.tar'} is cut short after {len(source)} images; copy it again",
        )
    assert max(counts) >= 4


def test_a_member_that_lost_its_end(tmp_path, ten):
    layouts.write_tar(tmp_path / "s.tar", layouts.members(2))
    item = listed(tmp_path / "s.tar", ten).items([1])[0]
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[: item.content.args[2] + 10])
    with pytest.raises(InputError, match=r"is cut short: 10 of \d+ bytes are in the shard; copy"):
        item.load()


def test_compressed_tar_is_refused(tmp_path, ten):
    layouts.write_tar(tmp_path / "s.tar", layouts.members(2), "w:gz")
    assert fails(tmp_path / "s.tar", ten) == (
        f"{tmp_path / 's.tar'} is not an uncompressed tar file; webdataset's shards are not "
        "compressed, unpack it or write it anew"
    )


def test_tar_without_images(tmp_path, ten):
    layouts.write_tar(tmp_path / "s.tar", [("1.txt", b"x")])
    assert fails(tmp_path / "s.tar", ten) == (
        f"no images in {tmp_path / 's.tar'}; expected members such as 000001.jpg with 000001.cls"
    )


def sample(key, *members):
    return [(f"{key}.{name}", data) for name, data in members]


def test_a_mask_beside_an_image_is_no_image(tmp_path, ten):
    members = [
        m
        for n in range(3)
        for m in sample(f"{n}", ("png", png(n)), ("seg.png", png(9)), ("cls", b"%d" % n))
    ]
    source = listed(layouts.write_tar(tmp_path / "s.tar", members), ten)
    assert contents(source) == [png(n) for n in range(3)]
    assert source.labels.tolist() == [0, 1, 2]


def test_names_with_dots_are_one_key_and_refused(tmp_path, ten):
    members = [m for n in range(5) for m in sample(f"v1.{n}", ("png", png(n)), ("cls", b"1"))]
    path = layouts.write_tar(tmp_path / "s.tar", members)
    assert fails(path, ten) == (
        f"{path} has 5 images under one key, v1 (0.png, 1.png, 2.png, …); webdataset's key ends at "
        "the first dot of a file's name, write the shard with one image for each"
    )


def test_a_member_that_is_there_twice(tmp_path, ten):
    members = [("a.png", png(0)), ("a.cls", b"1"), ("a.png", png(1))]
    path = layouts.write_tar(tmp_path / "s.tar", members)
    assert fails(path, ten) == (
        f"{path} is no shard of webdataset (a.png: duplicate file name in tar file png); write it "
        "anew"
    )


def test_labels_apart_from_their_images_are_said_to_be_unused(tmp_path, ten):
    members = [("0.png", png(0)), ("1.png", png(1)), ("0.cls", b"0"), ("2.cls", b"1")]
    path = layouts.write_tar(tmp_path / "s.tar", members)
    source = listed(path, ten)
    assert source.labels is None
    assert source.notes == [f"left out of {path} are 2 labels without an image beside them"]


def test_what_macos_adds_is_left_out(tmp_path, ten):
    members = [("a/._0.png", b"x"), ("a/0.png", png(0)), ("a/0.cls", b"3"), ("__meta__", b"x")]
    source = listed(layouts.write_tar(tmp_path / "s.tar", members), ten)
    assert names_of(source) == ["s.tar:a/0.png"]
    assert source.labels.tolist() == [3]


@pytest.mark.parametrize("label", [b"9" * 100_000, b"[" * 5000])
def test_a_label_that_is_none(tmp_path, ten, label):
    name = "0.json" if label[:1] == b"[" else "0.cls"
    path = layouts.write_tar(tmp_path / "s.tar", [("0.png", png(0)), (name, label)])
    assert len(fails(path, ten)) < 300


# Parquet.


@pytest.mark.parametrize("struct", [False, True], ids=["bytes", "struct"])
def test_parquet(tmp_path, ten, struct):
    images = [{"bytes": png(n), "path": None} if struct else png(n) for n in range(10)]
    labels = [n % 10 for n in range(10)]
    layouts.write_parquet(tmp_path / "a.parquet", images, labels)
    layouts.write_parquet(tmp_path / "b.parquet", images[:3], labels[:3])
    source = listed(tmp_path, ten)
    assert source.kind == "parquet"
    assert source.labels.tolist() == labels + labels[:3]
    assert contents(source) == [png(n) for n in [*range(10), *range(3)]]
    assert names_of(source)[9] == "a.parquet:row 9"
    assert names_of(source)[11] == "b.parquet:row 1"


def test_parquet_labels(tmp_path, named):
    images = [png(0), png(1)]
    path = tmp_path / "a.parquet"
    layouts.write_parquet(path, images, ["dog", "owl"])
    assert listed(path, named).labels.tolist() == [1, 3]
    layouts.write_parquet(path, images, [-1, -1])  # as Hugging Face marks a test set
    assert listed(path, named).labels is None
    layouts.write_parquet(path, images, None)
    assert listed(path, named).labels is None
    layouts.write_parquet(path, images, [0, 7])
    assert fails(path, named) == (
        "a.parquet:row 1 has label 7; the model has 5 outputs, expected 0 to 4"
    )
    layouts.write_parquet(path, images, [0, None])
    assert "a.parquet:row 1 has label 'None'" in fails(path, named)


def test_parquet_that_is_none(tmp_path, ten):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and no more")
    assert fails(path, ten) == f"{path} is not a whole Parquet file; copy it again"
    layouts.write_parquet(path, [None], [1])
    with pytest.raises(InputError, match="row 0 holds no bytes"):
        listed(path, ten).items([0])[0].load()
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"img": [b"x"]}), path)
    assert fails(path, ten) == f"{path} has the columns img; expected 'image' and 'label'"
    layouts.write_parquet(path, [], [])
    assert "have no rows" in fails(path, ten)


def write_dataset(path, images, labels, names, column="image", label="label"):
    """As ``datasets`` writes Parquet: with the names of the classes."""
    import datasets

    kinds = {column: datasets.Image(), label: datasets.ClassLabel(names=names)}
    rows = {column: [{"bytes": one, "path": None} for one in images], label: labels}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    made.to_parquet(path)
    return path


def test_parquet_whose_classes_are_in_another_order(tmp_path):
    classes = Classes(3, ("cat", "dog", "owl"))
    path = write_dataset(tmp_path / "a.parquet", [png(0), png(1)], [0, 2], ["owl", "dog", "cat"])
    source = listed(path, classes)
    assert source.labels.tolist() == [2, 0]
    assert tuple(source.notes) == ("3 classes, matched by name",)
    # A model without names can only be told numbers.
    assert listed(path, Classes(3)).labels.tolist() == [0, 2]


def test_parquet_with_columns_of_other_names(tmp_path, ten):
    path = tmp_path / "a.parquet"
    write_dataset(path, [png(0)], [1], ["a", "b"], column="img", label="labels")
    source = listed(path, ten)
    assert contents(source) == [png(0)]
    assert source.labels.tolist() == [1]


def test_parquet_with_a_broken_description(tmp_path, ten):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": [png(0)], "label": [1]})
    broken = table.replace_schema_metadata({"huggingface": "{"})
    parquet.write_table(broken, tmp_path / "a.parquet")
    assert "has a description by Hugging Face datasets that cannot be read" in fails(
        tmp_path / "a.parquet", ten
    )


# What --data may say.


def test_patterns(tmp_path):
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "t{1}.tar"):
        (tmp_path / name).touch()
    names = [p.name for p in expand(str(tmp_path / "s-{008..010}.tar"))]
    assert names == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert len(expand(str(tmp_path / "s-{008,010}.tar"))) == 2
    assert len(expand(str(tmp_path / "s-00*.tar"))) == 2
    assert [p.name for p in expand(str(tmp_path / "t{1}.tar"))] == ["t{1}.tar"]
    (tmp_path / "open{.tar").touch()
    assert [p.name for p in expand(str(tmp_path / "open{.t*"))] == ["open{.tar"]
    with pytest.raises(InputError, match=re.escape("s-011.tar does not exist; expected a folder")):
        expand(str(tmp_path / "s-{009..011}.tar"))


def test_data_of_two_kinds_and_labels_for_shards(tmp_path, ten):
    layouts.write_tar(tmp_path / "a.tar", layouts.members(2))
    (tmp_path / "b.parquet").touch()
    assert fails(tmp_path, ten).startswith(f"data is {tmp_path}; expected one folder of images")
    (tmp_path / "b.parquet").unlink()
    assert fails(tmp_path, ten, tmp_path / "x", UsageError) == (
        "--labels are for a folder of images; shards hold their own labels"
    )
    (tmp_path / "x.png").write_bytes(png(0))
    assert fails(tmp_path / "x.png", ten).startswith("data is ")


def test_samples():
    pixels = np.zeros((3, 1, 2, 2), np.float32)
    source = samples_source(pixels, np.array([0, 1, 2], np.int32))
    assert len(source) == 3
    assert source.items([1])[0].name == "sample 1"
    assert source.digest != samples_source(pixels + 1, source.labels).digest


def test_a_path_longer_than_any_can_be():
    with pytest.raises(InputError, match=r"^x+ does not exist; expected a folder"):
        expand("x" * 5000)
