"""Files outside an artifact are opened by no command, whatever its own files say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from tome_export.artifact import Artifact

COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "check": lambda a: ("check", a),
    "engine": lambda a: ("engine", a, "--engine", "auto"),
    "bench": lambda a: ("bench", a, "--rounds", "1"),
    "bench against": lambda a: ("bench", a.parent / "built", "--against", a),
    "eval": lambda a: ("eval", a, "--data", "samples"),
    "predict": lambda a: ("predict", a, a / "image.png"),
    "inspect": lambda a: ("inspect", a, a / "image.png"),
    "report": lambda a: ("report", a),
    "serve": lambda a: ("serve", a, "--repository", "models"),
    "cascade": lambda a: (
        "cascade",
        a,
        a.parent / "built",
        "--data",
        "samples",
        "--target-macs",
        "0.9",
        "-o",
        "c.json",
    ),
}


def rerecord(artifact: Path, *more: str) -> None:
    """Let ``build.json`` say of every file what is there: whoever made it made all of it."""
    manifest = artifact / "build.json"
    values = json.loads(manifest.read_text())
    for name in (*values["files"], *more):
        content = (artifact / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        values["files"][name] = {"bytes": len(content), "sha256": digest}
    manifest.write_text(json.dumps(values))


def external(artifact: Path, location: str) -> None:
    """Move one weight of the model into another file."""
    model = onnx.load(artifact / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (artifact.parent / "secret").write_bytes(content)
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    rerecord(artifact)


def by_link(artifact: Path) -> str:
    external(artifact, "link")
    (artifact / "link").symlink_to(artifact.parent / "secret")
    return r"takes tensor '.*' from the file 'link', and build.json lists no file of weights"


def by_listed_link(artifact: Path) -> str:
    external(artifact, "model.onnx.data")
    (artifact / "model.onnx.data").symlink_to(artifact.parent / "secret")
    rerecord(artifact, "model.onnx.data")
    return r"model\.onnx\.data is a symbolic link, expected a file inside the artifact itself"


def by_path(artifact: Path) -> str:
    external(artifact, "../secret")
    return r"from the file '\.\./secret'"


def by_unlisted_file(artifact: Path) -> str:
    external(artifact, "model.onnx.data")
    shutil.copy(artifact.parent / "secret", artifact / "model.onnx.data")
    return r"from the file 'model\.onnx\.data', and build.json lists no file of weights"


def by_model(artifact: Path) -> str:
    (artifact / "model.onnx").rename(artifact.parent / "secret")
    (artifact / "model.onnx").symlink_to(artifact.parent / "secret")
    return r"model\.onnx is a symbolic link"


def by_manifest(artifact: Path) -> str:
    (artifact / "build.json").rename(artifact.parent / "secret")
    (artifact / "build.json").symlink_to(artifact.parent / "secret")
    return r"build\.json is a symbolic link"


def by_folder(artifact: Path) -> str:
    (artifact.parent / "elsewhere").mkdir()
    (artifact.parent / "elsewhere" / "kernels.json").write_text("{}")
    (artifact / "plugins").symlink_to(artifact.parent / "elsewhere")
    rerecord(artifact, "plugins/kernels.json")
    return "plugins is a symbolic link"


def by_pipe(artifact: Path) -> str:
    (artifact / "notes").write_bytes(b"")
    rerecord(artifact, "notes")
    (artifact / "notes").unlink()
    os.mkfifo(artifact / "notes")
    return "notes is a folder, pipe or device, expected a file"


def by_kernel(artifact: Path) -> str:
    (artifact / "plugins").mkdir()
    (artifact / "plugins" / "kernels.json").write_text("{}")
    rerecord(artifact, "plugins/kernels.json")
    (artifact / "plugins" / "match.ptx").write_text("")
    return r"match\.ptx is not listed in build\.json; remove it"


ATTACKS = [
    by_link, by_listed_link, by_path, by_unlisted_file, by_model, by_manifest, by_folder, by_pipe,
    by_kernel,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_reads_a_file_outside(run, built, artifact, attack):
    shutil.copytree(built, artifact.parent / "built")
    message = attack(artifact)
    before = sorted(path.name for path in artifact.parent.rglob("*"))
    for command in COMMANDS.values():
        ran = run(*command(artifact))
        assert ran.code == 3, ran.err
        assert re.search(message, ran.error), ran.error
    assert sorted(path.name for path in artifact.parent.rglob("*")) == before


def test_hard_links_are_files_and_an_artifact_may_be_reached_by_a_link(artifact):
    (artifact.parent / "other").hardlink_to(artifact / "model.onnx")
    (artifact.parent / "current").symlink_to(artifact)
    assert Artifact.open(artifact.parent / "current").manifest.files.keys()


def test_weights_beside_the_model_are_its_own(run, artifact):
    external(artifact, "model.onnx.data")
    shutil.copy(artifact.parent / "secret", artifact / "model.onnx.data")
    rerecord(artifact, "model.onnx.data")
    ran = run("serve", artifact, "--repository", "models")
    assert ran.code == 0, ran.err
    assert [path.name for path in Path("models").rglob("*.data")] == ["model.onnx.data"]
