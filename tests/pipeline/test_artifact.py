"""The artifact directory: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from tome_export import artifact
from tome_export.artifact import Artifact, staged, write_manifest
from tome_export.errors import ExportError, InputError

MANIFEST = {
    "model": {
        "name": "m",
        "description": "a model",
        "random_weights": False,
        "weights": {"kind": "file", "source": "w.pth", "seed": None, "state_sha256": "00"},
    },
    "merge": {"schedule": "r=1", "r": [1, 1], "prop_attn": True, "merge_op": "matmul"},
    "tokens": [4, 3],
    "precision": "fp32",
    "batch": "1:8:32",
    "preprocessing": {
        "input_size": [1, 8, 8],
        "mean": [0.5],
        "std": [0.5],
        "crop_pct": 1,
        "interpolation": "bicubic",
    },
    "output": {"name": "logits"},
    "engines": {},
    "engine_note": "none",
}


def engine(file: str) -> dict[str, object]:
    fixed = {"version": "1", "batch": "1:1:1", "targets": ["8.9"], "build_seconds": 1, "notes": []}
    return {"file": file, **fixed}


def write(output: Path, content: str = "x", *, force: bool = False) -> None:
    with staged(output, force=force) as folder:
        (folder / "model.onnx").write_text(content)
        write_manifest(folder, MANIFEST)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stop(BaseException):
    """As an interrupt: no ``Exception``."""


def test_written_whole(tmp_path):
    write(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    opened = Artifact.open(tmp_path / "deep" / "out")
    assert opened.manifest["files"]["model.onnx"]["bytes"] == 1


def stop_halfway(output: Path, *, force: bool) -> None:
    with staged(output, force=force) as folder:
        (folder / "model.onnx").write_text("half")
        raise Stop


def test_nothing_is_left_of_a_build_that_stops(tmp_path):
    with pytest.raises(Stop):
        stop_halfway(tmp_path / "out", force=False)
    assert names(tmp_path) == []


def test_an_artifact_is_whole_when_its_replacement_stops(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(Stop):
        stop_halfway(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after it"])
def test_a_stop_during_the_exchange_leaves_one_whole_artifact(tmp_path, monkeypatch, after):
    write(tmp_path / "out", "old")
    rename = Path.rename

    def stopping(path, target):
        if not path.name.endswith(".partial"):
            return rename(path, target)
        if after:
            rename(path, target)
        raise Stop

    monkeypatch.setattr(Path, "rename", stopping)
    with pytest.raises(Stop):
        write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model.onnx").read_text() == ("new" if after else "old")
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for leftover in (".out.partial", ".out.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.onnx").write_text("half")
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("content", "others", "message"),
    [
        ('{"images": [], "target": "release"}', [], "its build.json is not that of an artifact"),
        ('{"format": "esm", "files": {}}', [], "its build.json is not that of an artifact"),
        ('{"format": 1, "files": ["src"]}', [], "its build.json is not that of an artifact"),
        ("{", [], "its build.json is not that of an artifact"),
        (None, ["notes.txt"], r"not of the artifact \(notes\.txt\), which --force would delete"),
        (None, [".git"], r"not of the artifact \(\.git\), which"),
        (None, ["a", "b", "c", "d", "e"], r"not of the artifact \(a, b, c and 2 more\), which"),
    ],
)
def test_force_deletes_nothing_but_an_artifact(tmp_path, content, others, message):
    output = tmp_path / "out"
    write(output)
    if content is not None:
        (output / "build.json").write_text(content)
    for name in others:
        (output / name).write_text("precious")
    before = names(output)
    with pytest.raises(InputError, match=message):
        write(output, force=True)
    assert names(output) == before
    assert (output / "model.onnx").read_text() == "x"


def test_force_spares_a_folder_that_a_manifest_calls_a_file(tmp_path):
    (tmp_path / "out" / "src").mkdir(parents=True)
    manifest = {"format": 1, "files": {"src": {}}}
    (tmp_path / "out" / "build.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"not of the artifact \(src\)"):
        write(tmp_path / "out", force=True)


def test_force_clears_what_killed_commands_left_in_an_artifact(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / ".engine-x1").mkdir()
    for name in (".build.json.partial", ".parity.json.partial"):
        (tmp_path / "out" / name).write_text("half")
    write(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["build.json", "model.onnx"]


def test_a_claim_made_while_the_replaced_artifact_is_deleted_is_kept(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    theirs, rmtree = tmp_path / ".out.partial", shutil.rmtree

    def overtaken(path, **options):
        if path.name == ".out.replaced" and path.exists():
            theirs.mkdir()
            (theirs / "model.onnx").write_text("theirs")
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", overtaken)
    write(tmp_path / "out", "new", force=True)
    assert (theirs / "model.onnx").read_text() == "theirs"
    assert (tmp_path / "out" / "model.onnx").read_text() == "new"


@pytest.mark.parametrize("output", ["/", "//", "../" * 64])
def test_an_output_needs_a_name(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="which has no name; give a directory to make"):
        write(Path(output), force=True)


def test_an_output_that_leads_back_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path} exists"):
        write(Path("nope/.."))
    assert names(tmp_path) == []
    write(Path("nope/../out"))
    assert names(tmp_path) == ["out"]


def test_two_at_once(tmp_path):
    with staged(tmp_path / "out", force=False) as folder:
        write_manifest(folder, {})
        with pytest.raises(InputError, match="another build is writing"):
            write(tmp_path / "out")
        assert folder.is_dir()
    assert names(tmp_path) == ["out"]


def test_an_artifact_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"

    def overtaken():
        with staged(output, force=False) as folder:
            (folder / "model.onnx").write_text("ours")
            output.mkdir()
            (output / "model.onnx").write_text("theirs")

    with pytest.raises(InputError, match="exists; give another directory"):
        overtaken()
    assert (output / "model.onnx").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("wrapped", [False, True], ids=["raised", "as a cause"])
def test_a_disk_that_refuses_is_bad_input(tmp_path, number, wrapped):
    def write_something():
        try:
            raise OSError(number, "refused")
        except OSError as error:
            if wrapped:
                raise ExportError("the engine cannot be written") from error
            raise

    with (
        pytest.raises(InputError, match=f"^cannot write {tmp_path / 'out'}: "),
        staged(tmp_path / "out", force=False),
    ):
        write_something()


def test_other_failures_keep_their_class(tmp_path):
    with pytest.raises(ExportError, match="parser"), staged(tmp_path / "out", force=False):
        raise ExportError("the parser refuses")
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out", force=False):
        (tmp_path / "nothing").read_text()


def test_files_are_added_and_recorded(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "e").write_text("engine")
    added = Artifact.open(tmp_path / "out").with_files(
        {"engines": {"a": engine("model.engine")}}, {"model.engine": tmp_path / "e"}
    )
    assert names(tmp_path / "out") == ["build.json", "model.engine", "model.onnx"]
    assert Artifact.open(tmp_path / "out").manifest == added.manifest
    assert added.manifest["engines"] == {"a": engine("model.engine")}


def test_what_others_added_meanwhile_is_kept(tmp_path):
    write(tmp_path / "out")
    opened = [Artifact.open(tmp_path / "out") for _ in range(2)]
    for name, mine in zip("ab", opened, strict=True):
        (tmp_path / name).write_text(name)
        mine.with_files({"engines": {name: engine(name)}}, {name: tmp_path / name})
    manifest = Artifact.open(tmp_path / "out").manifest
    assert set(manifest["engines"]) == {"a", "b"}
    assert set(manifest["files"]) == {"a", "b", "model.onnx"}


def test_two_commands_do_not_write_an_artifact_at_once(tmp_path):
    write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out")
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another command is writing"):
            opened.with_files({"parity": None}, {})
    finally:
        os.close(descriptor)
    assert "parity" in opened.with_files({"parity": None}, {}).manifest


def test_nothing_is_added_to_an_artifact_rebuilt_meanwhile(tmp_path):
    write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out")
    write(tmp_path / "out", "y", force=True)
    with pytest.raises(InputError, match="was rebuilt meanwhile"):
        opened.with_files({"parity": None}, {})


def test_an_artifact_without_room_for_its_manifest_is_as_it_was(tmp_path, monkeypatch):
    write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out")
    (tmp_path / "e").write_text("engine")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="no space is left"):
        opened.with_files({}, {"model.engine": tmp_path / "e"})
    assert Artifact.open(tmp_path / "out").manifest == opened.manifest
    assert names(tmp_path / "out") == ["build.json", "model.onnx"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has format None; this version reads format 1, rebuild the artifact"),
        ('{"format": 2}', "has format 2; this version reads format 1, rebuild the artifact"),
        ('{"format": 1}', "lists no files; rebuild the artifact"),
        ("{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_manifests_that_are_none(tmp_path, content, message):
    manifest = tmp_path / artifact.MANIFEST
    manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        Artifact.open(tmp_path)


DROP = object()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model", DROP, "has no model;"),
        ("model", [], r"has model \[\], expected an object;"),
        ("model.name", DROP, r"has no model\.name;"),
        ("model.weights", None, r"has model\.weights None, expected an object;"),
        ("model.weights.seed", "1", r"has model\.weights\.seed '1', expected a whole number;"),
        ("model.weights.state_sha256", 3, r"state_sha256 3, expected text;"),
        ("merge.r", "8", r"has merge\.r '8', expected a list, each entry a whole number;"),
        ("merge.r", [8, "8"], r"has merge\.r\[1\] '8', expected a whole number;"),
        ("merge.r", [True], r"has merge\.r\[0\] True, expected a whole number;"),
        ("merge.prop_attn", "yes", r"has merge\.prop_attn 'yes', expected true or false;"),
        ("merge.merge_op", DROP, r"has no merge\.merge_op;"),
        ("tokens", 3, "has tokens 3, expected a list"),
        ("precision", "int8", "has precision 'int8', expected one of fp32, fp16, bf16;"),
        ("precision", [], r"has precision \[\], expected one of fp32"),
        ("batch", "many", "has batch 'many', expected a batch range such as 1:8:32;"),
        ("batch", 8, "has batch 8, expected a batch range"),
        ("preprocessing", DROP, "has no preprocessing;"),
        ("output", None, "has output None, expected an object;"),
        ("engines", [], r"has engines \[\], expected an object;"),
        ("engines", {"a": {}}, r"has no engines\['a'\]\.file;"),
        ("engines", {"a": engine("gone")}, "does not list 'gone', the file of its a engine;"),
        ("files", {}, r"does not list model\.onnx;"),
        ("files", {"model.onnx": 1}, r"has files\['model\.onnx'\] 1, expected an object;"),
        ("files", {"model.onnx": {"bytes": "1", "sha256": ""}}, r"bytes '1', expected a whole"),
        (
            "files",
            {"../x": {"bytes": 1, "sha256": ""}},
            r"the file '\.\./x', expected a plain name",
        ),
    ],
)
def test_an_edited_manifest_is_one_clear_line(tmp_path, where, value, message):
    write(tmp_path / "out")
    file = tmp_path / "out" / "build.json"
    manifest = json.loads(file.read_text())
    *path, last = where.split(".")
    inner = manifest
    for name in path:
        inner = inner[name]
    inner[last] = value
    if value is DROP:
        del inner[last]
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"^{file} .*{message}.* rebuild") as caught:
        Artifact.open(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_manifest_is_readable_by_people(tmp_path):
    write(tmp_path / "out")
    text = (tmp_path / "out" / "build.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
