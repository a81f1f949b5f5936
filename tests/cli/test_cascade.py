"""``tome-export cascade``, end to end on the digits."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tome_export.artifact.cascade import Cascade
from tome_export.errors import ExportError
from tome_export.models.facts import DATA
from tome_export.serve import cascade as serve_module

HELP = "; see 'tome-export cascade --help'"
MACS = ("--target-macs", "60%")
TARGETS = "--target-macs, --min-accuracy, --min-similarity"


@pytest.fixture(scope="module")
def digits():
    with np.load(DATA / "digits_test.npz") as archive:
        return archive["images"], archive["labels"]


@pytest.fixture
def write(tmp_path, digits):
    """``write(name, count, labels=True, first=0)``: a folder of digits."""

    def call(name, count, labels=True, first=0, given=None):
        images, classes = digits
        for index in range(first, first + count):
            label = classes[index] if given is None else given(classes[index])
            folder = tmp_path / name / str(label) if labels else tmp_path / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(folder / f"{index:03d}.png")
        return name

    return call


@pytest.fixture
def lowest_and_highest(digit_members):
    return digit_members[32], digit_members[8]


def edited(source, target, change):
    """A copy of an artifact with another manifest."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "build.json").read_text())
    change(manifest)
    (target / "build.json").write_text(json.dumps(manifest))
    return target


CASES = {
    "no target": (
        ("--data", "samples"),
        2,
        f"0 targets were given; give exactly one of {TARGETS}{HELP}",
    ),
    "two targets": (
        ("--data", "samples", *MACS, "--min-accuracy", "-1"),
        2,
        f"2 targets were given; give exactly one of {TARGETS}{HELP}",
    ),
    "no data": (MACS, 2, f"Missing option '--data'{HELP}"),
    "no such data": (
        ("--data", "nowhere", *MACS),
        3,
        "nowhere does not exist; expected a folder of images, .tar or .parquet shards such as "
        "'shard-{000..010}.tar', or 'samples'",
    ),
    "target below": (
        ("--data", "samples", "--target-macs", "20%"),
        3,
        "target is a mean of at most 20 % of the highest artifact's MACs; these artifacts span "
        "5.22 M (the lowest for every image) to 13.46 M MACs (the highest alone, without a "
        "cascade), ask for a mean in between",
    ),
    "target above": (
        ("--data", "samples", "--target-macs", "20M"),
        3,
        "target is at most 20.00 M MACs; these artifacts span 5.22 M (the lowest for every image) "
        "to 13.46 M MACs (the highest alone, without a cascade), ask for a mean in between",
    ),
    "accuracy": (
        ("--data", "samples", "--min-accuracy", "0.5"),
        3,
        "minimum accuracy is '0.5'; expected the drop that is allowed, in points, such as -0.5, or "
        "an accuracy from 1 to 100 percent such as 97.2",
    ),
    "share": (
        ("--data", "samples", *MACS, "--calibration", "1"),
        2,
        "calibration share is 1; expected a number between 0 and 1",
    ),
    "lambda": (
        ("--data", "samples", *MACS, "--lambda", "-1"),
        2,
        "lambda is -1; expected a number, 0 or more",
    ),
    "limit": (
        ("--data", "samples", *MACS, "--limit", "0"),
        2,
        "--limit is 0; expected at least 1 image",
    ),
    "few images": (
        ("--data", "samples", *MACS, "--limit", "12"),
        3,
        "6 images are for calibration; expected 10 or more, give more with --data",
    ),
    "few images to train on": (
        ("--data", "samples", *MACS, "--limit", "30", "--policy", "learned"),
        3,
        "15 images are for calibration; expected 20 or more, give more with --data",
    ),
    "PyTorch": (
        ("--data", "samples", *MACS, "--backend", "torch"),
        2,
        "backend is 'torch'; a cascade runs the artifacts, choose another one",
    ),
    "backend that is none": (
        ("--data", "samples", *MACS, "--backend", "cpu"),
        2,
        "backend is 'cpu'; expected one of ort-cpu, ort-cuda, ort-rtx, openvino, tensorrt, "
        "tensorrt-rtx",
    ),
    "a name without a repository": (
        ("--data", "samples", *MACS, "--name", "mine"),
        2,
        "--preprocess, --name and --self-test are for what is served; give --repository too",
    ),
    "a name that is taken": (
        ("--data", "samples", *MACS, "--repository", "models", "--name", "x_router"),
        2,
        "model name is 'x_router'; names that end in _router are given to models made around a "
        "model, choose one such as x",
    ),
    "the same images for both": (
        ("--data", "samples", "--test", "samples", *MACS),
        2,
        "--test names images of --data (samples); give others, or leave it out to keep a part of "
        "them",
    ),
    "seed": (
        ("--data", "samples", *MACS, "--seed", "-1"),
        2,
        "--seed is -1; expected 0 or more",
    ),
    "seed, and nowhere to write": (
        ("--data", "samples", *MACS, "--seed", "-1", "-o", "none/c.json"),
        2,
        "--seed is -1; expected 0 or more",
    ),
    "labels of no test": (
        ("--data", "samples", *MACS, "--test-labels", "labels.csv"),
        2,
        "--test-labels are for the images of --test; give --test too",
    ),
    "no such test": (
        ("--data", "samples", "--test", "nowhere", *MACS),
        3,
        "nowhere does not exist; expected a folder of images, .tar or .parquet shards such as "
        "'shard-{000..010}.tar', or 'samples'",
    ),
    "the name of the page": (
        ("--data", "samples", *MACS, "-o", "c.html"),
        2,
        "output is c.html, which is the page's name; give one such as a .json",
    ),
    "nowhere to write": (
        ("--data", "samples", *MACS, "-o", "none/c.json"),
        3,
        "cannot write none/c.json: its folder does not exist; make it or give another file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, run, lowest_and_highest, tmp_path):
    arguments, code, message = CASES[case]
    ran = run("cascade", *lowest_and_highest, *arguments)
    assert ran.error == message
    assert (ran.code, ran.out) == (code, "")
    assert list(tmp_path.iterdir()) == []


def test_artifacts_that_make_no_cascade(run, digit_members, tmp_path):
    low, high = digit_members[32], digit_members[8]
    same = shutil.copytree(high, tmp_path / "same")
    tower = edited(
        high,
        tmp_path / "tower",
        lambda m: m.update(
            output={**m["output"], "name": "features"},
            outputs=[{**m["output"], "name": "features"}],
            form={**m["form"], "kind": "features"},
            labels=None,
            activation=None,
        ),
    )
    other = edited(
        high, tmp_path / "other", lambda m: m["preprocessing"].update(interpolation="nearest")
    )
    weights = edited(
        high, tmp_path / "weights", lambda m: m["model"]["weights"].update(state_sha256="0")
    )
    asks = edited(
        high,
        tmp_path / "asks",
        lambda m: m.update(
            inputs=[m["input"], {"name": "query", "shape": ["batch", 8], "dtype": "float32"}]
        ),
    )
    silent = edited(high, tmp_path / "silent", lambda m: m.pop("macs"))
    one_model = "a cascade is made of artifacts of one model, with different r"
    for artifacts, code, message in (
        (
            [low],
            2,
            "1 artifact is given; a cascade is made of two or more of one model, with different r",
        ),
        (
            [high, same],
            3,
            f"{high} and {same} take the same 13.46 M MACs; a cascade is made of artifacts of "
            "different cost, leave one out",
        ),
        ([low, weights], 3, f"{low} and {weights} have different weights; {one_model}"),
        ([low, other], 3, f"{low} and {other} have different preprocessing; {one_model}"),
        (
            [low, tower],
            3,
            f"{low} and {tower} have different labels; {one_model}",
        ),
        (
            [low, asks],
            3,
            f"the model of {asks} takes query with every image, which 'tome-export cascade' cannot "
            "give; use check, bench, predict or inspect --query, or serve",
        ),
        (
            [low, silent],
            3,
            f"{silent}/build.json has no macs; rebuild the artifact or copy it again",
        ),
    ):
        ran = run("cascade", *artifacts, "--data", "samples", *MACS)
        assert ran.error == message
        assert (ran.code, ran.out) == (code, "")
    assert not (tmp_path / "cascade.json").exists()


def test_a_member_of_fixed_batch_is_served_behind_a_front(run, digit_members, tmp_path):
    def fix(manifest):
        manifest["batch"] = "4"
        tensors = manifest["input"], manifest["output"], *manifest["inputs"], *manifest["outputs"]
        for tensor in tensors:
            tensor["shape"][0] = 4

    fixed = edited(digit_members[8], tmp_path / "fixed", fix)
    ran = run(
        *("cascade", digit_members[32], fixed, "--data", "samples", *MACS),
        *("--repository", "models", "--json"),
    )
    assert ran.code == 0
    names = [f"vit_digits_r{end}" for end in ("32", "8_fixed", "8")]
    assert ran.json["served"]["models"] == [*names, "vit_digits_cascade"]
    config = (tmp_path / "models" / "vit_digits_cascade" / "config.pbtxt").read_text()
    assert "max_batch_size: 4\n" in config


def test_images_that_cannot_be_read(run, lowest_and_highest, write, tmp_path):
    (tmp_path / "empty").mkdir()
    ran = run("cascade", *lowest_and_highest, "--data", "empty", *MACS)
    assert ran.code == 3
    assert "empty" in ran.error
    for index in range(3):
        (tmp_path / "empty" / f"{index}.png").write_text("no image")
    ran = run("cascade", *lowest_and_highest, "--data", "empty", *MACS)
    assert ran.code == 3
    assert re.fullmatch(
        r"none of the 3 images of empty could be read; the first is 0\.png: .+", ran.error
    )
    shutil.copy(tmp_path / "empty" / "0.png", tmp_path / write("some", 40, labels=False))
    ran = run("cascade", *lowest_and_highest, "--data", "some", *MACS)
    assert ran.code == 0, ran.err
    assert "Note: 1 images could not be used; the first is" in ran.out
    values = json.loads((tmp_path / "cascade.json").read_text())
    assert [one["name"] for one in values["data"]["unreadable"]] == ["0.png"]
    assert (values["data"]["calibration"], values["data"]["test"]) == (20, 20)


def test_an_accuracy_out_of_reach(run, lowest_and_highest, write):
    """One image in ten lies in the folder of another digit."""
    write("data", 36)
    write("data", 4, first=36, given=lambda label: (label + 1) % 10)
    ran = run("cascade", *lowest_and_highest, "--data", "data", "--min-accuracy", "100")
    assert ran.code == 3
    assert re.fullmatch(
        r"target is accuracy of at least 100 %, 20 of the 20 calibration images right; no "
        r"thresholds give more than 1[6-9] \(\d\d\.00 %, at \d+\.\d\d M MACs\), ask for no more or "
        r"add an artifact that merges less",
        ran.error,
    )


@pytest.mark.parametrize("policy", ["complexity", "confidence", "learned"])
def test_a_cascade_of_three(run, digit_members, policy, tmp_path):
    given = ("--data", "samples", *MACS, "--limit", "80", "--policy", policy)
    # In any order.
    ran = run("cascade", *(digit_members[r] for r in (16, 8, 32)), *given, "--json")
    assert ran.code == 0, ran.err
    values = ran.json
    written = json.loads((tmp_path / "cascade.json").read_text())
    assert {**written, "file": "cascade.json", "page": "cascade.html"} == values
    assert Cascade.read(tmp_path / "cascade.json").model_dump(mode="json") == written
    assert [one["schedule"] for one in values["members"]] == [
        f"r={r} constant" for r in (32, 16, 8)
    ]
    macs = [one["macs"] for one in values["members"]]
    assert values["chosen"]["calibration"]["macs"] <= 0.6 * macs[-1]
    test = values["chosen"]["test"]
    own = values["policy_macs"]
    assert own == {"complexity": 4 * 1024, "confidence": 0, "learned": 1024 + 3 * 16}[policy]
    # What the images cost is what the members that they went through cost.
    each = np.cumsum(macs) if policy == "confidence" else np.array(macs)
    images = sum(test["budgets"])
    assert images == values["data"]["test"] == 40
    assert test["macs"] == pytest.approx(own + float(np.dot(test["budgets"], each)) / images)
    assert values["data"]["fitted"] == (20 if policy == "learned" else 0)
    assert sum(one["chosen"] for one in values["sweep"]) == 1
    page = (tmp_path / "cascade.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "r=32 constant" in page


def test_the_same_again_as_text(run, lowest_and_highest, tmp_path):
    given = ("cascade", *lowest_and_highest, "--data", "samples", *MACS, "--limit", "60")
    first = run(*given, "--json").json
    again = run(*given, "--force")
    assert json.loads((tmp_path / "cascade.json").read_text())["settings"] == first["settings"]
    assert f"Target       {first['target']['text']}" in again.out
    assert len([line for line in again.out.splitlines() if line.startswith("* ")]) == 1
    assert "Result: cascade.json, cascade.html" in again.out


def test_nothing_of_the_test_images_reaches_the_thresholds(run, lowest_and_highest, write):
    write("calibration", 60)
    write("right", 60, first=60)
    write("wrong", 60, first=60, given=lambda label: (label + 3) % 10)
    found = {}
    for test in ("right", "wrong"):
        ran = run(
            *("cascade", *lowest_and_highest, "--data", "calibration", "--test", test),
            *("--min-accuracy", "-2", "-o", f"{test}.json", "--json"),
        )
        assert ran.code == 0, ran.err
        found[test] = ran.json
    assert found["right"]["settings"] == found["wrong"]["settings"]
    assert found["right"]["chosen"]["calibration"] == found["wrong"]["chosen"]["calibration"]
    assert found["right"]["chosen"]["test"]["share"] > 0.9
    assert found["wrong"]["chosen"]["test"]["share"] < 0.1
    assert found["right"]["data"]["test_source"] == "right"


def test_without_labels_the_highest_is_right(run, lowest_and_highest, write):
    write("plain", 80, labels=False)
    ran = run("cascade", *lowest_and_highest, "--data", "plain", "--min-accuracy", "-3", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["metric"] == "agreement"
    assert ran.json["members"][-1]["test"]["share"] == 1.0
    write("named", 40)
    ran = run(
        "cascade", *lowest_and_highest, "--data", "plain", "--test", "named", *MACS, "--force"
    )
    assert ran.code == 3
    assert ran.error == (
        "one of the data and the test images has labels and the other has none; give both with "
        "labels (--labels, --test-labels or class sub-folders), or both without"
    )


@pytest.mark.parametrize("test", ["./data", "link", "data/3", "."])
def test_images_that_are_calibrated_on_are_no_test(test, run, lowest_and_highest, write, tmp_path):
    write("data", 1, given=lambda _: 3)
    (tmp_path / "link").symlink_to("data")
    ran = run("cascade", *lowest_and_highest, "--data", "data", "--test", test, *MACS)
    shared = (tmp_path / ("data/3" if test == "data/3" else "data")).resolve()
    assert (ran.code, ran.out) == (2, "")
    assert ran.error == (
        f"--test names images of --data ({shared}); give others, or leave it out to keep a part "
        "of them"
    )


def test_flat_folders_have_labels_each(run, lowest_and_highest, write, digits, tmp_path):
    for name, first in (("data", 0), ("test", 40)):
        write(name, 40, labels=False, first=first)
        lines = [f"{index:03d}.png,{digits[1][index]}" for index in range(first, first + 40)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    given = ("--data", "data", "--labels", "data.csv", "--test", "test", *MACS, "--json")
    ran = run("cascade", *lowest_and_highest, *given, "--test-labels", "test.csv")
    assert ran.code == 0, ran.err
    assert ran.json["metric"] == "top1"
    (tmp_path / "test.csv").write_text("\n".join(line[:-1] + "0" for line in lines))
    wrong = run("cascade", *lowest_and_highest, *given, "--test-labels", "test.csv", "--force").json
    zeros = sum(line.endswith(",0") for line in lines)
    assert ran.json["members"][-1]["test"]["share"] > 0.9
    assert wrong["members"][-1]["test"]["share"] == pytest.approx(zeros / 40, abs=0.05)


def test_an_existing_file_is_not_replaced(run, lowest_and_highest, tmp_path):
    (tmp_path / "cascade.html").write_text("mine")
    ran = run("cascade", *lowest_and_highest, "--data", "samples", *MACS)
    assert ran.code == 3
    assert ran.error == "cascade.html exists; give another file, or --force to replace it"
    assert [path.name for path in tmp_path.iterdir()] == ["cascade.html"]


def test_a_repository_is_looked_at_before_the_calibration(run, lowest_and_highest, tmp_path):
    theirs = tmp_path / "models" / "vit_digits_cascade" / "config.pbtxt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    # Images that are not there would be the next thing to be refused.
    given = ("--data", "nowhere", *MACS, "--repository", "models")
    ran = run("cascade", *lowest_and_highest, *given)
    assert ran.code == 3
    assert "is there and its config.pbtxt is not one that" in ran.error
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_calibration_that_cannot_be_served_is_not_lost(
    run, lowest_and_highest, tmp_path, monkeypatch
):
    def broken(*_):
        raise ExportError("no server today")

    monkeypatch.setattr(serve_module, "serve_cascade", broken)
    given = ("--data", "samples", *MACS, "--limit", "60", "--repository", "models")
    ran = run("cascade", *lowest_and_highest, *given, "--json")
    assert (ran.code, ran.error) == (3, "the result was not recorded: no server today")
    assert ran.json["unrecorded"] == "no server today"
    assert ran.json["chosen"]["test"]["images"] == 30
    assert list(tmp_path.iterdir()) == []
