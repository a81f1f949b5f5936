"""The artifact directory: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from tome_export import artifact
from tome_export.artifact import Artifact, staged, write_manifest
from tome_export.errors import ExportError, InputError


def write(output: Path, content: str = "x", *, force: bool = False) -> None:
    with staged(output, force=force) as folder:
        (folder / "model.onnx").write_text(content)
        write_manifest(folder, {})


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
        {"engines": {"a": 1}}, {"model.engine": tmp_path / "e"}
    )
    assert names(tmp_path / "out") == ["build.json", "model.engine", "model.onnx"]
    assert Artifact.open(tmp_path / "out").manifest == added.manifest
    assert added.manifest["engines"] == {"a": 1}


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


def test_the_manifest_is_readable_by_people(tmp_path):
    write(tmp_path / "out")
    text = (tmp_path / "out" / "build.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
