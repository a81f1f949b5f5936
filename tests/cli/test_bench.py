"""``tome-export bench``: what it prints and records, and every error a user can cause."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from tome_export.artifact import Artifact
from tome_export.artifact.bench import BENCH, Bench

QUICK = ("--rounds", "2", "--warmup", "0")


@pytest.fixture(scope="module")
def measured(built, tmp_path_factory):
    """A measured copy of ``built``, and its result; any profile is called slow."""
    from tome_export.bench import main as bench

    path = shutil.copytree(built, tmp_path_factory.mktemp("measured") / "artifact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SLOWED", 0.0)
        result = bench.bench(bench.BenchRequest(path, batches=(2,), rounds=2, warmup=0))
    return path, result


def test_a_profile_that_is_slower_than_the_model_is_remarked_on(measured):
    _, result = measured
    profile, row = result.bench.profile[0], result.bench.rows[0]
    for side, note in zip(("merged", "against"), result.bench.notes, strict=True):
        assert note == (
            f"Profiled on ort-cpu at batch 2, the nodes of {side} take "
            f"{getattr(profile, side).total_ms:.2f} ms, a run without the profiler "
            f"{getattr(row, side).latency_ms.p50:.2f} ms: read its parts as shares, or measure "
            "again on a quiet machine"
        )


def test_what_is_recorded(measured):
    path, result = measured
    artifact = Artifact.open(path)
    found = json.loads((path / "bench.json").read_text())
    assert found == result.bench.model_dump(mode="json")
    assert result.unrecorded is None
    assert found["against"] == "unmerged"
    assert found["macs_ratio"] == pytest.approx(artifact.manifest.macs.ratio)
    assert (found["rounds"], found["warmup"], found["images"]) == (2, 0, "samples")
    (row,) = found["rows"]
    assert (row["backend"], row["batch"]) == ("ort-cpu", 2)
    for side in ("merged", "against"):
        latency = row[side]["latency_ms"]
        assert 0 < latency["p20"] <= latency["p50"] <= latency["p80"]
        assert row[side]["throughput"] == pytest.approx(2000 / latency["p50"])
        assert row[side]["peak_memory_bytes"] > 1e6
    share = row["speedup"]["p50"] / found["macs_ratio"]
    assert row["share_of_macs_limit"] == pytest.approx(share)
    (profile,) = found["profile"]
    assert profile["attributed_share"] == 1.0
    assert profile["total_ms"] == pytest.approx(sum(profile["merged"]["groups_ms"].values()))
    assert [layer["layer"] for layer in profile["merged"]["layers"]] == list(range(6))
    assert "match" in profile["merged"]["groups_ms"]
    assert "match" not in profile["against"]["groups_ms"]
    assert {"cpu", "cores", "gpu", "driver", "python", "versions", "date"} <= set(
        found["environment"]
    )


def test_the_router_reads_the_latency_of_one_image(measured):
    """Also where batch 1 was not asked for."""
    path, result = measured
    assert list(result.bench.latency_ms) == ["ort-cpu"]
    assert Bench.read(path / BENCH).latency_ms == result.bench.latency_ms
    assert result.bench.latency_ms["ort-cpu"] > 0


def test_text_and_a_second_run(run, measured):
    path, _ = measured
    ran = run("bench", path, *QUICK, "--batch", "1,1", "--no-profile", "--against", path)
    assert ran.code == 0, ran.err
    assert "backend  batch  merged ms" in ran.out
    assert "Where the time goes" not in ran.out
    found = json.loads((path / "bench.json").read_text())
    assert found["against"] == str(path)
    assert found["macs_ratio"] == 1.0
    assert len(found["rows"]) == 1
    assert found["profile"] == []


CASES = {
    "unknown backend": (
        ("--backend", "cuda"),
        2,
        "backend is 'cuda'; expected one of ort-cpu, ort-cuda, ort-rtx, openvino, tensorrt, "
        "tensorrt-rtx, torch",
    ),
    "a backend twice": (
        ("--backend", "ort-cpu,ort-cpu"),
        2,
        "backend ort-cpu is named twice; name each once",
    ),
    "batch too large": (
        ("--batch", "1,64"),
        3,
        "batch is 64; the model of {path} takes 1 to 32: choose --batch within that",
    ),
    "batch no number": (
        ("--batch", "1,b"),
        2,
        "Invalid value for '--batch': '1,b' is not a list of batch sizes such as 1,8,32; see "
        "'tome-export bench --help'",
    ),
    "no rounds": (("--rounds", "0"), 2, "--rounds is 0; expected 1 or more"),
    "negative warm-up": (("--warmup", "-1"), 2, "--warmup is -1; expected 0 or more"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(run, built, case):
    options, code, message = CASES[case]
    ran = run("bench", built, *options)
    assert (ran.code, ran.error) == (code, message.format(path=built))
    assert ran.out == ""


def test_a_missing_gpu(run, built):
    ran = run("bench", built, "--backend", "ort-cuda")
    assert ran.code == 4
    assert "CUDAExecutionProvider" in ran.error


def test_another_model(run, built, artifact):
    manifest = json.loads((artifact / "build.json").read_text())
    for tensor in (manifest["input"], manifest["inputs"][0]):
        tensor["shape"] = ["batch", 3, 224, 224]
    manifest["preprocessing"].update(input_size=[3, 224, 224], mean=[0.5] * 3, std=[0.5] * 3)
    (artifact / "build.json").write_text(json.dumps(manifest))
    ran = run("bench", built, "--against", artifact)
    assert ran.code == 3
    assert ran.error == (
        f"{artifact} has the input pixel_values float32 [3, 224, 224], {built} has "
        "pixel_values float32 [1, 32, 32]; only models with the same input and output are "
        "comparable"
    )


def test_a_damaged_artifact(run, artifact):
    with (artifact / "model.onnx").open("r+b") as file:
        file.truncate(1000)
    ran = run("bench", artifact)
    assert ran.code == 3
    assert "the file is truncated or was changed" in ran.error


def test_a_model_that_does_not_merge(run, tmp_path):
    """It is measured, as the router wants to know it, and the speed-up is called noise."""
    built = run("build", "vit_digits", "--r", "0", "--engine", "none", "--no-check", "-o", "plain")
    assert built.code == 0, built.err
    ran = run("bench", "plain", *QUICK, "--batch", "1", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["notes"][0] == (
        "This artifact does not merge: it is compared with itself, so the speed-up is noise"
    )
    one = ran.json["rows"][0]["merged"]["latency_ms"]["p50"]
    assert ran.json["latency_ms"] == {"ort-cpu": one}
    assert ran.json["macs_ratio"] == 1.0
    assert ran.json["profile"][0]["merged"]["groups_ms"].keys().isdisjoint({"match", "merge"})
    assert (tmp_path / "plain" / "bench.json").is_file()


def test_torch_and_a_result_that_cannot_be_recorded(run, artifact, monkeypatch):
    from tome_export.artifact import Artifact
    from tome_export.errors import InputError

    def refuse(*_):
        raise InputError("cannot write it: the filesystem is read-only; give another directory")

    monkeypatch.setattr(Artifact, "with_files", refuse)  # root may write where modes say no
    ran = run("bench", artifact, *QUICK, "--batch", "1", "--backend", "torch")
    assert ran.code == 3, ran.err
    assert ran.out.endswith(
        "\ntorch is not profiled: time per part of the model is measured with ort-cpu only\n"
    )
    assert ran.error == (
        "the result was not recorded: cannot write it: the filesystem is read-only; give another "
        "directory"
    )
    assert [p.name for p in artifact.iterdir() if "bench" in p.name] == []


def test_images_that_no_photograph_gives(built):
    """A model of two channels is timed on noise; one that samples fit, on those, repeated."""
    import numpy as np

    from tome_export.bench.main import bench_images

    manifest = Artifact.open(built).manifest
    samples, kind = bench_images(manifest, 26)
    assert (samples.shape, kind) == ((26, 1, 32, 32), "samples")
    np.testing.assert_array_equal(samples[24:], samples[:2])
    other = manifest.model_copy(
        update={
            "model": manifest.model.model_copy(update={"name": "nowhere:model"}),
            "preprocessing": replace(manifest.preprocessing, input_size=(2, 8, 8)),
            "input": manifest.input.model_copy(update={"shape": ("batch", 2, 8, 8)}),
        }
    )
    noise, kind = bench_images(other, 3)
    assert (noise.shape, noise.dtype, kind) == ((3, 2, 8, 8), np.float32, "noise")
    assert noise.std() > 0
    np.testing.assert_array_equal(noise, bench_images(other, 3)[0])
