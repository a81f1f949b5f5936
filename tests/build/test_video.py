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
from video_reference import stop as stop_reference
from video_towers import MERGING, clip4clip, groups, schedule, stop, videos

import tome_export
from tome_export.artifact import Artifact
from tome_export.bench.main import BenchRequest, bench
from tome_export.build import BuildRequest, build
from tome_export.data.preprocess import load_videos
from tome_export.data.samples import moving_samples
from tome_export.errors import InputError
from tome_export.merge.plan import Across
from tome_export.merge.schedule import Schedule
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.onnx.files import load
from tome_export.onnx.plugin import merging_of
from tome_export.onnx.twin import twin_from_model
from tome_export.parity.main import CheckRequest, OverMergedError, check
from tome_export.plugins.match import contract
from tome_export.predict import PredictRequest, predict
from tome_export.report.main import ReportRequest, report
from tome_export.runtime.merge_maps import chosen_plans, merge_maps
from tome_export.runtime.model import reference_model
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import INPUT_NAME, BatchRange
from tome_export.video.options import VideoOptions
from tome_export.visualize.main import InspectRequest, inspect

OWN = "from video_towers import clip4clip, stop\n"
BATCH = BatchRange(1, 2, 4)


def made(folder, **changes):
    plain = BuildRequest(
        "own_video:clip4clip",
        folder,
        Schedule(3),
        video=VideoOptions(merging=MERGING),
        engine="none",
        batch=BATCH,
    )
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    (folder / "own_video.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield build(made(folder / "built", source_map=True))


def test_the_manifest_says_how_frames_are_joined(artifact):
    manifest = json.loads((artifact.path / "build.json").read_text())
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


def test_load_and_predict_take_video_files(artifact, tmp_path):
    pytest.importorskip("av", reason="the video extra is not installed")
    paths = [write_video(tmp_path / f"{frames}.mp4", frames) for frames in (8, 20)]
    pixels = load_videos(paths, artifact.manifest.preprocessing, 8)
    with tome_export.load(artifact.path) as model:
        expected = model.run(pixels, video_mask=np.ones((2, 8), np.float32))["video_features"]
        np.testing.assert_allclose(model(paths).features, expected, atol=1e-5)
        with pytest.raises(InputError, match=r"^video 1 is an array uint8 \[9, 9, 3\]; the model "):
            model(np.zeros((9, 9, 3), np.uint8))
    write_video(tmp_path / "short.mp4", 3)
    output = tmp_path / "features.npy"
    images = (paths[0], tmp_path / "short.mp4", paths[1])
    result = predict(PredictRequest(artifact.path, images, output=output))
    np.testing.assert_allclose(np.load(output)[[0, 2]], expected, atol=1e-5)
    assert np.isnan(np.load(output)[1]).all()
    (failed,) = result.failed
    assert failed.reason == (
        "has 3 frames; expected 8 or more, give a longer one or take fewer frames"
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png is no video, and the model takes videos$"):
        predict(PredictRequest(artifact.path, (tmp_path / "a.png",)))


def test_frames_in_uint8_are_those_of_float32(artifact, tmp_path, monkeypatch):
    """Features, and pictures too, of videos ``[B, F, H, W, C]``."""
    pytest.importorskip("av", reason="the video extra is not installed")
    monkeypatch.chdir(artifact.path.parent)
    raw = build(made(tmp_path / "raw", input="uint8"))
    assert raw.manifest.parity.defects == 0
    assert raw.manifest.input.shape == ("batch", 8, 32, 32, 3)
    video = write_video(tmp_path / "a.mp4", 9)
    found = []
    for one in (raw, artifact):
        with tome_export.load(one.path) as model:
            found.append(model(video).features)
    np.testing.assert_array_equal(*found)
    (ours,), (theirs,) = (merge_maps(one, [video]) for one in (raw, artifact))
    np.testing.assert_array_equal(ours.image, theirs.image)
    np.testing.assert_array_equal(ours.layers[-1].ids, theirs.layers[-1].ids)


@pytest.fixture(scope="module", params=["clip4clip", "stop"])
def judged(request, artifact, tmp_path_factory):
    """A tower's artifact, videos for it, their mask, and the independent reading of them."""
    pixels, _ = videos(3)
    mask = torch.ones(3, 8)
    mask[1, 5:] = 0
    mask[2] = 0  # its denominator is 1
    m = Merging(3, (1, 2), (2, 2))
    if request.param == "clip4clip":
        expected, records = tempme(clip4clip().state_dict(), pixels, mask, m)
        return artifact, pixels.numpy(), {"video_mask": mask.numpy()}, expected.numpy(), records
    folder = tmp_path_factory.mktemp("stop")
    (folder / "own_video.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        built = build(made(folder / "built", model="own_video:stop", check=False))
    expected, records = stop_reference(stop().state_dict(), pixels, m)
    return built, pixels.numpy(), {}, expected.numpy(), records


def test_onnx_runtime_gives_the_references_features(judged):
    artifact, pixels, further, expected, _ = judged
    with OrtRunner(load(artifact.model_path)) as runner:
        output = runner.infer({INPUT_NAME: pixels, **further})["video_features"]
    assert np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_graph_makes_the_references_plans(judged):
    artifact, pixels, further, _, records = judged
    twin = twin_from_model(load(artifact.model_path))
    with OrtRunner(twin.model) as runner:
        plans = chosen_plans(twin, runner, pixels, BatchRange(1, 2, 4), further)
    assert list(plans) == [Across(r.layer) if r.cross else r.layer for r in records]
    for plan, record in zip(plans.values(), records, strict=True):
        expected = [clip for of_video in record.groups for clip in of_video]
        chosen = (plan.keep, plan.src, plan.dst)
        assert [groups(chosen, row) for row in range(len(plan.keep))] == expected


def test_masked_frames_are_left_out_of_the_mean(artifact):
    pixels = videos(1)[0].numpy()
    with OrtRunner(load(artifact.model_path)) as runner:

        def features(*counted):
            mask = np.zeros((1, 8), np.float32)
            mask[0, list(counted)] = 1
            return runner.infer({INPUT_NAME: pixels, "video_mask": mask})["video_features"]

        single = [features(frame) for frame in range(8)]
        some, every = features(0, 1, 2, 3, 4), features(*range(8))
    np.testing.assert_allclose(some, np.mean(single[:5], axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(every, np.mean(single, axis=0), rtol=0, atol=1e-6)
    assert np.abs(some - every).max() > 1e-3 * np.abs(every).max()
    # Each frame has a feature of its own, so that a mask of the wrong frames shows.
    assert min(np.abs(one - single[0]).max() for one in single[1:]) > 1e-4


def test_both_kinds_of_merge_are_one_operator_that_the_kernels_take(artifact, tmp_path):
    path = tmp_path / "model.onnx"
    options = ExportOptions(plugin=True)
    onnx_from_model(reference_model(artifact)[0], path, options, "video_features")
    model = load(path)
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
    assert tuple(layer.total_out for layer in model.layers) == artifact.manifest.tokens


def test_check_takes_the_users_videos(artifact, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(2):
        write_video(folder / f"{index}.mp4", 9 + index)
    result = check(CheckRequest(artifact.path, images=folder))
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


def test_an_entropy_is_of_the_patches_of_all_frames(artifact):
    result = check(CheckRequest(artifact.path, min_entropy=1))
    found = result.entropy
    assert found.patches == 8 * 16
    pixels = moving_samples(artifact.manifest.preprocessing, 8, 8)
    with OrtRunner(load(artifact.model_path)) as runner:
        given = {INPUT_NAME: pixels, "video_mask": np.ones((8, 8), np.float32)}
        places = runner.infer(given)["source_map"]
    # exp(H) of the sizes of the final tokens, and no word of normalising.
    shares = [np.bincount(video) / 128 for video in places]
    tokens = [np.exp(-sum(p * np.log(p) for p in share if p)) for share in shares]
    assert found.tokens(found.least) == pytest.approx(min(tokens))
    assert found.tokens(found.median) == pytest.approx(np.exp(np.median(np.log(tokens))), rel=1e-6)
    assert str(OverMergedError(found, 8, result.reports[0].subject)).startswith(
        "over-merged: 8 of 8 videos have a token-size entropy under 1 (128.0 effective tokens of "
        "128), the least "
    )


@pytest.mark.parametrize("model", ["own_video:clip4clip", "own_video:stop"])
def test_half_precision_is_explained_and_an_engine_builds(tmp_path, monkeypatch, model):
    (tmp_path / "own_video.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    engine = _engine()
    built = build(made(tmp_path / "half", model=model, precision="fp16", engine=engine))
    parity = built.manifest.parity
    assert (parity.passed, parity.defects) == (True, 0)
    if engine != "none":
        assert built.manifest.engines[engine].batch == BatchRange(1, 2, 4)


def _engine():
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return "none"
    return "tensorrt-rtx"


def test_a_fixed_batch_and_plain_tome(tmp_path, monkeypatch):
    (tmp_path / "own_video.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    fixed = BatchRange(2, 2, 2)
    built = build(made(tmp_path / "plain", video=VideoOptions(), batch=fixed))
    assert built.manifest.video == VideoOptions(8)
    assert built.manifest.tokens == (112, 88, 64, 40)
    assert built.manifest.parity.passed


def test_bench_times_it_beside_the_unmerged_tower(artifact):
    asked = BenchRequest(artifact.path, backends=("ort-cpu",), rounds=2, warmup=0)
    found = bench(replace(asked, batches=(1,), profile=False)).bench
    assert [row.backend for row in found.rows] == ["ort-cpu"]
    assert found.rows[0].merged.peak_memory_bytes > 0
    assert found.images == "samples"
    assert found.macs_ratio == artifact.manifest.macs.ratio


def test_pictures_show_groups_across_frames(artifact, tmp_path):
    video = write_video(tmp_path / "grey.mp4", 16)
    result = inspect(InspectRequest(artifact.path, (video,), layer="all", output=tmp_path / "out"))
    assert [picture.tokens for picture in result.pictures] == [112, 72, 48, 44]
    assert (result.grid.rows, result.grid.cols) == (8, 16)
    with Image.open(tmp_path / "out" / result.pictures[-1].file) as image:
        assert image.size[0] / image.size[1] == result.grid.cols / result.grid.rows
    pixels = load_videos([video], artifact.manifest.preprocessing, 8)
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


def test_a_damaged_manifest_is_refused(artifact, tmp_path):
    import shutil

    copy = shutil.copytree(artifact.path, tmp_path / "copy")
    manifest = json.loads((copy / "build.json").read_text())
    manifest["layers"][1]["cross"] = 7
    manifest["layers"][1]["tokens_out"] = 19
    (copy / "build.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"has layers\[1\] of .* to 19, which does not fit merge"):
        Artifact.open(copy)


def test_the_tower_of_the_artifact_is_schedules(artifact):
    model, _ = reference_model(artifact)
    assert model.settings.schedule.frames == schedule().frames
