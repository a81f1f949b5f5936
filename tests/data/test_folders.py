"""What of a folder is listed: no link out of it or back up, nothing of macOS; the rest is said."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.data import conftest as layouts
from tome_export.data.find import MOST_NAMES, expand, find_data
from tome_export.data.images import parity_images
from tome_export.data.preprocess import find_images
from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.progress import Silent


def names_of(source):
    return [item.name for item in source.items(range(len(source)))]


def test_links_to_folders_are_not_followed(tmp_path, ten):
    outside = layouts.write_tree(tmp_path / "outside", ["b.png"])
    root = layouts.write_tree(tmp_path / "root", ["3/a.png"])
    (root / "4").symlink_to(outside)
    (root / "everything").symlink_to("/")
    (root / "3" / "up").symlink_to(root)
    (root / "3" / "relative").symlink_to("../../outside")
    (root / "3" / "linked.png").symlink_to(outside / "b.png")  # one image that was put there
    source = find_data((str(root),), ten)
    assert names_of(source) == ["3/a.png", "3/linked.png"]
    assert source.labels.tolist() == [3, 3]
    assert source.notes == [
        f"left out of {root} are links to folders, which are not followed: 3/relative, 3/up, 4, "
        "everything",
        "1 class folders for 10 outputs, matched by number",
    ]
    assert find_images(root) == [root / "3/a.png", root / "3/linked.png"]
    # The folder that was named may be a link itself.
    (tmp_path / "named").symlink_to(root)
    assert names_of(find_data((f"{tmp_path}/named",), ten)) == names_of(source)


def test_a_folder_of_nothing_but_links(tmp_path, ten):
    layouts.write_tree(tmp_path / "store" / "0", ["a.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0").symlink_to(tmp_path / "store" / "0")
    said = "are links to folders, which are not followed: 0"
    with pytest.raises(InputError, match=f"; left out of {tmp_path / 'data'} {said}$"):
        find_data((f"{tmp_path}/data",), ten)
    with pytest.raises(InputError, match=f"; left out {said}$"):
        find_images(tmp_path / "data")


def test_what_macos_and_tools_add_is_left_out(tmp_path, ten):
    names = ["3/a.png", "3/._a.png", "__MACOSX/3/._a.png", ".cache/b.png", "4/.thumbs/c.png"]
    root = layouts.write_tree(tmp_path / "root", [*names, "4/d.png", "4/.e.png"])
    source = find_data((str(root),), ten)
    assert names_of(source) == ["3/a.png", "4/.e.png", "4/d.png"]
    assert source.labels.tolist() == [3, 4, 4]
    assert source.notes[:-1] == [
        f"left out of {root} are hidden folders: .cache, 4/.thumbs",
        f"left out of {root} are 2 of macOS (._*, __MACOSX)",
    ]
    assert len(find_images(root)) == 3


def test_folders_in_folders_in_folders(tmp_path, monkeypatch):
    root = layouts.write_tree(tmp_path / "root", ["d/a.png"])
    with monkeypatch.context() as patch:
        patch.chdir(root)
        for _ in range(1100):  # deeper than Python calls itself
            Path("d").mkdir(exist_ok=True)
            os.chdir("d")
    try:
        assert len(find_data((str(root),), None)) == len(find_images(root)) == 1
    finally:
        subprocess.run(["rm", "-r", root], check=True)  # which shutil cannot


def test_what_is_left_out_is_said_where_parity_is_checked(tmp_path):
    root = layouts.write_tree(tmp_path / "root", ["a.png"])
    (root / "all").symlink_to("/")
    said = []

    class Heard(Silent):
        def stage(self, title):
            said.append(title)

    parity_images(resolve("vit_digits"), (1, 32, 32), root, 4, Heard())
    assert said == [f"Note: left out of {root} are links to folders, which are not followed: all"]


# Braces.

LARGE = [
    "s-{000..999999999}.tar",
    "s-{0..1000000000}.tar",
    "{1..99999999999999999999}",
    "{0..99}{0..99}{0..99}{0..99}",
    "{0..99}/{a..z}/{0..99}",
    "{" + ",".join(["{0..9999}"] * 11) + "}",
    "{{{0..999},x}{0..999}}",
    "{9..-999999999..2}",
    "{,}" * 64,
    "{a..z}" * 5,
    "{" * 30 + "a,b" + "}" * 30,
    "{" * 50_000 + "}" * 50_000,
    "{" + "0" * 4000 + "1..100000}",
    "{0..99999}" + "x" * 4000,
    "{0..999999999}}",
]


@pytest.mark.parametrize("pattern", LARGE, ids=lambda one: one[:30])
def test_braces_that_stand_for_too_many(pattern):
    start = time.process_time()
    with pytest.raises(InputError, match="stands for too many names; expected at most") as caught:
        expand(pattern)
    assert time.process_time() - start < 0.5
    assert len(str(caught.value)) < 300


def test_what_braces_that_stand_for_too_many_are_told():
    with pytest.raises(InputError) as caught:
        expand("s-{000..999999999}.tar")
    assert str(caught.value) == (
        f"s-{{000..999999999}}.tar stands for too many names; expected at most {MOST_NAMES:,}, and "
        "braces at most 20 deep: give a folder, or a star"
    )


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        (f"{{1..{MOST_NAMES}}}", "1"),
        ("{1..999999999..999999999}", "1"),
        ("{a..z}{a..z}", "aa"),
        ("{0..9}{", "{0..9}{"),
        ("{" + "9" * 5000 + "..1}", "{" + "9" * 5000 + "..1}"),
        ("{1..9.." + "9" * 5000 + "}", "{1..9.." + "9" * 5000 + "}"),
        ("{a..999999999}", "{a..999999999}"),
        ("{a}{}", "{a}{}"),
        ("{b,c{d,e}}", "b"),
    ],
    ids=lambda one: one[:30],
)
def test_braces_that_do_not(tmp_path, monkeypatch, pattern, first):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        expand(pattern)
    assert str(caught.value).startswith(f"{first} does not exist; expected a folder of images")


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    layouts.write_tree(tmp_path, ["a.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^the name of the data is empty; expected a folder of"):
        expand("")


def test_brackets_in_the_name_of_a_folder(tmp_path):
    (tmp_path / "data[1]").mkdir()
    for name in ("s-0.tar", "s-1.tar"):
        (tmp_path / "data[1]" / name).touch()
    assert len(expand(f"{tmp_path}/data[1]/s-{{0..1}}.tar")) == 2
