"""Frames of video files, from videos that PyAV writes here."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_files import grey, write_video

from tome_export.data import preprocess
from tome_export.data.preprocess import find_videos, load_videos, read_frames
from tome_export.data.samples import moving_samples
from tome_export.errors import InputError, MissingComponentError
from tome_export.spec import Preprocessing
from tome_export.video.frames import BadVideoError, _upright, frames_of, sampled

PLAIN = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3, 1.0, "bicubic")


@pytest.mark.parametrize(
    ("total", "count"), [(12, 12), (13, 12), (300, 12), (7, 3), (5, 1), (1, 1), (2, 2), (97, 8)]
)
def test_frames_are_taken_uniformly(total, count):
    expected = np.linspace(0, total - 1, num=count, dtype=int).tolist()
    assert sampled(total, count) == expected


def levels(images: list[Any]) -> list[int]:
    return [round(float(np.asarray(image).mean())) for image in images]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_the_right_frames_come_in_order(tmp_path, suffix):
    path = write_video(tmp_path / f"grey{suffix}", 11)
    found = levels(read_frames(path, 4))
    expected = [grey(i) for i in (0, 3, 6, 10)]
    assert np.abs(np.subtract(found, expected)).max() <= 4  # what compression costs
    assert levels(frames_of(path.read_bytes(), 4)) == found
    pixels = load_videos([path, path], PLAIN, 4)
    assert pixels.shape == (2, 4, 3, 32, 32)
    assert np.allclose(pixels.mean((2, 3, 4))[0] * 255, found, atol=1)


class HeldSideways:
    """A frame as PyAV gives it, of a phone that was held sideways."""

    rotation = 90

    def to_image(self) -> Image.Image:
        image = Image.new("RGB", (4, 2))
        image.putpixel((3, 0), (255, 0, 0))
        return image


def test_a_turned_frame_comes_upright():
    upright = _upright(HeldSideways())
    assert upright.size == (2, 4)
    assert upright.getpixel((0, 0)) == (255, 0, 0)  # turned counterclockwise


def test_a_folder_is_searched(tmp_path):
    paths = [write_video(tmp_path / name, 2) for name in ("b.mp4", "a.mkv")]
    assert find_videos(tmp_path) == sorted(paths)
    assert find_videos(paths[0]) == [paths[0]]


def cut(tmp_path: Path) -> Path:
    whole = write_video(tmp_path / "whole.mkv", 30, size=(64, 64)).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[:40])
    return path


def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.mp4"
    path.write_text("no video at all")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "none.mp4", "does not exist; expected a video file"),
        (lambda t: t, "is a folder; expected a video file"),
        (
            text,
            "is not a video that can be read (Invalid data found when processing input); expected "
            "MP4, MOV, WebM, Matroska, AVI or MPEG, whole",
        ),
        (
            lambda t: write_video(t / "short.mp4", 5),
            "has 5 frames; expected 8 or more, give a longer one or take fewer frames",
        ),
    ],
)
def test_what_is_no_video_is_one_clear_line(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        read_frames(path, 8)
    assert str(caught.value) == f"video {path} {message}"


SESSION = b"""v=0
o=- 0 0 IN IP4 127.0.0.1
s=x
c=IN IP4 127.0.0.1
t=0 0
m=video 5004 RTP/AVP 96
a=rtpmap:96 H264/90000
"""


@pytest.mark.parametrize(
    "content",
    [b"ffconcat version 1.0\nfile other.mp4\n", SESSION],
    ids=["ffconcat", "session"],
)
def test_a_text_cannot_have_other_files_or_addresses_opened(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "other.mp4", 8)
    path = tmp_path / "sent.mp4"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(BadVideoError) as caught:
            frames_of(source, 8)
        assert str(caught.value) == (
            "is not a video that can be read (Invalid argument); expected MP4, MOV, WebM, "
            "Matroska, AVI or MPEG, whole"
        )


def test_a_file_without_permission_is_not_called_damaged(tmp_path):
    path = write_video(tmp_path / "closed.mp4", 2)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(path.stat().st_uid + 65534)  # root may read everything
    try:
        with pytest.raises(BadVideoError) as caught:
            frames_of(path, 2)
    finally:
        if root:
            os.seteuid(0)
    assert str(caught.value) == (
        "cannot be opened (Permission denied); expected a file that can be read"
    )


def test_a_file_cut_short_is_one_clear_line(tmp_path):
    path = cut(tmp_path)
    with pytest.raises(InputError, match=f"^video {path} (is not|cannot be|has 0)[^\n]*$"):
        read_frames(path, 8)


def test_missing_pyav_names_the_extra(tmp_path, monkeypatch):
    path = write_video(tmp_path / "grey.mp4", 2)
    (tmp_path / "av.py").write_text("raise ImportError('no av')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(preprocess, "_own", threading.local())  # another process, which looks there
    with pytest.raises(MissingComponentError) as caught:
        read_frames(path, 2)
    assert str(caught.value) == (
        "PyAV, which decodes videos, is not installed; install the extra: pip install "
        "'tome-export[video]'"
    )


def test_an_empty_list_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"^no videos given; expected at least one video file$"):
        load_videos([], PLAIN, 2)
    with pytest.raises(InputError, match=f"^no videos under {tmp_path}; expected files ending in"):
        find_videos(tmp_path)


def test_moving_samples_move():
    pixels = moving_samples(PLAIN, 7, 3)
    assert pixels.shape == (7, 3, 3, 32, 32)
    assert all(not np.array_equal(video[0], video[1]) for video in pixels)
    # The seventh is the first photograph again, the other way round.
    assert np.array_equal(pixels[6], pixels[0, ::-1])


def test_pictures_in_an_unknown_code_are_one_clear_line(tmp_path):
    path = write_video(tmp_path / "x.mkv", 4)
    data = path.read_bytes()
    assert data.count(b"V_MPEG4") == 1
    path.write_bytes(data.replace(b"V_MPEG4", b"V_ZZZZZ"))
    with pytest.raises(InputError, match=r"x\.mkv has pictures in a code that is not known; exp"):
        read_frames(path, 2)
