"""What ``eval`` really writes, of every kind of model and image, is read and shown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tome_export.artifact import Artifact
from tome_export.artifact.evaluation import Evaluation
from tome_export.data.labels import Classes
from tome_export.data.source import samples_source
from tome_export.evaluate.candidates import Candidate
from tome_export.evaluate.measures import Comparison, evaluation_from_table
from tome_export.evaluate.records import TOP, Record, RecordTable
from tome_export.report.page import Content, render
from tome_export.runtime.model import ArtifactModel
from tome_export.spec import BatchRange

IMAGES = 40
NAMES = (("merged", 4, "ort-cpu"), ("unmerged", 0, "ort-cpu"), ("torch", 4, "torch"))


def evaluation_of(kind: str, broken: int = 0, against: tuple[str, ...] = ("unmerged", "torch")):
    """An evaluation as ``evaluate`` makes it, but for who ran.

    Args:
        kind: ``labelled``, ``unlabelled`` or ``features``.
        broken: Images for which the merged model gave no finite numbers.
        against: Candidates besides the merged one.
    """
    about = {"label": "x", "precision": "fp32", "output_name": "logits"}
    subject = ArtifactModel(**about, folder=Path("x"), batch=BatchRange(1, 1, 1))
    candidates = [
        Candidate(name, (r,) * 6, backend, 13_000_000 + 2_000_000 * (4 - r), subject)
        for name, r, backend in NAMES
        if name == "merged" or name in against
    ]
    classes = None if kind == "features" else Classes(10)
    runs = list(dict.fromkeys(one.run for one in candidates))
    table = RecordTable(IMAGES, IMAGES)
    labels = np.arange(IMAGES, dtype=np.int32) % 10
    values = {}
    for n, run in enumerate(runs):
        if classes is None:
            found = np.linspace(0.9, 1, IMAGES)[:, None]
            found[:broken] = np.nan if n == 0 else found[:broken]
        else:
            found = (labels[:, None] + np.arange(TOP, dtype=np.int32)) % 10
            found[: 3 - n] += 1
            found[:broken] = -1 if n == 0 else found[:broken]
        values[run] = found
    table.add(Record(0, ((IMAGES - 1, "bad.png", "cut short"),), values_without_last(values)))
    source = samples_source(np.zeros((IMAGES, 1, 8, 8), np.float32), labels)
    known = labels if kind == "labelled" else None
    comparison = Comparison(
        candidates, classes, classes and "softmax", "classes" if classes else "features"
    )
    return evaluation_from_table(table, source, known, comparison)


def values_without_last(values):
    return {run: found[:-1] for run, found in values.items()}


def page_of(built: Path, tmp_path: Path, evaluation: Evaluation) -> str:
    """The words of the page with this evaluation, written and read as a command does."""
    file = tmp_path / "eval.json"
    file.write_bytes(evaluation.json_bytes())
    found = Evaluation.read(file)
    assert found == evaluation
    text = render(Content("x", Artifact.open(built).manifest, evaluation=found))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


SHOWN = {
    "labelled": (
        "labelled",
        ("Top-1, change by merging", "top-1 accuracy (%)", "change, points", "as unmerged"),
        ("cosine", "not finite"),
    ),
    "unlabelled": (
        "unlabelled",
        ("As the unmerged model 97.44 % of 39 images", "They have no labels:", "as unmerged"),
        ("top-1", "change, points", "cosine"),
    ),
    "features": (
        "features",
        ("Cosine to unmerged 0.9487 mean of 39 images, smallest 0.9000", "cosine, mean"),
        ("top-1", "as unmerged"),
    ),
}


@pytest.mark.parametrize(("kind", "said", "unsaid"), SHOWN.values(), ids=SHOWN)
def test_what_an_evaluation_found_is_shown(built, tmp_path, kind, said, unsaid):
    words = page_of(built, tmp_path, evaluation_of(kind))
    accuracy = words[words.index("On 39 images of") :]
    for expected in said:
        assert expected in words, expected
    for unexpected in unsaid:
        assert unexpected not in accuracy, unexpected
    assert "Left out, as they could not be read: 1 image." in accuracy


def test_a_change_has_its_paired_interval(built, tmp_path):
    values = evaluation_of("labelled")
    found = values.candidates[0].difference_to_unmerged
    low, high = (f"{100 * x:+.2f}".replace("-", "\u2212") for x in (found.low, found.high))
    assert found.share < 0
    words = page_of(built, tmp_path, values)
    assert words.count(f"\u22122.56 ({low} to {high})") >= 1  # in the table
    assert f"points ({low} to {high}), to 92.31 % on 39 images" in words


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "features"])
def test_outputs_that_are_not_finite_cannot_be_overlooked(built, tmp_path, kind):
    words = page_of(built, tmp_path, evaluation_of(kind, broken=7))
    assert "Outputs of the merged model 7 NOT FINITE of 39 images without finite numbers" in words
    assert "merged on ort-cpu gave no finite numbers for 7 images." in words
    assert "not finite" in words


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "features"])
def test_a_model_that_gives_no_numbers_at_all_has_a_page(built, tmp_path, kind):
    values = evaluation_of(kind, broken=IMAGES, against=())
    assert "39 NOT FINITE" in page_of(built, tmp_path, values)


def test_neither_labels_nor_a_model_to_compare_with(built, tmp_path):
    words = page_of(built, tmp_path, evaluation_of("unlabelled", against=("torch",)))
    assert "Accuracy not known 39 images without labels" in words
    assert "no other model was run to compare with" in words
    assert "merged ort-cpu 13.00 MMACs" in words
