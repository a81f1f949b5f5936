"""Images and labels as every command that takes them reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tome_export.models.facts import DATA

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALONE = ("--against", "none", "--workers", "0")


@pytest.fixture
def words(tmp_path):
    """Fifty digits in folders that the model's labels do not name, and their labels in a file."""
    with np.load(DATA / "digits_test.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    lines = []
    for index in range(50):
        name = f"{WORDS[labels[index]]}/{index:03}.png"
        (tmp_path / "words" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(tmp_path / "words" / name)
        lines.append(f'"{tmp_path}/words/{name}","{labels[index]}"\n')
    (tmp_path / "words" / "everything").symlink_to("/")
    (tmp_path / "labels.csv").write_text("".join(lines))
    return "words"


REFUSED = (
    "the data has 10 class folders (eight, five, four, nine, one, …) for 10 outputs, and their "
    "names do not tell which; rename them to the model's labels or to indices from 0 to 9, or give "
    "every image's class with --labels, or say --classes-in-order if they are, sorted, the model's"
)
LINKS = "left out of words are links to folders, which are not followed: everything"


def test_eval_takes_folders_in_order_only_where_it_is_told(run, artifact, words):
    ran = run("eval", artifact, "--data", words, *ALONE)
    assert (ran.code, ran.out, ran.error) == (3, "", REFUSED)
    ran = run("eval", artifact, "--data", words, *ALONE, "--classes-in-order")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert LINKS in lines
    assert "10 class folders for 10 outputs, matched in sorted order (--classes-in-order)" in lines
    ran = run("eval", artifact, "--data", words, *ALONE, "--labels", "labels.csv", "--json")
    assert ran.json["candidates"][0]["top1"]["share"] > 0.9
    assert ran.json["data"]["notes"] == [LINKS]


def test_tune_takes_labels(run, words, tmp_path):
    tune = ("tune", "vit_digits", "--data", words, "--target-macs", "90%", "--time-limit", "2")
    ran = run(*tune)
    assert (ran.code, ran.out, ran.error) == (3, "", REFUSED)
    ran = run(*tune, "--labels", "labels.csv")
    assert ran.code == 0, ran.err
    assert f"Note: {LINKS}" in ran.out.splitlines()
    found = json.loads((tmp_path / "schedule.json").read_text())
    assert found["unmerged"]["accuracy"] > 0.9
    ran = run("tune", "vit_digits", "--target-macs", "90%", "--labels", "labels.csv", "--force")
    assert ran.code == 2
    assert ran.error.startswith("--labels are for a folder of images; the samples have their own")


def test_a_cascade_says_what_its_listing_does(run, digit_members, words, tmp_path):
    members = (digit_members[32], digit_members[8])
    cascade = ("cascade", *members, "--data", words, "--target-macs", "70%")
    ran = run(*cascade)
    assert (ran.code, ran.out, ran.error) == (3, "", REFUSED)
    ran = run(*cascade, "--labels", "labels.csv")
    assert ran.code == 0, ran.err
    assert f"Note: {LINKS}" in ran.out.splitlines()
    assert json.loads((tmp_path / "cascade.json").read_text())["data"]["notes"] == [LINKS]


def test_check_names_an_image_as_its_folder_was_named(run, artifact, words, tmp_path):
    ran = run("check", artifact, "--images", words, "--min-entropy", "1")
    assert ran.code == 5
    assert f"Note: {LINKS}\n" in ran.err
    (first, *_) = (line for line in ran.out.splitlines() if line.startswith("  words/"))
    path = tmp_path / first.strip().partition(":")[0]
    path.write_bytes(path.read_bytes()[:60])
    ran = run("check", artifact, "--images", words)
    assert ran.code == 3
    assert ran.error.startswith(f"image {path.relative_to(tmp_path)} ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("check", "ARTIFACT", "--images", ""), 2, "Invalid value for '--images': an empty name; "
         "give a path, . for the current folder; see 'tome-export check --help'"),
        (("inspect", "ARTIFACT", ""), 2, "Invalid value for 'IMAGE...': an empty name; give a "
         "path, . for the current folder; see 'tome-export inspect --help'"),
        (("eval", "ARTIFACT", "--data", ""), 3, "the name of the data is empty; expected a folder "
         "of images, .tar or .parquet shards such as 'shard-{000..010}.tar', or 'samples'"),
        (("eval", "ARTIFACT", "--data", "s-{0..1000000000}.tar"), 3, "s-{0..1000000000}.tar stands "
         "for too many names; expected at most 100,000, and braces at most 20 deep: give a folder, "
         "or a star"),
    ],
    ids=["check", "inspect", "eval", "braces"],
)  # fmt: skip
def test_names_of_nothing_and_of_too_much(run, artifact, arguments, code, message):
    ran = run(*(artifact if one == "ARTIFACT" else one for one in arguments))
    assert (ran.code, ran.out, ran.error) == (code, "", message)
