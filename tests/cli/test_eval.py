"""``eval``: what it prints, from any source; killed, spoilt, spread out, and always the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_export.models.facts import DATA

ALONE = ("--against", "none", "--workers", "0")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The test images of vit_digits as class folders of PNG files; not to be changed."""
    root = tmp_path_factory.mktemp("digits") / "digits"
    with np.load(DATA / "digits_test.npz") as archive:
        for n, (image, label) in enumerate(zip(archive["images"], archive["labels"], strict=True)):
            (root / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / str(label) / f"{n:03}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tome-export" / "eval"


def numbers(ran):
    """All of a result that must repeat to the last digit."""
    assert ran.code == 0, ran.err
    return {name: v for name, v in ran.json.items() if name not in ("environment", "artifact")}


def test_the_samples_under_several_schedules(run, artifact, cache):
    ran = run("eval", artifact, "--data", "samples", "--r", "0,4,8", "--limit", "200", "--json")
    assert ran.code == 0, ran.err
    values = ran.json
    rows = {c["name"]: c for c in values["candidates"]}
    assert list(rows) == ["merged", "unmerged", "torch", "r=0", "r=4", "r=8"]
    assert rows["r=4"]["r"] == [4] * 6
    assert rows["unmerged"]["macs"] > rows["r=4"]["macs"] > rows["merged"]["macs"]
    assert rows["torch"]["backend"] == "torch"
    for row in rows.values():
        assert row["top1"]["images"] == 200
        assert row["top1"]["low"] <= row["top1"]["share"] <= row["top1"]["high"]
        assert row["top1"]["share"] > 0.95
        assert row["top5"]["correct"] >= row["top1"]["correct"]
        assert row["not_finite"] == 0
        if row["name"] in ("unmerged", "r=0"):  # nothing is compared with itself
            assert row["agreement_with_unmerged"] is row["difference_to_unmerged"] is None
            continue
        assert row["agreement_with_unmerged"]["share"] > 0.95
        difference = rows["unmerged"]["top1"]["share"] - row["top1"]["share"]
        assert row["difference_to_unmerged"]["share"] == pytest.approx(-difference)
    same = [{k: v for k, v in rows[n].items() if k != "name"} for n in ("unmerged", "r=0")]
    assert same[0] == same[1]
    assert values["data"] == {
        "source": "samples", "kind": "samples", "images": 200, "labelled": True,
        "unreadable": [], "unreadable_count": 0, "notes": [],
    }  # fmt: skip
    assert values["batch"] == 8
    assert values["environment"]["versions"]
    # The artifact holds the same, and is still sound; no journal is left.
    recorded = json.loads((artifact / "eval.json").read_text())
    assert recorded == {k: values[k] for k in recorded}
    assert "eval.json" in json.loads((artifact / "build.json").read_text())["files"]
    assert list(cache.iterdir()) == []


def test_text_of_a_folder_with_spoilt_images(run, artifact, digits, tmp_path):
    spoilt = shutil.copytree(digits, tmp_path / "spoilt")
    paths = sorted(spoilt.rglob("*.png"))[::90]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    ran = run("eval", artifact, "--data", "spoilt", *ALONE, "--batch", "32")
    assert ran.code == 0
    assert ran.err == (
        "Verify the artifact\nList the images\nLoad vit_digits\nClassify 450 images, 1 model\n"
    )
    lines = ran.out.splitlines()
    assert "445 images of spoilt (folder), batch 32" in lines
    assert any(line.startswith("merged  ort-cpu  8  13.46 M") for line in lines)
    at = lines.index("Unreadable and left out: 5")
    for path, line in zip(paths, lines[at + 1 : at + 6], strict=True):
        assert line.startswith(f"  {path.relative_to(spoilt)}: cannot be decoded (")
    assert lines[-1] == f"Recorded: {artifact}/eval.json"


def test_many_unreadable_images_are_listed_in_short_and_all_of_them_end_it(
    run, artifact, tmp_path, cache
):
    folder = tmp_path / "data"
    (folder / "0").mkdir(parents=True)
    for n in range(25):
        (folder / "0" / f"{n:02}.png").write_bytes(b"x")
    ran = run("eval", artifact, "--data", "data", *ALONE)
    assert ran.code == 3
    assert list(cache.iterdir()) == []  # it may be another mount's fault, so is not kept
    assert ran.error == (
        "none of the 25 images could be read; the first is 0/00.png: is not a JPEG, PNG, WEBP, "
        "GIF, BMP, PPM or TIFF file (it begins with b'x'); give one whole"
    )
    shutil.copy(DATA / "digit.png", folder / "0" / "good.png")
    ran = run("eval", artifact, "--data", "data", *ALONE)
    lines = ran.out.splitlines()
    assert "Unreadable and left out: 25" in lines
    assert "  0/19.png: is not a JPEG, PNG" in ran.out
    assert "  0/20.png: " not in ran.out
    assert "  and 5 more; --json lists all" in lines


def test_on_pytorch_too_there_is_something_to_compare_with(run, artifact):
    # Of an fp16 artifact, PyTorch in fp32 is another run than PyTorch in fp16.
    ran = run("eval", artifact, "--data", "samples", "--backend", "torch", "--limit", "32")
    assert ran.code == 0, ran.err
    assert "Classify 32 images, 3 models\n" in ran.err
    assert "Export" not in ran.err  # PyTorch runs no graph
    values = json.loads((artifact / "eval.json").read_text())
    agreements = {c["name"]: c["agreement_with_unmerged"] for c in values["candidates"]}
    assert agreements["unmerged"] is None
    assert agreements["merged"]["images"] == agreements["torch"]["images"] == 32
    lines = ran.out.splitlines()
    assert any(line.startswith("agreement: ") for line in lines)
    assert any(line.startswith("difference: ") for line in lines)
    (row,) = (line for line in lines if line.startswith("unmerged"))
    assert row.split()[-2:] == ["-", "-"]


def test_class_folders_of_which_one_is_none_of_the_models(run, artifact, digits, tmp_path):
    shifted = shutil.copytree(digits, tmp_path / "shifted")
    (shifted / "0").rename(shifted / "zero")
    ran = run("eval", artifact, "--data", "shifted", *ALONE)
    assert (ran.code, ran.out) == (3, "")
    assert ran.error == (
        "the class folders zero are not, or not of one class only, among the model's labels, but "
        "the other 9 are; rename them to labels such as 0, 1, 2, 3, 4, …, or give every image's "
        "class with --labels"
    )


def test_names_that_are_not_utf_8(run, artifact, tmp_path):
    folder = tmp_path / "data" / "0"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"bad\xff.png")).write_bytes(b"x")
    (folder / "link.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    shutil.copy(DATA / "digit.png", folder / os.fsdecode(b"good\xfe.png"))
    ran = run("eval", artifact, "--data", "data", *ALONE)
    assert ran.code == 0
    lines = ran.out.splitlines()
    at = lines.index("Unreadable and left out: 3")
    assert lines[at + 1].startswith("  0/bad\\xff.png: is not a JPEG, PNG, WEBP, ")
    assert lines[at + 2 : at + 4] == [
        "  0/link.png: No such file or directory",
        "  0/pipe.png: is not a regular file; expected an image",
    ]
    values = run("eval", artifact, "--data", "data", *ALONE, "--json").json
    assert values["data"]["unreadable"][0]["name"] == "0/bad\\xff.png"


def test_a_late_failure_costs_no_work_and_what_was_unreadable_is_read_again(
    run, artifact, digits, tmp_path, monkeypatch, cache
):
    from tome_export.artifact import Artifact

    data = shutil.copytree(digits, tmp_path / "data")
    path = sorted(data.rglob("*.png"))[9]
    content, times = path.read_bytes(), path.stat()
    stamp = (times.st_atime_ns, times.st_mtime_ns)
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=stamp)
    command = ("eval", artifact, "--data", "data", *ALONE, "--batch", "8")

    def fail(*_):
        raise ZeroDivisionError("late")

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "record", fail)
        assert run(*command).code == 1
    assert len(list(cache.glob("*.jsonl"))) == 1
    path.write_bytes(content)
    os.utime(path, ns=stamp)
    ran = run(*command)
    assert "Resuming: 442 of 450 images are done\n" in ran.err
    assert "450 images of data (folder), batch 8" in ran.out
    assert "Unreadable" not in ran.out
    assert list(cache.iterdir()) == []


def test_one_process_per_core_that_may_be_used(run, artifact, digits, monkeypatch):
    from tome_export.evaluate import main as evaluation

    seen = []

    def spied(tasks, decode, workers):
        seen.append(workers)
        return decoded_chunks(tasks, decode, 0)

    decoded_chunks = evaluation.decoded_chunks
    monkeypatch.setattr(evaluation, "decoded_chunks", spied)
    monkeypatch.setattr(evaluation, "cores", lambda: 3)
    assert run("eval", artifact, "--data", digits, "--against", "none", "--limit", "8").code == 0
    assert seen == [3]


def test_worker_processes_change_nothing(run, artifact, digits):
    command = ("eval", artifact, "--data", digits, "--against", "none", "--limit", "60", "--json")
    assert numbers(run(*command, "--workers", "0")) == numbers(run(*command, "--workers", "2"))


def test_limit_takes_of_every_class(run, artifact, digits):
    values = run("eval", artifact, "--data", digits, *ALONE, "--limit", "20", "--json").json
    assert values["data"]["images"] == 20
    shown = run("eval", artifact, "--data", digits, *ALONE, "--limit", "1000", "--json").json
    assert shown["data"]["images"] == 450


def test_without_labels_only_agreement_is_told(run, artifact, digits, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in sorted(digits.rglob("*.png"))[::50]:
        shutil.copy(path, tmp_path / "flat")
    ran = run("eval", artifact, "--data", "flat", "--against", "unmerged", "--workers", "0")
    assert "The images have no labels: only agreement is told" in ran.out.splitlines()
    assert "top-1" not in ran.out.split("[low, high]")[0]
    values = json.loads((artifact / "eval.json").read_text())
    assert [c["top1"] for c in values["candidates"]] == [None, None]
    assert values["candidates"][0]["agreement_with_unmerged"]["share"] == 1


def test_killed_and_started_again(cli, run, artifact, digits, cache):
    command = ("eval", artifact, "--data", digits, *ALONE, "--batch", "2", "--json")
    whole = numbers(run(*command))
    process = cli(*command, "-v")
    for line in process.stderr:
        if line.startswith("  images: ") and int(line.split()[1].split("/")[0]) >= 100:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.read()
    (file,) = cache.glob("*.jsonl")
    done = 2 * len([line for line in file.read_text().splitlines() if line.endswith("}]")])
    assert 100 <= done < 450
    again = run(*command)
    assert f"Resuming: {done} of 450 images are done\n" in again.err
    assert numbers(again) == whole
    assert list(cache.iterdir()) == []


def test_restart_begins_anew(cli, run, artifact, digits):
    command = ("eval", artifact, "--data", digits, *ALONE, "--batch", "2")
    process = cli(*command, "-v")
    for line in process.stderr:
        if line.startswith("  images: 20/"):
            break
    ran = run(*command)
    assert ran.code == 3
    assert ran.error == "the same evaluation is running already; wait for it to end, or stop it"
    process.kill()
    process.communicate()
    assert "Resuming" not in run(*command, "--restart").err


def test_a_cache_that_cannot_be_written(run, artifact, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ran = run("eval", artifact, "--data", "samples", *ALONE, "--limit", "8")
    assert ran.code == 0
    assert "Not resumable: the cache folder cannot be written (Not a directory)\n" in ran.err


def test_a_result_that_cannot_be_recorded(run, artifact, monkeypatch):
    from tome_export.artifact import Artifact
    from tome_export.errors import InputError

    def refuse(*_):
        raise InputError("cannot write it: the filesystem is read-only; give another directory")

    monkeypatch.setattr(Artifact, "record", refuse)  # root may write where modes say no
    ran = run("eval", artifact, "--data", "samples", *ALONE, "--limit", "8")
    assert ran.code == 3
    assert "\n8 images of " in ran.out
    assert "Recorded" not in ran.out
    assert ran.error == (
        "the result was not recorded: cannot write it: the filesystem is read-only; give another "
        "directory"
    )
    ran = run("eval", artifact, "--data", "samples", *ALONE, "--limit", "8", "--json")
    assert (ran.code, ran.json["data"]["images"]) == (3, 8)
    assert ran.json["error"]["message"] == f"the result was not recorded: {ran.json['unrecorded']}"
    assert [p.name for p in artifact.iterdir() if "eval" in p.name] == []


def test_random_weights_are_told(run, built_random, tmp_path):
    copy = shutil.copytree(built_random, tmp_path / "copy")
    ran = run("eval", copy, "--data", "samples", *ALONE, "--limit", "50")
    assert ran.out.startswith("RANDOM WEIGHTS: ")


SAMPLES = ("--data", "samples")

BAD = {
    "no data": ((), 2, "Missing option '--data'; see 'tome-export eval --help'"),
    "unknown backend": (
        (*SAMPLES, "--backend", "tvm"), 2,
        "backend is 'tvm'; expected one of ort-cpu, ort-cuda, ort-rtx, openvino, tensorrt, "
        "tensorrt-rtx, torch",
    ),
    "unknown against": (
        (*SAMPLES, "--against", "timm"), 2,
        "--against is 'timm'; expected unmerged, torch or none",
    ),
    "r no numbers": (
        (*SAMPLES, "--r", "2,x"), 2,
        "Invalid value for '--r': '2,x' is not a list of whole numbers, such as 0,2,4,8; see "
        "'tome-export eval --help'",
    ),
    "r negative": (
        (*SAMPLES, "--r", "-2"), 3, "r is -2; expected 0 or more tokens to merge per layer"
    ),
    "batch": (
        (*SAMPLES, "--batch", "64"), 3,
        "batch is 64; the artifact takes 1 to 32, choose one of those or rebuild it with another "
        "--batch",
    ),
    "limit": (
        (*SAMPLES, "--limit", "0"), 2,
        "Invalid value for '--limit': 0 is not in the range x>=1; see 'tome-export eval --help'",
    ),
    "labels for the samples": (
        (*SAMPLES, "--labels", "x"), 2,
        "--labels are for a folder of images; the samples have their own",
    ),
    "nothing there": (
        ("--data", "nowhere"), 3,
        "nowhere does not exist; expected a folder of images, .tar or .parquet shards such as "
        "'shard-{000..010}.tar', or 'samples'",
    ),
    "empty folder": (
        ("--data", "empty"), 3,
        "no images under empty; expected class sub-folders with, or flat, files ending in .bmp, "
        ".gif, .jpeg, .jpg, .png, .ppm, .tif, .tiff, .webp, or .tar or .parquet shards",
    ),
    "ray address": (
        (*SAMPLES, "--against", "none", "--ray", "somewhere"), 3,
        "the Ray address is 'somewhere'; expected local, auto, HOST:PORT or ray://HOST:PORT",
    ),
    "ray nowhere": (
        (*SAMPLES, "--against", "none", "--ray", "127.0.0.1:9"), 3,
        "no Ray cluster can be reached at 127.0.0.1:9 ([Errno 111] Connection refused); start one "
        "with 'ray start --head' and give its address, or use --ray local",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Ray's own, when it is imported
@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, artifact, tmp_path, name):
    arguments, code, message = BAD[name]
    (tmp_path / "empty").mkdir()
    ran = run("eval", artifact, *arguments)
    assert (ran.code, ran.error, ran.out) == (code, message, "")


def test_without_ray(run, artifact, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    ran = run("eval", artifact, *SAMPLES, "--ray", "local")
    assert ran.code == 4
    assert ran.error == "ray is not installed, which --ray runs on; install tome-export[ray]"


@pytest.mark.slow
def test_ray_gives_what_one_machine_gives(start, run, artifact, digits, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    spoilt = shutil.copytree(digits, tmp_path / "spoilt")
    sorted(spoilt.rglob("*.png"))[7].write_bytes(b"x")
    command = ("eval", artifact, "--data", spoilt, "--limit", "100", "--batch", "4", "--json")
    here = numbers(run(*command, "--workers", "0"))
    process = start(*command, "--ray", "local")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert {name: found[name] for name in here} == here
    assert "Classify 100 images, 3 models" in err.splitlines()
    assert "ray" not in err.lower().replace(str(tmp_path), "")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "running"])
def test_ray_ends_with_sigterm_and_leaves_nothing(start, artifact, digits, when):
    pytest.importorskip("ray", reason="Ray is not installed")
    with tempfile.TemporaryDirectory(prefix="te-", dir="/tmp") as short:
        command = ("eval", artifact, "--data", digits, *ALONE, "--batch", "1", "--ray", "local")
        process = start(*command, "-v", TMPDIR=short)
        told = "Classify 450 images" if when == "starting" else "  images: 2/"
        for line in process.stderr:
            if line.startswith(told):
                break
        if when == "starting":
            wait_for(lambda: ray_processes(short))
        assert ray_processes(short)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 143, err
        assert err.endswith("Error: terminated; nothing half-made was left behind\n")
        assert ray_processes(short) == []
        assert [p.name for p in Path(short).iterdir() if "ray" in p.name] == []


def ray_processes(folder):
    """Processes that name the folder, or have a file in it open, zombies left out."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links = [str(link.readlink()) for link in (process / "fd").iterdir()]
            inside = any(link.startswith(f"{folder}/tome-ray-") for link in links)
            if inside or f"{folder}/tome-ray-".encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def wait_for(ready):
    until = time.monotonic() + 60
    while not ready() and time.monotonic() < until:
        time.sleep(0.02)


def test_help_imports_nothing_heavy(start):
    out, _ = start("eval", "--help").communicate(timeout=60)
    assert "--data FOLDER|FILES|samples" in out
