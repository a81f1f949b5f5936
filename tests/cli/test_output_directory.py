"""Where a build may write, and what it says where it may not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = ("build", "vit_digits", "--r", "8", "--engine", "none")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_existing_artifact_is_kept_without_force(run, artifact):
    before = contents(artifact)
    ran = run(*BUILD, "-o", artifact)
    assert ran.code == 3
    assert ran.error == f"{artifact} exists; give another directory, or --force to replace it"
    assert contents(artifact) == before


def test_force_replaces_an_artifact_and_leaves_nothing_else(run, artifact, tmp_path):
    (artifact / "model.onnx").write_text("damaged")
    ran = run(*BUILD, "-o", artifact, "--force", "--no-check")
    assert ran.code == 0
    assert sorted(p.name for p in artifact.iterdir()) == ["build.json", "model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert "Parity: not checked" in ran.out


def test_force_through_a_link_replaces_what_it_points_to(run, artifact, tmp_path):
    (tmp_path / "link").symlink_to(artifact)
    assert run(*BUILD, "-o", "link", "--force", "--no-check").code == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in artifact.iterdir()) == ["build.json", "model.onnx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "link"]


def test_force_spares_what_someone_put_into_an_artifact(run, artifact):
    (artifact / "thesis.txt").write_text("years of work")
    before = contents(artifact)
    ran = run(*BUILD, "-o", artifact, "--force", "--no-check")
    assert ran.code == 3
    assert ran.error == (
        f"{artifact} holds what is not of the artifact (thesis.txt), which --force would delete; "
        "move it away or give another directory"
    )
    assert contents(artifact) == before


def test_outputs_without_a_name_or_that_lead_back(run, tmp_path):
    ran = run(*BUILD, "-o", "/", "--force")
    assert ran.code == 3
    assert ran.error == "output is /, which has no name; give a directory to make"
    ran = run(*BUILD, "-o", "nope/..")
    assert ran.code == 3
    assert ran.error == f"{tmp_path} exists; give another directory, or --force to replace it"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_never_replaces_what_is_not_an_artifact(run, tmp_path, kind):
    output = tmp_path / "mine"
    precious = output / "thesis.txt" if kind == "folder" else output
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    ran = run(*BUILD, "-o", output, "--force")
    assert ran.code == 3
    assert ran.error == (
        f"{output} exists and is not an artifact (it has no build.json); --force replaces "
        "artifacts only, give another directory"
    )
    assert precious.read_text() == "years of work"


# The model of 1.3 MB is written, then again with all shapes: each size fails in another place.
@pytest.mark.parametrize("size", ["300k", "2m"])
def test_no_disk_space(run, mounted, size):
    folder = mounted(f"size={size}")
    ran = run(*BUILD, "-o", folder / "out")
    assert ran.code == 3
    assert ran.error == (
        f"cannot write {folder / 'out'}: no space is left on the device; free some or give another "
        "directory"
    )
    assert list(folder.iterdir()) == []


def test_no_disk_space_for_the_engine(run, mounted, artifact):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    folder = mounted("size=4m")
    copy = Path(shutil.copytree(artifact, folder / "out"))
    before = contents(copy)
    ran = run("engine", copy, "--engine", "tensorrt-rtx")
    assert ran.code == 3
    assert ran.error == (
        f"cannot write {copy}: no space is left on the device; free some or give another directory"
    )
    assert contents(copy) == before
    assert sorted(p.name for p in copy.iterdir()) == sorted(before)


def test_read_only_output(run, mounted):
    folder = mounted("ro")
    ran = run(*BUILD, "-o", folder / "out")
    assert ran.code == 3
    assert ran.error == (
        f"cannot write {folder / 'out'}: the filesystem is read-only; give another directory"
    )


def test_output_where_no_folder_can_be(run, tmp_path):
    (tmp_path / "file").write_text("")
    ran = run(*BUILD, "-o", "file/out")
    assert ran.code == 3
    assert ran.error == f"cannot make the folder {tmp_path / 'file'}; give another directory"
    ran = run(*BUILD, "-o", "x" * 300)
    assert ran.code == 3
    assert ran.error == (
        f"cannot write {tmp_path / ('x' * 300)}: the name is too long; give a shorter one"
    )


def test_verdict_stands_on_a_read_only_artifact(run, mounted, artifact):
    folder = mounted("size=8m")
    copy = shutil.copytree(artifact, folder / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    ran = run("check", copy)
    assert ran.code == 3
    assert ran.out.endswith(f"\nPassed: {copy}\n")
    assert ran.error == (
        f"the result was not recorded: cannot write {copy}: the filesystem is read-only; give "
        "another directory"
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--fp16"], "vit_digits-r8-fp16"),
        (["--r", "5", "--schedule", "decreasing"], "vit_digits-r5-decreasing-fp32"),
        (["--schedule", "increasing", "--bf16"], "vit_digits-r8-increasing-bf16"),
        (["--schedule", "4,3"], "vit_digits-r4-3-fp32"),
    ],
)
def test_default_output(run, tmp_path, options, name):
    # A file is in the way, so that the name shows without a build.
    (tmp_path / name).write_text("")
    ran = run("build", "vit_digits", "--engine", "none", *options)
    assert ran.error == (
        f"{tmp_path / name} exists; give another directory, or --force to replace it"
    )
