"""The artifact directory: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from manifests import engine_values, graph, manifest

from tome_export.artifact import Artifact, directory, staged, write_manifest
from tome_export.artifact.document import Document, Text
from tome_export.artifact.manifest import MANIFEST, EngineInfo
from tome_export.errors import ExportError, InputError


def engine(file: str, backend: str = "tensorrt") -> EngineInfo:
    return EngineInfo.model_validate(engine_values(file, backend))


class Result(Document):
    """Any result."""

    remedy = "run the command again"
    value: Text | float = ""


def write(output: Path, content: str = "x", *, force: bool = False) -> None:
    with staged(output, force=force) as folder:
        (folder / "model.onnx").write_bytes(graph(content))
        write_manifest(folder, manifest())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stop(BaseException):
    """As an interrupt: no ``Exception``."""


def test_written_whole(tmp_path):
    write(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    opened = Artifact.open(tmp_path / "deep" / "out")
    assert opened.manifest.files["model.onnx"].bytes == len(graph())


def stop_halfway(output: Path, *, force: bool) -> None:
    with staged(output, force=force) as folder:
        (folder / "model.onnx").write_bytes(graph("half"))
        raise Stop


def test_nothing_is_left_of_a_build_that_stops(tmp_path):
    with pytest.raises(Stop):
        stop_halfway(tmp_path / "out", force=False)
    assert names(tmp_path) == []


def test_an_artifact_is_whole_when_its_replacement_stops(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(Stop):
        stop_halfway(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == graph("old")
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
    assert (tmp_path / "out" / "model.onnx").read_bytes() == graph("new" if after else "old")
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for leftover in (".out.partial", ".out.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.onnx").write_bytes(graph("half"))
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
    assert (output / "model.onnx").read_bytes() == graph("x")


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
            (theirs / "model.onnx").write_bytes(graph("theirs"))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", overtaken)
    write(tmp_path / "out", "new", force=True)
    assert (theirs / "model.onnx").read_bytes() == graph("theirs")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == graph("new")


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
        write_manifest(folder, manifest())
        with pytest.raises(InputError, match="another build is writing"):
            write(tmp_path / "out")
        assert folder.is_dir()
    assert names(tmp_path) == ["out"]


def test_an_artifact_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"

    def overtaken():
        with staged(output, force=False) as folder:
            (folder / "model.onnx").write_bytes(graph("ours"))
            output.mkdir()
            (output / "model.onnx").write_bytes(graph("theirs"))

    with pytest.raises(InputError, match="exists; give another directory"):
        overtaken()
    assert (output / "model.onnx").read_bytes() == graph("theirs")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG]
)
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
    found = engine("model.engine")
    added = Artifact.open(tmp_path / "out").with_engine(found, tmp_path / "e", "one")
    assert names(tmp_path / "out") == ["build.json", "model.engine", "model.onnx"]
    assert Artifact.open(tmp_path / "out").manifest == added.manifest
    assert added.manifest.engines == {"tensorrt": found}
    assert added.manifest.engine_note == "one"


def test_what_others_added_meanwhile_is_kept(tmp_path):
    write(tmp_path / "out")
    opened = [Artifact.open(tmp_path / "out") for _ in range(2)]
    for name, mine in zip(("tensorrt", "tensorrt-rtx"), opened, strict=True):
        (tmp_path / name).write_text(name)
        mine.with_engine(engine(name, name), tmp_path / name, "")
    found = Artifact.open(tmp_path / "out").manifest
    assert set(found.engines) == {"tensorrt", "tensorrt-rtx"}
    assert set(found.files) == {"tensorrt", "tensorrt-rtx", "model.onnx"}


def test_two_commands_do_not_write_an_artifact_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "PATIENCE_S", 0.1)
    write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out")
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another command is writing"):
            opened.record("eval.json", b"{}")
    finally:
        os.close(descriptor)
    assert "eval.json" in opened.record("eval.json", b"{}").manifest.files


def test_a_command_waits_for_one_that_is_recording(tmp_path):
    output = recorded(tmp_path)
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, (descriptor,)).start()
    before = time.monotonic()
    Artifact.open(output).record("bench.json", Result())
    assert time.monotonic() - before > 0.25


def test_nothing_is_added_to_an_artifact_rebuilt_meanwhile(tmp_path):
    write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out")
    write(tmp_path / "out", "y", force=True)
    with pytest.raises(InputError, match="was rebuilt meanwhile"):
        opened.record("eval.json", b"{}")


def test_an_artifact_without_room_for_its_manifest_is_as_it_was(tmp_path, monkeypatch):
    write(tmp_path / "out")
    opened = Artifact.open(tmp_path / "out")
    (tmp_path / "e").write_text("engine")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    for files in ({"model.engine": tmp_path / "e"}, {"eval.json": b"{}"}):
        with pytest.raises(InputError, match="no space is left"):
            opened.with_files(files, lambda fresh: fresh)
    assert Artifact.open(tmp_path / "out").manifest == opened.manifest
    assert names(tmp_path / "out") == ["build.json", "model.onnx"]


def recorded(tmp_path: Path) -> Path:
    """An artifact with an engine, a schedule and a result."""
    output = tmp_path / "out"
    with staged(output, force=False) as folder:
        (folder / "model.onnx").write_bytes(graph("x"))
        (folder / "model.engine").write_text("old engine")
        (folder / "schedule.json").write_text("{}")
        write_manifest(folder, manifest(engines={"tensorrt": engine_values("model.engine")}))
    Artifact.open(output).record("eval.json", Result(value=0.5))
    return output


def test_a_result_is_recorded(tmp_path):
    output = recorded(tmp_path)
    added = Artifact.open(output).record("report.html", b"<p>")
    assert (output / "report.html").read_bytes() == b"<p>"
    assert json.loads((output / "eval.json").read_text()) == {"value": 0.5}
    opened = Artifact.open(output)
    assert (opened.manifest, opened.stale) == (added.manifest, {})
    assert {"eval.json", "report.html"} <= opened.manifest.files.keys()


CHANGES = {
    "deleted": (None, "is gone since it was recorded"),
    "other content": ('{\n  "top1": 0.9\n}\n', "was changed after it was recorded"),
    "cut short": ("{", "was changed after it was recorded"),
}


@pytest.mark.parametrize(("content", "why"), CHANGES.values(), ids=CHANGES)
def test_a_result_that_was_changed_is_none_but_the_model_is_usable(tmp_path, content, why):
    output = recorded(tmp_path)
    file = output / "eval.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    opened = Artifact.open(output)
    assert "eval.json" not in opened.manifest.files
    assert opened.stale == {"eval.json": f"eval.json {why}: run 'tome-export eval' again"}
    after = opened.record("bench.json", Result())
    assert after.stale == Artifact.open(output).stale == opened.stale
    assert Artifact.open(output).record("eval.json", Result(value=0.9)).stale == {}
    assert Artifact.open(output).stale == {}
    file.unlink()
    write(output, force=True)


@pytest.mark.parametrize("name", ["model.onnx", "model.engine", "schedule.json"])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("other")])
def test_what_the_model_needs_must_be_as_it_was(tmp_path, name, change):
    output = recorded(tmp_path)
    change(output / name)
    with pytest.raises(InputError, match=f"^{output / name} .* rebuild the artifact"):
        Artifact.open(output)


KILLED = """
import os, sys
from pathlib import Path
from tome_export.artifact import Artifact

replace = Path.replace
left = int(sys.argv[4])


def dying(path, target):
    global left
    left -= Path(target).name == sys.argv[2]
    if left < 0:
        os._exit(9)
    return replace(path, target)


opened = Artifact.open(Path(sys.argv[1]))
Path.replace = dying
draft = Path(sys.argv[1]).with_name("draft")
draft.write_text("new engine")
if sys.argv[3] == "model.engine":
    opened.with_engine(opened.manifest.engines["tensorrt"], draft, "")
else:
    opened.record(sys.argv[3], b"{}")
"""


@pytest.mark.parametrize(
    ("name", "dies_at", "after"),
    [
        ("eval.json", "eval.json", 0),
        ("eval.json", "build.json", 0),
        ("bench.json", "build.json", 0),
        ("model.engine", "build.json", 0),
        ("model.engine", "model.engine", 0),
        ("model.engine", "build.json", 1),
    ],
)
def test_an_artifact_opens_after_a_kill_while_something_was_recorded(
    tmp_path, name, dies_at, after
):
    output = recorded(tmp_path)
    command = [sys.executable, "-c", KILLED, output, dies_at, name, str(after)]
    assert subprocess.run(command, check=False).returncode == 9
    opened = Artifact.open(output)
    left = {"eval.json"} if (name, dies_at) == ("eval.json", "build.json") else set()
    assert opened.stale.keys() == left
    if name == "model.engine":
        # An engine that is there is the one that is recorded; at worst there is none.
        found = opened.manifest.engines
        assert (found == {}) == ("model.engine" not in opened.manifest.files)
    else:
        assert opened.record(name, b"[]").stale == {}
        assert [n for n in names(output) if n.startswith(".")] == []
    write(output, force=True)
    assert names(output) == ["build.json", "model.onnx"]


def test_readers_see_nothing_half_recorded(tmp_path):
    output, ended, wrong = recorded(tmp_path), threading.Event(), []

    def read():
        while not ended.is_set():
            wrong.extend(Artifact.open(output).stale)

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for n in range(150):
            Artifact.open(output).record("eval.json", Result(value="x" * n))
        ended.set()
    for reader in readers:
        reader.result()
    assert wrong == []


def test_commands_that_record_the_same_wait_for_each_other(tmp_path):
    output = recorded(tmp_path)
    opened = Artifact.open(output)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: opened.record("eval.json", Result(value="x" * n)), range(40)))
    assert Artifact.open(output).stale == {}
    assert [name for name in names(output) if name.startswith(".")] == []


DRAFTS = (
    ".build.json.partial",
    ".build.json.0a1b2c3d.partial",
    ".parity.json.partial",
    ".eval.json.0a1b2c3d.partial",
    ".bench.json.partial",
    ".report.html.4711.partial",
)


def test_recording_clears_what_killed_commands_left(tmp_path):
    output = recorded(tmp_path)
    for name in DRAFTS:
        (output / name).write_text("half")
    (output / ".engine-x1").mkdir()  # perhaps of a build that is running
    (output / ".notes.json.partial").write_text("not ours")
    Artifact.open(output).record("bench.json", Result())
    assert [name for name in names(output) if name.startswith(".")] == [
        ".engine-x1",
        ".notes.json.partial",
    ]


@pytest.mark.parametrize("name", [*DRAFTS, ".engine-x1", "eval.json", "report.html"])
def test_force_is_not_stopped_by_what_killed_commands_left(tmp_path, name):
    write(tmp_path / "out")
    (tmp_path / "out" / name).write_text("half")
    write(tmp_path / "out", "new", force=True)
    assert names(tmp_path / "out") == ["build.json", "model.onnx"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_reader_does_without_a_lock_where_there_are_none(tmp_path, monkeypatch, number):
    output = recorded(tmp_path)
    (output / "eval.json").unlink()

    def refuse(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Artifact.open(output).stale.keys() == {"eval.json"}


def test_names_that_are_no_text_are_escaped(tmp_path):
    output = recorded(tmp_path)
    Artifact.open(output).record("bench.json", Result(value="\u4e2d odd\udcff.png"))
    found = json.loads((output / "bench.json").read_text(encoding="utf-8"))
    assert found == {"value": "\u4e2d odd\\udcff.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"is \[\], expected an object; rebuild the artifact"),
        ("{}", "has no format; rebuild the artifact"),
        ('{"format": 2}', "has format 2, expected 1; rebuild the artifact"),
        ('{"format": 1}', "has no model; rebuild the artifact"),
        ("{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        ("[" * 5000, "is not valid JSON"),
        ('{"format": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_manifests_that_are_none(tmp_path, content, message):
    manifest = tmp_path / MANIFEST
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
        ("merge.r", "8", r"has merge\.r '8', expected a list;"),
        ("merge.r", [8, "8"], r"has merge\.r\[1\] '8', expected a whole number;"),
        ("merge.r", [True], r"has merge\.r\[0\] True, expected a whole number;"),
        ("merge.prop_attn", "yes", r"has merge\.prop_attn 'yes', expected true or false;"),
        ("merge.merge_op", DROP, r"has no merge\.merge_op;"),
        ("merge.scored", DROP, r"has no merge\.scored;"),
        ("tokens", 3, "has tokens 3, expected a list"),
        ("layers", 3, "has layers 3, expected a list;"),
        ("layers", [{"r": 1}], r"has no layers\[0\]\.tokens_in;"),
        ("onnx.attention", "fast", "has onnx.attention 'fast', expected one of auto, fused, fus"),
        ("macs.ratio", math.nan, r"has macs\.ratio nan, expected a finite number;"),
        ("precision", "int8", "has precision 'int8', expected one of fp32, fp16, bf16;"),
        ("precision", [], r"has precision \[\], expected one of fp32"),
        ("batch", "many", "has batch 'many', expected a batch range such as 1:8:32, up to 6"),
        ("batch", "1:8:999999999999", "has batch '1:8:999999999999', expected a batch range"),
        ("batch", 8, "has batch 8, expected a batch range"),
        ("preprocessing", DROP, "has no preprocessing;"),
        ("preprocessing.input_size", [], r"has no preprocessing\.input_size\[0\];"),
        ("preprocessing.input_size", [1, 8], r"has no preprocessing\.input_size\[2\];"),
        (
            "preprocessing.input_size",
            [1, 8, 10**9],
            "1000000000], expected 1 or 3 channels of 1 to",
        ),
        ("preprocessing.input_size", [1, 8, 9], r"has pixel_values of .*'batch', 1, 8, 9\]"),
        ("preprocessing.form", "uint8", r"expected uint8 \['batch', 8, 8, 1\], as preprocessing"),
        ("preprocessing.form", "uint8-nchw", r"expected uint8 \['batch', 1, 8, 8\], as preproc"),
        ("preprocessing.form", "int8", "preprocessing.form"),
        ("preprocessing.input_size", [2, 8, 8], "expected 1 or 3 channels"),
        ("preprocessing.crop_pct", 0, "has preprocessing.crop_pct 0.*above 0"),
        ("preprocessing.crop_pct", -1, "has preprocessing.crop_pct -1"),
        ("preprocessing.crop_pct", 1e-300, "has preprocessing.crop_pct 1e-300"),
        ("preprocessing.crop_pct", math.nan, "crop_pct nan, expected a finite number"),
        ("preprocessing.std", [0], r"has preprocessing\.std \[0.*expected numbers above 0"),
        (
            "preprocessing.std",
            [-0.5],
            r"has preprocessing\.std \[-0\.5\], expected numbers above 0",
        ),
        ("preprocessing.std", [0.5, 0.5], r"std \[0\.5, 0\.5\], expected 1, one per channel"),
        ("preprocessing.std", [], r"std \[\], expected 1, one per channel"),
        ("preprocessing.mean", [], r"mean \[\], expected 1, one per channel"),
        ("preprocessing.fill", [256], r"fill \[256\], expected none or 1 levels from 0 to 255"),
        ("preprocessing.mean", [1e300], r"mean \[1e\+300\], expected levels of pixels"),
        ("preprocessing.interpolation", "lanczos", "interpolation 'lanczos', expected one of"),
        ("layers", [], "has 0 layers, 2 tokens and 2 merge.r, expected one of each per layer;"),
        ("tokens", [], "has 2 layers, 0 tokens and 2 merge.r, expected"),
        ("merge.r", [], "has 2 layers, 2 tokens and 0 merge.r, expected"),
        ("merge.r", [1, 2], r"has layers\[1\] of 4 tokens less r 1 to 3, which does not fit"),
        ("merge.r", [1, 10**30], r"has merge\.r\[1\] 1000.*, expected a number, "),
        ("merge.r", [1, -1], r"has merge\.r\[1\] -1, expected a number, 0 or more;"),
        ("tokens", [4, 2], r"has layers\[1\] of 4 tokens"),
        ("tokens_in", 6, r"has layers\[0\] of 5 tokens"),
        (
            "merge.merge_op",
            "x",
            "has merge.merge_op 'x', expected one of index_add, matmul, plugin;",
        ),
        ("merge.reducer", [None], r"has merge\.reducer \[None\], expected an object;"),
        ("macs.unmerged", [None], r"has macs\.unmerged \[None\], expected a whole number;"),
        ("macs.merged", 0, "has macs.merged 0, expected a number, 1 or more;"),
        ("patches.width", True, "has patches.width True, expected a whole number;"),
        ("patches.rows", 0, "expected rows, cols, height and width above 0;"),
        ("output.name", "classes", "has the output 'classes' of kind classes, expected logits;"),
        ("output.dtype", "float64", "has outputs other than logits, as output and form say;"),
        ("form.dense", True, "has the output 'logits' of kind classes, expected features;"),
        ("form.entropy", True, "has outputs other than logits, entropy, as output and form say;"),
        ("inputs", [], "has inputs that do not begin with pixel_values as input has it;"),
        ("labels", list(range(10)), r"has labels\[0\] 0, expected text;"),
        ("labels", ["a"], "has 1 labels for the output logits .*, expected one label per logit;"),
        ("form.kind", "features", "has the output 'logits' of kind features, expected features or"),
        ("form.kind", "map", "has activation softmax of the output 'logits', which is map;"),
        ("activation", None, "has activation None of the output 'logits', which is classes;"),
        ("compressor", {"name": "avgpool"}, r"has no compressor\.options;"),
        ("model.name", "x" * 5000, r"has model\.name 'x.*, expected at most 4096 characters;"),
        ("model.folder", "x" * 5000, r"has model\.folder 'x.*, expected at most 4096 characters;"),
        ("model.weights.source", "a\0b", "has model.weights.source 'a.x00b', expected"),
        ("model.weights.kind", "stolen", "has model.weights.kind 'stolen', expected one of"),
        (
            "files",
            {"x" * 5000: {"bytes": 1, "sha256": ""}},
            "lists the file 'x.*, expected a plain",
        ),
        ("output", None, "has output None, expected an object;"),
        ("engines", [], r"has engines \[\], expected an object;"),
        ("engines", {"a-b": {}}, r"has no engines\['a-b'\]\.backend;"),
        (
            "engines",
            {"tensorrt": engine_values("gone")},
            "does not list 'gone', the file of its tensorrt engine;",
        ),
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
