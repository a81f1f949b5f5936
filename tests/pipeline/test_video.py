"""A video tower from its maker to the artifact, its checks, its pictures and its figures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from video_files import write_video
from video_reference import Merging, tempme
from video_towers import MERGING, clip4clip, schedule

from tome_export.artifact import Artifact
from tome_export.engine import EngineOptions
from tome_export.errors import InputError
from tome_export.merge.frames import VideoOptions
from tome_export.merge.schedule import Schedule
from tome_export.models.video import load_videos, moving_samples
from tome_export.onnx.files import load
from tome_export.onnx.merging import merging_of
from tome_export.pipeline import BuildRequest, build
from tome_export.pipeline.bench import BenchRequest, bench
from tome_export.pipeline.check import CheckRequest, check
from tome_export.pipeline.inspect import InspectRequest, inspect, merge_maps
from tome_export.pipeline.reference import reference_model
from tome_export.pipeline.report import ReportRequest, report
from tome_export.plugins.match import contract
from tome_export.spec import BatchRange, Preprocessing

OWN = "from video_towers import clip4clip, stop\n"
BATCH = EngineOptions(batch=BatchRange(1, 2, 4))


def request(folder, **changes):
    made = BuildRequest(
        "own_video:clip4clip",
        folder,
        Schedule(3),
        video=VideoOptions(merging=MERGING),
        engine="none",
        engine_options=BATCH,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    (folder / "own_video.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield build(request(folder / "built", source_map=True))


def test_the_manifest_says_how_frames_are_joined(artifact):
    manifest = artifact.manifest
    assert manifest["video"] == {
        "frames": 8,
        "merging": {
            "layers": [1, 2],
            "frames": [2, 2],
            "proportions": [30, 10],
            "position": True,
        },
    }
    assert (manifest["tokens_in"], manifest["tokens"]) == (136, [112, 72, 48, 44])
    shapes = {i["name"]: i["shape"] for i in manifest["inputs"]}
    assert shapes == {"pixel_values": ["batch", 8, 3, 32, 32], "video_mask": ["batch", 8]}
    assert manifest["output"] == {
        "name": "video_features",
        "dtype": "float32",
        "shape": ["batch", 24],
    }
    assert manifest["preprocessing"]["input_size"] == [3, 32, 32]
    assert manifest["layers"][1] | {"macs": 0, "macs_unmerged": 0} == {
        "tokens_in": 14,
        "r": 2,
        "tokens_out": 18,
        "behind_block": False,
        "clips": 4,
        "joined": 2,
        "cross": 8,
        "prefix": 2,
        "macs": 0,
        "macs_unmerged": 0,
    }
    assert manifest["merge"]["schedule"] == ("r=3 constant; layers 1,2 join 2,2 clips, 30,10 %")
    assert sum(layer["macs"] for layer in manifest["layers"]) < manifest["macs"]["merged"]
    assert manifest["parity"]["passed"]


def test_onnx_runtime_gives_the_references_features(artifact):
    pixels = moving_samples(Preprocessing.from_dict(artifact.manifest["preprocessing"]), 3, 8)
    mask = np.ones((3, 8), np.float32)
    mask[1, 5:] = 0
    session = onnxruntime.InferenceSession(
        str(artifact.model_path), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"pixel_values": pixels, "video_mask": mask})[0]
    m = Merging(3, (1, 2), (2, 2))
    state = clip4clip().state_dict()
    expected, _ = tempme(state, torch.from_numpy(pixels), torch.from_numpy(mask), m)
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * np.abs(expected.numpy()).max()
    hidden = pixels.copy()
    hidden[1, 5:] = 0
    again = session.run(None, {"pixel_values": hidden, "video_mask": mask})[0]
    assert np.array_equal(again[0], found[0])


def test_both_kinds_of_merge_are_one_operator_that_the_kernels_take(artifact):
    model = load(artifact.model_path)
    merging = merging_of(model)
    assert [shape.tokens for shape in merging.matches] == [17, 28, 20, 36, 26, 24]
    assert all(contract.refusal(*shape) is None for shape in merging.matches)
    assert len(merging.merges) == 6
    names = [node.name for node in model.graph.node if node.op_type == "TomeMatch"]
    assert names == [
        f"blocks.{place}.match" for place in ("0", "1.across", "1", "2.across", "2", "3")
    ]
    assert {f.name for f in model.functions} == {"TomeMatch", "TomeMerge"}


def test_the_reference_model_comes_back(artifact):
    model, recipe = reference_model(artifact)
    assert recipe.video.merging == MERGING
    assert model.layers == reference_model(artifact)[0].layers
    assert [layer.total_out for layer in model.layers] == artifact.manifest["tokens"]


def test_check_takes_the_users_videos(artifact, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for index in range(2):
        write_video(videos / f"{index}.mp4", 9 + index)
    result = check(CheckRequest(artifact.path, images=videos))
    (found,) = result.reports
    assert (found.passed, found.images, found.source_map_defects) == (True, 2, 0)
    assert [(layer.layer, layer.across) for layer in found.layers] == [
        (0, False),
        (1, True),
        (1, False),
        (2, True),
        (2, False),
        (3, False),
    ]
    assert found.decisions == 2 * (8 * 8 + 4 * 13 + 4 * 9 + 2 * 16 + 2 * 11 + 2 * 10)


@pytest.mark.parametrize("model", ["own_video:clip4clip", "own_video:stop"])
def test_half_precision_is_explained_and_an_engine_builds(tmp_path, monkeypatch, model):
    (tmp_path / "own_video.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    engine = _engine()
    built = build(request(tmp_path / "half", model=model, precision="fp16", engine=engine))
    parity = built.manifest["parity"]
    assert (parity["passed"], parity["defects"]) == (True, 0)
    if engine != "none":
        assert built.manifest["engines"][engine]["batch"] == "1:2:4"


def _engine():
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return "none"
    return "tensorrt-rtx"


def test_a_fixed_batch_and_plain_tome(tmp_path, monkeypatch):
    (tmp_path / "own_video.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    fixed = EngineOptions(batch=BatchRange(2, 2, 2))
    built = build(request(tmp_path / "plain", video=VideoOptions(), engine_options=fixed))
    assert built.manifest["video"] == {"frames": 8, "merging": None}
    assert built.manifest["tokens"] == [112, 88, 64, 40]
    assert built.manifest["parity"]["passed"]


def test_bench_times_it_beside_the_unmerged_tower(artifact):
    made = BenchRequest(artifact.path, backends=("ort-cpu",), rounds=2, warmup=0)
    found = bench(replace(made, batches=(1,), profile=False)).bench
    assert [row["backend"] for row in found["rows"]] == ["ort-cpu"]
    assert found["rows"][0]["merged"]["peak_memory_bytes"] > 0
    assert found["images"] == "samples"
    assert found["macs_ratio"] == artifact.manifest["macs"]["ratio"]


def test_pictures_show_groups_across_frames(artifact, tmp_path):
    video = write_video(tmp_path / "grey.mp4", 16)
    result = inspect(InspectRequest(artifact.path, (video,), layer="all", output=tmp_path / "out"))
    assert [picture.tokens for picture in result.pictures] == [112, 72, 48, 44]
    assert (result.grid.rows, result.grid.cols) == (8, 16)
    with Image.open(tmp_path / "out" / result.pictures[-1].file) as image:
        assert image.size[0] / image.size[1] == result.grid.cols / result.grid.rows
    pixels = load_videos([video], Preprocessing.from_dict(artifact.manifest["preprocessing"]), 8)
    (found,) = merge_maps(artifact, pixels)
    session = onnxruntime.InferenceSession(
        str(artifact.model_path), providers=["CPUExecutionProvider"]
    )
    ones = np.ones((1, 8), np.float32)
    (final,) = session.run(["source_map"], {"pixel_values": pixels, "video_mask": ones})[0]
    ids = found.layers[-1].ids
    # Frame f lies in row f // 4, column f % 4 of the picture.
    frames = [ids[4 * (f // 4) :, 4 * (f % 4) :][:4, :4].ravel() for f in range(8)]
    groups = np.concatenate(frames)
    assert len(set(zip(groups.tolist(), final.tolist(), strict=True))) == len(set(final.tolist()))
    assert len(set(groups.tolist())) == len(set(final.tolist()))
    assert set(frames[0].tolist()) & set(frames[1].tolist())


def test_report_shows_a_video(artifact, tmp_path):
    video = write_video(tmp_path / "grey.mp4", 8)
    page = tmp_path / "page.html"
    report(ReportRequest(artifact.path, images=(video,), samples=1, output=page))
    text = page.read_text()
    assert "136 tokens enter the first layer, 44 tokens leave the last" in text
    assert "grey.mp4" in text
    assert "astronaut, moving" in text


def test_a_damaged_manifest_is_refused_by_inspect(artifact, tmp_path):
    import shutil

    copy = shutil.copytree(artifact.path, tmp_path / "copy")
    manifest = json.loads((copy / "build.json").read_text())
    manifest["layers"][1]["cross"] = 7
    manifest["layers"][1]["tokens_out"] = 19
    (copy / "build.json").write_text(json.dumps(manifest))
    video = write_video(tmp_path / "grey.mp4", 8)
    with pytest.raises(InputError, match=r"merges other tokens than its build\.json says"):
        merge_maps(Artifact.open(copy), [video])


def test_the_tower_of_the_artifact_is_schedules(artifact):
    model, _ = reference_model(artifact)
    assert model.settings.schedule.frames == schedule().frames
