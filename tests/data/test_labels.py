"""Which class a sub-folder is: a wrong guess would look like a bad model."""

from __future__ import annotations

import unicodedata

import pytest

from tests.data import conftest as layouts
from tome_export.data.find import find_data
from tome_export.data.image_folder import class_folders, labels_from_file
from tome_export.data.labels import Classes
from tome_export.errors import InputError

WORDS = Classes(5, ("cat", "dog", "crane", "owl", "crane"))
DIGITS = Classes(3, ("0", "1", "2"))
SHIFTED = Classes(3, ("1", "2", "3"))
IN_ORDER = "in sorted order (--classes-in-order)"
NFC = unicodedata.normalize("NFC", "käse")
NFD = unicodedata.normalize("NFD", "käse")
WNIDS = ["n01440764", "n01443537", "n01484850"]


@pytest.mark.parametrize(
    ("folders", "classes", "expected", "rule"),
    [
        (["cat", "owl"], WORDS, [0, 3], "by name"),
        (["1", "2", "3"], SHIFTED, [0, 1, 2], "by name"),
        (["0", "1", "2"], DIGITS, [0, 1, 2], "by name"),
        (["0", "2", "4"], WORDS, [0, 2, 4], "by number"),
        (["0", "1", "10", "2", "9"], Classes(11), [0, 1, 10, 2, 9], "by number"),
        (["000", "002", "010"], Classes(1000), [0, 2, 10], "by number"),
        (WNIDS, Classes(3, ("tench", "goldfish", "shark")), [0, 1, 2], "in sorted order"),
        (["1", "a", "b"], Classes(3), [0, 1, 2], "in sorted order"),
        (["one", "two", "zero"], Classes(3, DIGITS.names, in_order=True), [0, 1, 2], IN_ORDER),
        (["1", "10", "2"], Classes(3, ("2", "10", "1"), in_order=True), [0, 1, 2], IN_ORDER),
        ([NFD], Classes(2, ("cat", NFC)), [1], "by name"),
        ([NFC], Classes(2, ("cat", NFD)), [1], "by name"),
    ],
)
def test_rules(folders, classes, expected, rule):
    index, note = class_folders(folders, classes)
    assert index == dict(zip(folders, expected, strict=True))
    assert note == f"{len(folders)} class folders for {classes.count} outputs, matched {rule}"


FIX = "or give every image's class with --labels"


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (["1", "2", "zero"], DIGITS,
         "the class folders zero are not, or not of one class only, among the model's labels, but "
         f"the other 2 are; rename them to labels such as 0, 1, 2, {FIX}"),
        (["cat", "crane", "dog"], WORDS,
         "the class folders crane are not, or not of one class only, among the model's labels, but "
         f"the other 2 are; rename them to labels such as cat, dog, owl, {FIX}"),
        (["1", "2", "3"], Classes(3),
         "the class folders 3 are beyond the model's 3 outputs; expected numbers from 0 to 2: "
         f"rename them, {FIX}"),
        (["01", "1", "2"], Classes(3), f"the class folders 01, 1 are the same number; rename them, "
         f"{FIX}"),
        (WNIDS, Classes(1000),
         f"the data has 3 class folders ({', '.join(WNIDS)}) for 1000 outputs, and their names do "
         "not tell which; rename them to the model's labels or to indices from 0 to 999, " + FIX),
        (list("abcdefg"), Classes(8),
         "the data has 7 class folders (a, b, c, d, e, …) for 8 outputs, and their names do not "
         f"tell which; rename them to the model's labels or to indices from 0 to 7, {FIX}"),
        (["one", "two", "zero"], DIGITS,
         "the data has 3 class folders (one, two, zero) for 3 outputs, and their names do not tell "
         f"which; rename them to the model's labels or to indices from 0 to 2, {FIX}, or say "
         "--classes-in-order if they are, sorted, the model's"),
        (["a", "b"], Classes(3, DIGITS.names, in_order=True),
         "the data has 2 class folders for 3 outputs; --classes-in-order takes one for each, leave "
         "it out if they are named by the model's labels"),
        (sorted([NFC, NFD]), Classes(2, ("cat", NFC)),
         f"the class folders {NFD}, {NFC} are the same name; rename them, {FIX}"),
        (["1" * 30], Classes(3),
         f"the data has 1 class folders ({'1' * 30}) for 3 outputs, and their names do not tell "
         f"which; rename them to the model's labels or to indices from 0 to 2, {FIX}"),
        (["a", "b\udcff\n"], Classes(3),
         "the data has 2 class folders (a, b\\xff\\n) for 3 outputs, and their names do not tell "
         f"which; rename them to the model's labels or to indices from 0 to 2, {FIX}"),
    ],
)  # fmt: skip
def test_refused(folders, classes, message):
    with pytest.raises(InputError) as caught:
        class_folders(folders, classes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("names", "expected", "rule"),
    [
        (["2", "1", "0"], [2, 1, 0], "matched by name"),
        (["0", "2"], [0, 2], "matched by name"),
        (["0", "one", "2"], [0, 1, 2], "matched by number"),
        (WNIDS, [0, 1, 2], "matched by number"),
        (["7", "2", "1"], [7, 2, 1], "matched by number"),
    ],
)
def test_numbers_of_a_data_set_that_names_its_classes(names, expected, rule):
    index, note = DIGITS.indices(names, "x")
    assert index == expected
    assert note == f"{len(names)} classes, {rule}"


def test_numbers_that_names_contradict():
    with pytest.raises(InputError) as caught:
        DIGITS.indices(["1", "one", "0"], "x.parquet")
    assert str(caught.value) == (
        "x.parquet has the classes 1, 0 at other numbers than the model, whose labels one are not; "
        "rename them to labels of the model"
    )


def test_numbers_of_a_data_set_of_other_names_need_a_reason():
    words = ["zero", "one", "two"]
    with pytest.raises(InputError) as caught:
        DIGITS.indices(words, "x.parquet")
    assert str(caught.value) == (
        "x.parquet has the classes zero, one, two, which are not among the model's labels, such as "
        "0, 1, 2; rename them, or say --classes-in-order if the numbers are the model's"
    )
    given = Classes(3, DIGITS.names, in_order=True).indices(words, "x.parquet")
    assert given == ([0, 1, 2], "3 classes, matched by number (--classes-in-order)")


def test_many_classes_take_no_time():
    names = tuple(map(str, range(50_000)))
    assert len(Classes(len(names), names).by_name) == len(names)


# Files of labels.

ABSENT = (
    " labels 1 images that are not in {{images}}, the first is {} in line {}; add them or remove "
    "their lines"
)


def read(tmp_path, text, names, classes=WORDS):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return labels_from_file(path, names, tmp_path / "images", classes)


def refused(tmp_path, text, names, classes=WORDS):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, names, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'labels.csv'}")


@pytest.mark.parametrize(
    "text",
    [
        'path,label\r\n"a, b.png","3"\r\n"c ""d"".png","owl"\r\n',
        '"a, b.png"\t3\n"c ""d"".png"\towl',
        '\ufeffa, b.png,3\n# c\n\n  \n"c ""d"".png",owl',
    ],
)
def test_quoted_rows(tmp_path, text):
    assert read(tmp_path, text, ["a, b.png", 'c "d".png']) == [3, 3]


def test_ends_of_lines_within_names(tmp_path):
    names = ["a\x0b.png", "b\x85.png", "c\u2028.png"]
    assert read(tmp_path, "".join(f"{name},3\n" for name in names), names) == [3, 3, 3]
    assert read(tmp_path, '"a\nb.png",3\nc.png,1\n', ["a\nb.png", "c.png"]) == [3, 1]


@pytest.mark.parametrize("place", ["absolute", "link", "dots"])
def test_absolute_paths(tmp_path, place):
    (tmp_path / "images").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "images")
    (tmp_path / "x").mkdir()
    folder = {"absolute": "images", "link": "other", "dots": "x/../images"}[place]
    text = f"{tmp_path}/{folder}/0/a.png,3\n./0//b.png,1\n"
    assert read(tmp_path, text, ["0/a.png", "0/b.png"]) == [3, 1]
    elsewhere = refused(tmp_path, f"/elsewhere/a.png,3\n{text}", ["0/a.png", "0/b.png"])
    assert elsewhere == (
        f" labels 1 images that are not in {tmp_path / 'images'}, the first is /elsewhere/a.png in "
        "line 1; add them or remove their lines"
    )
    twice = refused(tmp_path, f"{text}0/a.png,3", ["0/a.png", "0/b.png"])
    assert twice == ", line 3 repeats 0/a.png; give each image once"


@pytest.mark.parametrize(("written", "there"), [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
def test_accents_in_either_form(tmp_path, written, there):
    assert read(tmp_path, f"{written}.png,3", [f"{there}.png"]) == [3]
    assert read(tmp_path, f"{tmp_path}/images/{written}.png,3", [f"{there}.png"]) == [3]
    assert read(tmp_path, f"a.png,{written}", ["a.png"], Classes(2, ("cat", there))) == [1]


def test_accents_that_alone_tell_two_images_apart(tmp_path):
    names = [f"{NFC}.png", f"{NFD}.png"]
    assert read(tmp_path, f"{NFD}.png,1\n{NFC}.png,3", names) == [3, 1]
    said = f" has no label for {NFD}.png; add a line for it"
    assert refused(tmp_path, f"{NFC}.png,1\n", names) == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a.png,3\nb.png,1', ", line 2 is 'a.png,3\\\\nb.png,1'; expected "
         "'relative/path,label' with a comma or a tab"),
        ("a.png," + "x" * 200_000, ", line 1 cannot be read (field larger than field limit "
         "(131072)); expected 'relative/path,label' with a comma or a tab"),
        ("a.png,3\n" + "x" * 5000 + ".png,1", ABSENT.format("x" * 5000 + ".png", 2)),
        ("a.png,3\nb\0.png,1", ABSENT.format("b\\x00.png", 2)),
        ("/a\0/b.png,1\na.png,3", ABSENT.format("/a\\x00/b.png", 1)),
    ],
    ids=["quote", "long label", "long name", "zero", "zero in a folder"],
)  # fmt: skip
def test_rows_of_nonsense(tmp_path, text, message):
    assert refused(tmp_path, text, ["a.png"]) == message.format(images=tmp_path / "images")


def test_a_number_that_is_also_the_name_of_another_class(tmp_path):
    shifted = Classes(3, ("1", "2", "3"))
    assert refused(tmp_path, "a.png,1", ["a.png"], shifted) == (
        ", line 1 has label 1, which is the name of the model's class 0 and the number of another; "
        "give numbers and say so with --classes-in-order"
    )
    assert read(tmp_path, "a.png,1", ["a.png"], Classes(3, shifted.names, in_order=True)) == [1]
    assert read(tmp_path, "a.png,0", ["a.png"], shifted) == [0]  # is no name
    assert read(tmp_path, "a.png,1", ["a.png"], DIGITS) == [1]  # is both


def test_labels_of_a_model_without_classes_are_said_to_be_unused(tmp_path):
    layouts.write_tree(tmp_path / "images", ["a.png"])
    (tmp_path / "labels.csv").write_text("a.png,1")
    source = find_data((f"{tmp_path}/images",), None, tmp_path / "labels.csv")
    assert source.notes == ["--labels are not used: the model has no classes"]
