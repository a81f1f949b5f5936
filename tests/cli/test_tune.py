"""``tome-export tune`` and ``build --schedule FILE``, end to end on the digits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tome_export.artifact.schedule import read_search
from tome_export.tune import images as tune_images
from tome_export.tune import score as tune_score

TUNE = ("tune", "vit_digits", "--limit", "64", "--time-limit", "10")
BUILD = ("build", "vit_digits", "--engine", "none", "--no-check", "-o", "out")
HELP = "; see 'tome-export tune --help'"
BUILD_HELP = "; see 'tome-export build --help'"
TARGETS = "give exactly one of --target-latency-ms, --target-macs, --min-accuracy, --min-similarity"

CASES = {
    "no target": (TUNE, 2, f"0 targets were given; {TARGETS}{HELP}"),
    "two targets": (
        (*TUNE, "--target-macs", "50%", "--min-accuracy", "-1"),
        2,
        f"2 targets were given; {TARGETS}{HELP}",
    ),
    "accuracy": (
        (*TUNE, "--min-accuracy", "0.5"),
        3,
        "minimum accuracy is '0.5'; expected the drop that is allowed, in points, such as -0.5, or "
        "an accuracy from 1 to 100 percent such as 97.2",
    ),
    "similarity": (
        (*TUNE, "--min-similarity", "98"),
        3,
        "minimum similarity is 98; expected a mean above 0, at most 1, such as 0.98",
    ),
    "similarity of classes": (
        (*TUNE, "--min-similarity", "0.98"),
        2,
        "vit_digits gives classes, which are right or wrong and not similar; give --min-accuracy, "
        "such as -0.5, in place of --min-similarity",
    ),
    "neighbours of classes": (
        (*TUNE, "--target-macs", "50%", "--measure", "retrieval"),
        2,
        "vit_digits gives classes, of which the right ones are counted; leave --measure retrieval "
        "out, which is for models of features or maps",
    ),
    "limit": (
        ("tune", "vit_digits", "--min-accuracy", "-1", "--limit", "0"),
        2,
        "--limit is 0; expected at least 1 image",
    ),
    "time limit": (
        ("tune", "vit_digits", "--min-accuracy", "-1", "--time-limit", "0"),
        2,
        "--time-limit is 0; expected seconds above 0",
    ),
    "batch": (
        (*TUNE, "--target-latency-ms", "1", "--batch", "0"),
        2,
        "--batch is 0; expected at least 1 image per run",
    ),
    "seed": (
        (*TUNE, "--min-accuracy", "-1", "--seed", "-1"),
        2,
        "--seed is -1; expected 0 or more",
    ),
    "entropy of sizes that are no counts": (
        (*TUNE, "--min-accuracy", "-1", "--reducer", "diffrate", "--min-entropy", "0.5"),
        3,
        "reducer diffrate weighs the size of a token by similarity, so --min-entropy cannot count "
        "its patches; leave --min-entropy out",
    ),
    "too few MACs": (
        (*TUNE, "--target-macs", "1M"),
        3,
        "target is at most 1.00 M MACs; merging all that can be in every layer still takes "
        "5.22 M of the unmerged model's 22.48 M, ask for no less",
    ),
    "no such data": (
        (*TUNE, "--min-accuracy", "-1", "--data", "nowhere"),
        3,
        "nowhere does not exist; expected a folder of images, .tar or .parquet shards such as "
        "'shard-{000..010}.tar', or 'samples'",
    ),
    "unwritable": (
        (*TUNE, "--min-accuracy", "-1", "-o", "none/s.json"),
        3,
        "cannot write none/s.json: its folder does not exist; make it or give another file",
    ),
    "build of no file": (
        (*BUILD, "--schedule", "none.json"),
        3,
        "none.json cannot be read (No such file or directory); write it with 'tome-export tune'",
    ),
    "build with r as well": (
        (*BUILD, "--schedule", "none.json", "--r", "3"),
        2,
        f"schedule file none.json gives r for every layer; drop --r 3 or the file{BUILD_HELP}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, run, tmp_path):
    arguments, code, message = CASES[case]
    ran = run(*arguments)
    assert ran.error == message
    assert (ran.code, ran.out) == (code, "")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced(run, tmp_path):
    (tmp_path / "schedule.json").write_text("mine")
    ran = run(*TUNE, "--min-accuracy", "-1")
    assert ran.code == 3
    assert ran.error == "schedule.json exists; give another file, or --force to replace it"
    assert (tmp_path / "schedule.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"format": 1, "model": "vit_b16", "schedule": [8] * 6},
            "schedule file s.json is for vit_b16, not for vit_digits; tune vit_digits, or give the "
            "numbers themselves: --schedule 8,8,8,8,8,8",
        ),
        (
            {"format": 1, "model": "vit_digits", "schedule": [8] * 7},
            "schedule file s.json has 7 layers; vit_digits has 6, tune it again",
        ),
        (
            {"format": 1, "model": "vit_digits", "schedule": [8] * 5},
            "schedule file s.json has 5 layers; vit_digits has 6, tune it again",
        ),
        (
            {"format": 1, "model": "vit_digits", "schedule": [8, 500, 8, 8, 8, 8]},
            "schedule file s.json merges 500 tokens in layer 1, where vit_digits can merge 28; "
            "tune it again, or give a list with --schedule, which is cut to what is possible",
        ),
        (
            {"format": 1, "model": "vit_digits", "schedule": [8] * 6, "tokens_in": 197},
            "schedule file s.json is for 197 tokens; vit_digits has 65 here, tune it again at this "
            "image size",
        ),
    ],
)
def test_build_refuses_the_file_of_another_model(values, message, run, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(values))
    ran = run(*BUILD, "--schedule", "s.json")
    assert (ran.code, ran.error) == (3, message)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_tune_then_build(run, tmp_path):
    ran = run(*TUNE, "--min-accuracy", "-2", "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    written = json.loads((tmp_path / "schedule.json").read_text())
    assert found == {"file": "schedule.json", **written}
    assert read_search(tmp_path / "schedule.json").model_dump(mode="json") == written
    assert written["objective"]["kind"] == "min-accuracy"
    assert written["objective"]["metric"] == "top1"
    assert written["images"] == 64
    assert written["data"]["search"] == written["data"]["validation"] == 32
    assert written["data"]["held_out"] == 0
    assert written["found"]["estimate"]["on"] == "validation"
    assert written["tokens_in"] == 65
    assert len(written["weights"]["state_sha256"]) == 64
    # At most one of 64 may be lost; the best constant r is never better.
    assert written["found"]["correct"] >= written["unmerged"]["correct"] - 1
    assert written["found"]["macs"] < written["unmerged"]["macs"]
    assert written["found"]["macs"] <= written["best_constant"]["macs"]
    assert [row["schedule"] for row in written["front"] if row["chosen"]] == [written["schedule"]]
    built = run(*BUILD, "--schedule", "schedule.json")
    assert built.code == 0, built.err
    assert (tmp_path / "out/schedule.json").read_bytes() == (
        tmp_path / "schedule.json"
    ).read_bytes()
    manifest = json.loads((tmp_path / "out/build.json").read_text())
    assert manifest["merge"]["r"] == written["schedule"]
    assert manifest["macs"]["merged"] == written["found"]["macs"]
    assert "schedule.json" in manifest["files"]


def test_a_latency_is_met_and_measured(run, tmp_path):
    tune = ("tune", "vit_digits", "--limit", "64", "--time-limit", "5", "--batch", "2")
    ran = run(*tune, "--target-latency-ms", "1000", "--json")
    assert ran.code == 0, ran.err
    written = json.loads((tmp_path / "schedule.json").read_text())
    found, table = written["found"], written["cost_table"]
    assert 0 < found["latency_ms"] <= 1000
    assert 0 < found["predicted_latency_ms"] <= 1000
    assert written["unmerged"]["latency_ms"] > 0
    assert (table["batch"], table["precision"], table["unit"]) == (2, "fp32", "ms")
    assert table["measurements"] >= 2
    assert all(row["latency_ms"] > 0 for row in written["front"])
    # Nothing is as right and does less damage among what was looked at.
    assert found["accuracy"] == max(row["accuracy"] for row in written["front"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            ("--target-latency-ms", "0.001"),
            "target is latency of at most 0.001 ms; merging all that can be in every layer takes ",
        ),
        (
            ("--target-macs", "1%"),
            "target is at most 1 % of the unmerged model's MACs; merging all",
        ),
    ],
)
def test_what_nothing_can_meet_is_refused_before_images_are_classified(run, target, message):
    ran = run("tune", "vit_digits", *target, "--time-limit", "3")
    assert (ran.code, ran.error[: len(message)]) == (3, message)
    assert "Measure the unmerged model" not in ran.err


def test_a_time_limit_ends_what_cannot_be_met(run, tmp_path, monkeypatch):
    for module in (tune_images, tune_score):
        monkeypatch.setattr(module, "FEWEST", 400)  # the fewest there are can be met on
    ran = run("tune", "vit_digits", "--min-accuracy", "100", "--time-limit", "0.2")
    assert ran.code == 3
    start = (
        "no schedule was found for the target, accuracy of at least 100 %; the time limit of 0.2 s "
        "was reached, the best that was found has "
    )
    assert ran.error.startswith(start)
    assert list(tmp_path.iterdir()) == []


def test_flat_images_are_tuned_for_agreement(run, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for index in range(5):
        pixels = rng.integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"mine/{index}.png")
    (tmp_path / "mine/broken\nname.png").write_bytes(b"no image")
    ran = run(*TUNE, "--target-macs", "60%", "--data", "mine")
    assert ran.code == 0, ran.err
    written = json.loads((tmp_path / "schedule.json").read_text())
    assert written["objective"]["metric"] == "agreement"
    assert (written["images"], written["data"]["unreadable_count"]) == (5, 1)
    assert written["found"]["validation_accuracy"] is None
    assert written["found"]["estimate"] is None
    assert written["found"]["macs"] <= 0.6 * written["unmerged"]["macs"]
    assert "Agreement" in ran.out
    assert "Note: 5 images are few" in ran.out
    (note,) = [line for line in ran.out.splitlines() if "1 images could not be read" in line]
    assert note.endswith(")")


def test_build_tells_of_other_weights_than_those_of_the_search(run, tmp_path):
    values = {"format": 1, "model": "vit_digits", "schedule": [8] * 6, "tokens_in": 65}
    values["weights"] = {"state_sha256": "00"}
    (tmp_path / "s.json").write_text(json.dumps(values))
    note = (
        "s.json was found with other weights: its accuracy is not that of this model, tune again "
        "to know\n"
    )
    assert note in run(*BUILD, "--no-check", "--schedule", "s.json").err
    manifest = json.loads((tmp_path / "out/build.json").read_text())
    digest = manifest["model"]["weights"]["state_sha256"]
    values["weights"] = {"state_sha256": digest}
    (tmp_path / "s.json").write_text(json.dumps(values))
    assert "other weights" not in run(*BUILD, "--no-check", "--schedule", "s.json", "--force").err
