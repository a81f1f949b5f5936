"""Which class a sub-folder is: a wrong guess would look like a bad model."""

from __future__ import annotations

import pytest

from tome_export.data.labels import Classes, class_folders, numbered_classes
from tome_export.errors import InputError

WORDS = Classes(5, ("cat", "dog", "crane", "owl", "crane"))
DIGITS = Classes(3, ("0", "1", "2"))
SHIFTED = Classes(3, ("1", "2", "3"))
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
    index, note = numbered_classes(names, DIGITS, "x")
    assert index == expected
    assert note == f"{len(names)} classes, {rule}"


def test_numbers_that_names_contradict():
    with pytest.raises(InputError) as caught:
        numbered_classes(["1", "one", "0"], DIGITS, "x.parquet")
    assert str(caught.value) == (
        "x.parquet has the classes 1, 0 at other numbers than the model, whose labels one are not; "
        "rename them to labels of the model"
    )
