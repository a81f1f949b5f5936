"""Videos through the real server: decoded there, embedded as with the client's own decoding."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import onnxruntime
import pytest
from video_files import write_video
from video_towers import MERGING

from tome_export.build import BuildRequest, build
from tome_export.cli.main import main
from tome_export.data import preprocess
from tome_export.data.preprocess import load_videos
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.progress import Silent
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.query import QueryRequest, query
from tome_export.serve.server import RunRequest, running
from tome_export.spec import BatchRange
from tome_export.video.options import VideoOptions


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served_video")
    (folder / "served_video.py").write_text("from video_towers import clip4clip\n")
    made = BuildRequest(
        "served_video:clip4clip",
        folder / "built",
        Schedule(3),
        video=VideoOptions(merging=MERGING),
        engine="none",
        batch=BatchRange(1, 2, 4),
        check=False,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield build(made)


def test_a_video_model_is_written_with_its_decoder(artifact, tmp_path):
    options = ServeOptions(preprocess=True)
    serve(ServeRequest((artifact.path,), tmp_path / "repository", options=options))
    folders = sorted(path.name for path in (tmp_path / "repository").iterdir())
    name = "served_video_clip4clip_r3-across"
    assert folders == [name, f"{name}_pipeline", f"{name}_preprocess"]
    config = (tmp_path / "repository" / name / "config.pbtxt").read_text()
    assert 'name: "video_mask"' in config
    files = {path.name for path in (tmp_path / "repository" / f"{name}_preprocess" / "1").iterdir()}
    modules = {"model.py", "decoder.py", "pixels.py", "frames.py", "headers.py"}
    assert files == {*modules, "preprocessing.json"}


@pytest.fixture(scope="module")
def address(request, artifact, tmp_path_factory):
    request.getfixturevalue("installation")
    repository = tmp_path_factory.mktemp("repository")
    serve(ServeRequest((artifact.path,), repository, options=ServeOptions(preprocess=True)))
    with running(RunRequest(repository, gpu=False)) as server:
        yield server.grpc
        server.stop(0)


def test_a_file_becomes_the_features_of_its_frames(artifact, address, tmp_path):
    paths = [write_video(tmp_path / f"{n}.mp4", n, size=(64, 48)) for n in (8, 21)]
    answers = query(QueryRequest(address, [tmp_path])).answers
    assert [answer.image.name for answer in answers] == ["21.mp4", "8.mp4"]
    preprocessing = artifact.manifest.preprocessing
    pixels = load_videos(paths[::-1], preprocessing, 8)
    session = onnxruntime.InferenceSession(
        str(artifact.model_path), providers=["CPUExecutionProvider"]
    )
    ones = np.ones((2, 8), np.float32)
    expected = session.run(None, {"pixel_values": pixels, "video_mask": ones})[0]
    for answer, one in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.features["video_features"], one, rtol=1e-4, atol=1e-6)


def test_a_folder_with_images_too_and_no_decoder_here(
    address, tmp_path, tmp_path_factory, monkeypatch, capfd
):
    shutil.copy(sample_paths()[0], tmp_path)
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", 9)
    missing = tmp_path_factory.mktemp("missing")
    (missing / "av.py").write_text("raise ImportError('no av')")
    monkeypatch.syspath_prepend(missing)
    # Another process than before, which looks there; the server's have their own path.
    monkeypatch.setattr(preprocess, "_own", threading.local())
    assert main(["query", address, str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert err == f"Ask {address} about 2 videos\n"
    assert [line for line in out.splitlines() if line.startswith("/")] == [
        str(tmp_path / "a.mp4"),
        str(tmp_path / "b.mp4"),
    ]


def test_a_video_too_short_is_found_ahead_of_the_first_answer(address, tmp_path):
    class AsksNothing(Silent):
        def stage(self, text):
            raise AssertionError(f"asked the server: {text}")

    write_video(tmp_path / "a.mp4", 9)
    short = write_video(tmp_path / "b.mp4", 5)
    with pytest.raises(InputError, match=f"^video {short} has 5 frames; expected 8 or more"):
        query(QueryRequest(address, [tmp_path]), AsksNothing())


def test_what_cannot_be_used_is_one_clear_line(address, tmp_path):
    short = write_video(tmp_path / "short.mp4", 5)
    with pytest.raises(InputError) as caught:
        query(QueryRequest(address, [short]))
    assert str(caught.value) == (
        f"video {short} has 5 frames; expected 8 or more, give a longer one or take fewer frames"
    )
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(InputError, match=r"^video .*broken\.mp4 is not a video that can be read"):
        query(QueryRequest(address, [broken]))
    picture = sample_paths()[0]
    with pytest.raises(InputError) as caught:
        query(QueryRequest(address, [picture]))
    assert str(caught.value) == (
        f"{picture} is an image, and model served_video_clip4clip_r3-across_pipeline takes videos"
    )
