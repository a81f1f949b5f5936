"""The page as text: one file, valid, escaped, complete, and small."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from layers import layers_of
from PIL import Image
from results import tower_report

from tome_export.artifact import Artifact
from tome_export.artifact.document import Part
from tome_export.artifact.manifest import FileRecord
from tome_export.artifact.schedule import TunedSchedule
from tome_export.data.samples import sample_paths
from tome_export.report.commands import reproducing_commands
from tome_export.report.main import MOST_PICTURES, ReportRequest, report
from tome_export.report.page import MOST_BYTES, Content, render
from tome_export.runtime.merge_maps import (
    LayerGroups,
    MergeMap,
    Plans,
    groups_by_layer,
    layers_from_positions,
)
from tome_export.spec import BatchRange, PatchGrid


def changed(part: Part, changes: dict) -> Part:
    """A part of a document with other values, inner parts by theirs."""
    inner = {
        name: changed(getattr(part, name), value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(getattr(part, name), Part)
    }
    return part.model_copy(update={**changes, **inner})


VOID = {"meta", "link", "img", "input", "br"}


class Parsed(HTMLParser):
    """A page's elements; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(page):
    """The page with every section, as text."""
    return page.read_text(encoding="utf-8")


def test_it_is_one_file_that_loads_nothing(text):
    parsed = Parsed(text)
    for _, attrs in parsed.elements:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("data:", "#"))
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    policy = next(m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(text.encode()) < MOST_BYTES


def test_ids_are_unique_and_all_that_are_referred_to_exist(text):
    ids = [attrs["id"] for _, attrs in Parsed(text).elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert wanted
    assert wanted <= set(ids)


def test_what_others_wrote_is_escaped(text):
    tags = [name for name, _ in Parsed(text).elements]
    assert tags.count("script") == 2  # the pictures' data, and ours
    assert "onerror=" in text  # as text:
    assert all("onerror" not in attrs for _, attrs in Parsed(text).elements)
    assert "&lt;script&gt;alert(1)" in text
    assert "b" not in tags


def test_a_hostile_manifest_is_escaped(built):
    manifest = Artifact.open(built).manifest
    evil = "</title><script>alert('$x$')</script>\u4e2d"
    weights = {"kind": "file", "source": evil, "seed": None, "state_sha256": evil}
    changes = {
        "model": {"name": evil, "description": evil, "weights": weights},
        "engine_note": evil,
    }
    manifest = changed(manifest, changes)
    manifest.files[evil] = FileRecord(bytes=1, sha256=evil)
    text = render(Content(evil, manifest))
    assert [name for name, _ in Parsed(text).elements].count("script") == 1
    assert evil not in text


def test_the_same_artifact_gives_the_same_page(full, text, tmp_path):
    output = tmp_path / "again.html"
    assert report(ReportRequest(full, output=output)).missing == {}
    assert output.read_text(encoding="utf-8") == text


def test_it_says_what_was_found(text):
    words = re.sub(r"<[^>]+>", "", text)
    for expected in (
        "Parity with PyTorch",
        "FAILED",
        "1.36\u20131.66\u00d7",
        "\u22120.89",
        "2 of 3 are listed",
        "DEFECT: rounding cannot",
        "rounding can overturn it",
        "Matching and merging take 11.7 % of it.",
        "20 schedules for min-accuracy 0.97",
        "Left out, as they could not be read: 1 image.",
    ):
        assert expected in words, expected


def test_a_search_by_similarity_is_shown(built):
    schedule = TunedSchedule.model_validate_json(json.dumps(tower_report()))
    text = render(Content("x", Artifact.open(built).manifest, schedule=schedule))
    words = " ".join(re.sub(r"<[^>]+>", "", text).split())
    for expected in (
        "20 schedules for min-similarity 0.97, measured by similarity to the unmerged model on",
        "On 150 images (held out) its mean similarity is 0.9731 (0.9702\u20130.9755), the lowest "
        "0.8803; that of the best constant r is 0.9711.",
        "0.9744",
    ):
        assert expected in words, expected


def test_sections_without_data_name_the_command(built, tmp_path):
    output = tmp_path / "page.html"
    result = report(ReportRequest(built, output=output, samples=0))
    text = output.read_text(encoding="utf-8")
    assert result.missing == {
        "Latency and throughput": "tome-export bench digits",
        "Accuracy": "tome-export eval digits --data FOLDER",
        "Pareto front": "tome-export tune vit_digits",
    }
    for command in result.missing.values():
        assert f"<code>{command}</code>" in text
    assert "No pictures: none were asked for" in text
    assert "RANDOM WEIGHTS" not in text
    assert Artifact.open(built).manifest.files.keys() == {"model.onnx", "parity.json"}


def test_random_weights_are_not_overlooked(built):
    manifest = changed(Artifact.open(built).manifest, {"model": {"random_weights": True}})
    assert "<strong>RANDOM WEIGHTS</strong>" in render(Content("x", manifest))


BUILD = "--prop-attn --batch 1:8:32 --merge-op matmul --attention fused --engine none"

MANIFESTS = {
    "as built": ({}, f"build vit_digits --r 8 --fp16 {BUILD} -o x"),
    "inflected": (
        {"merge": {"schedule": "r=8 decreasing"}},
        f"build vit_digits --r 8 --schedule decreasing --fp16 {BUILD} -o x",
    ),
    "listed": (
        {"merge": {"schedule": "8,4", "r": (8, 4, 0, 0, 0, 0)}},
        f"build vit_digits --schedule 8,4,0,0,0,0 --fp16 {BUILD} -o x",
    ),
    "random": (
        {"model": {"weights": {"kind": "random", "source": "random, seed 3", "seed": 3}}},
        f"build vit_digits --r 8 --fp16 --weights random --seed 3 {BUILD} -o x",
    ),
    "file": (
        {"model": {"weights": {"kind": "file", "source": "my model.pth; head dropped"}}},
        f"build vit_digits --r 8 --fp16 --weights 'my model.pth' {BUILD} -o x",
    ),
    "otherwise": (
        {
            "merge": {"prop_attn": False},
            "precision": "bf16",
            "batch": BatchRange(4, 4, 4),
            "parity": None,
        },
        "build vit_digits --r 8 --bf16 --no-prop-attn --batch 4:4:4 --merge-op matmul "
        "--attention fused --engine none --no-check -o x",
    ),
    "plugin for a range": (
        {"merge": {"merge_op": "plugin"}, "onnx": {"attention": "parts"}},
        "build vit_digits --r 8 --fp16 --prop-attn --batch 1:8:32 --merge-op plugin "
        "--plugin-batch-range --attention parts --engine none -o x",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), MANIFESTS.values(), ids=MANIFESTS)
def test_the_build_command_is_that_of_the_manifest(built, changes, expected):
    manifest = changed(Artifact.open(built).manifest, changes)
    first, *_, last = reproducing_commands(manifest, None, None, "x")
    assert first == f"tome-export {expected}"
    assert last == "tome-export report x"


def test_the_build_command_says_what_goes_in_and_comes_out(built):
    manifest = Artifact.open(built).manifest
    manifest = manifest.model_copy(
        update={
            "model": manifest.model.model_copy(update={"image_size": "48x32"}),
            "preprocessing": replace(manifest.preprocessing, form="uint8"),
            "form": manifest.form.model_copy(update={"dense": True, "source_map": True}),
        }
    )
    first = reproducing_commands(manifest, None, None, "x")[0]
    assert "--image-size 48x32 --input uint8 --dense --source-map --fp16" in first


def large(depth: int = 24, side: int = 24, count: int = MOST_PICTURES) -> list[MergeMap]:
    """Photographs of 384 pixels in 577 tokens, merged at random in each of 24 layers."""
    rng = np.random.default_rng(0)
    tokens, plans, left = 1 + side * side, {}, []
    n = tokens
    for layer in range(depth):
        r = 20
        order = np.stack([1 + rng.permutation(n - 1) for _ in range(count)])
        src, keep = order[:, :r], np.concatenate([np.zeros((count, 1), int), order[:, r:]], 1)
        plans[layer] = Plans(keep, src, rng.integers(1, n - r, (count, r)))
        n -= r
        left.append(n)
    positions = groups_by_layer(plans, layers_of((tokens, *left)), count)
    grid = PatchGrid(side, side, 16, 16)
    photographs = [Image.open(path).convert("RGB").resize((384, 384)) for path in sample_paths()]
    images = [np.asarray(photographs[i % len(photographs)]) for i in range(count)]
    layers = [layers_from_positions(one, tuple(left), 1, grid) for one in positions]
    return [MergeMap(i, grid, per) for i, per in zip(images, layers, strict=True)]


def test_a_large_model_on_the_most_images_stays_small(full, text):
    maps = large()
    tokens = [groups.tokens for groups in maps[0].layers]
    layers = layers_of((577, *tokens), 9_000_000_000, 15_000_000_000)
    changes = {"tokens": tuple(tokens), "layers": layers}
    manifest = changed(Artifact.open(full).manifest, changes)
    found = render(Content("x", manifest, maps=maps, names=["image"] * len(maps)))
    # The rest of the page is the same for every model, but for a row per layer.
    assert 1_000_000 < len(found.encode()) < MOST_BYTES - len(text.encode())


@pytest.mark.parametrize(("dropped", "said"), [(-1, True), (7, False)])
def test_dropped_patches_are_explained(built, dropped, said):
    manifest, ids = Artifact.open(built).manifest, np.full((4, 4), 7)
    ids[0, 0] = dropped
    one = MergeMap(
        np.zeros((8, 8, 3), np.uint8), PatchGrid(4, 4, 2, 2), (LayerGroups(0, 6, ids, 0),)
    )
    text = render(Content("x", manifest, maps=[one], names=["a"]))
    assert ("Dropped patches are dark and hatched: nothing is left of them." in text) == said
    assert (", 1 of 16 patches dropped" in text) == said
