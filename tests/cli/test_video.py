"""What the command line says of videos: options, tables, and one clear line for what is wrong."""

from __future__ import annotations

import pytest
from video_files import write_video

from tome_export.cli.main import main

VIDEO = ("build", "clip4clip_b32", "--weights", "random", "--engine", "none")
JOINED = (*VIDEO, "--merge-layers", "8,9,10")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            (*JOINED, "--frames", "8"),
            3,
            "8 frames cannot be joined 2,2,3 at a time; expected a multiple of 12",
        ),
        (
            (*VIDEO, "--merge-layers", "9,8,10"),
            3,
            "layers that join frames are 9,8,10; expected them in rising order, counted from 0, "
            "such as 8,9,10",
        ),
        (
            (*VIDEO, "--merge-layers", "8,9,12"),
            3,
            "layer 12 is to join frames; the model has layers 0 to 11",
        ),
        (
            (*VIDEO, "--merge-layers", "8,9"),
            3,
            "2 layers (8,9) join 3 numbers of frames (2,2,3); expected one number per layer",
        ),
        (
            (*VIDEO, "--merge-proportions", "30,101"),
            3,
            "proportions are 30,101; expected two percentages from 0 to 100, across frames and "
            "inside them, such as 30,10",
        ),
        (
            (*VIDEO, "--merge-proportions", "-1,10"),
            3,
            "proportions are -1,10; expected two percentages from 0 to 100, across frames and "
            "inside them, such as 30,10",
        ),
        (
            (*VIDEO, "--merge-frames", "2,x,3"),
            3,
            "clips to join are '2,x,3'; expected numbers such as 2,2,3",
        ),
        ((*VIDEO, "--frames", "0"), 3, "0 frames were asked for; expected 1 or more"),
        (
            (*VIDEO, "--no-frame-position"),
            2,
            "--no-frame-position is for frames that are joined; give --merge-layers too, or leave "
            "it out; see 'tome-export build --help'",
        ),
        (
            ("build", "vit_digits", "--frame-position"),
            2,
            "--frame-position is for frames that are joined; give --merge-layers too, or leave it "
            "out; see 'tome-export build --help'",
        ),
        (
            ("build", "vit_digits", "--frames", "8"),
            2,
            "frames were given for vit_digits, which takes images; they are for video towers such "
            "as clip4clip_b32",
        ),
        (
            (*VIDEO[:2], "--engine", "none"),
            3,
            "clip4clip_b32 has no weights of its own to download; give the file of a CLIP or "
            "video retrieval checkpoint with --weights PATH, or try the toolchain with --weights "
            "random",
        ),
    ],
)
def test_bad_options_are_one_clear_line(run, tmp_path, arguments, code, message):
    ran = run(*arguments, "-o", "out")
    assert (ran.code, ran.error) == (code, message)
    assert not (tmp_path / "out").exists()


def test_the_table_counts_clips(run, tmp_path):
    (tmp_path / "cli_video.py").write_text("from video_towers import clip4clip\n")
    joined = ("--r", 3, "--merge-layers", "1,2", "--merge-frames", "2,2")
    ran = run(
        *("build", "cli_video:clip4clip", *joined, "--engine", "none", "--no-check"),
        *("-o", "out", "--batch", 2),
    )
    assert ran.code == 0, ran.err
    rows = [line.split()[:7] for line in ran.out.splitlines() if line.strip()[:1].isdigit()]
    assert rows[:4] == [
        ["0", "17", "1", "0", "8", "3", "14"],
        ["1", "14", "2", "8", "4", "2", "18"],
        ["2", "18", "2", "10", "2", "2", "24"],
        ["3", "24", "1", "0", "2", "2", "22"],
    ]
    assert "all clips together: 136 in front of the first layer, 44 in the end" in ran.out
    assert "MACs per video: " in ran.out
    ran = run("eval", "out", "--data", "samples")
    assert ran.code == 3
    assert ran.error == (
        f"the model of {tmp_path / 'out'} takes videos, and 'tome-export eval' is for models of "
        "images; use check, bench, predict, inspect, report or serve"
    )
    ran = run("tune", "cli_video:clip4clip", "--target-macs", "0.8", "-o", "schedule.json")
    assert ran.code == 3
    assert ran.error == (
        "cli_video:clip4clip takes videos, and schedules are tuned on images; give a schedule to "
        "'tome-export build' yourself"
    )
    ran = run("inspect", "out", "none.mp4")
    assert (ran.code, ran.error) == (3, "video none.mp4 does not exist; expected a video file")
    write_video(tmp_path / "grey.mp4", 9)
    ran = run("inspect", "out", "grey.mp4")
    assert ran.code == 0, ran.err
    assert "Run cli_video:clip4clip on 1 video\n" in ran.err
    # One class token per frame, and 36 tokens of patches: all 44.
    assert (
        "Prefix tokens (class, distillation, registers) are not in the video: 8 of the tokens, "
        "with no patches merged into them"
    ) in ran.out
    ran = run("check", "out", "--images", "grey.mp4", "--min-entropy", "1")
    assert ran.code == 5
    assert ", fp32, 1 videos against PyTorch fp32\n" in ran.out
    assert "score error  allowed  videos diverging\n" in ran.out
    assert "; 1 is 128 tokens\n" in ran.out
    assert "over-merged: 1 of 1 videos have a token-size entropy under 1 (128.0 " in ran.error
    assert "images" not in ran.out


def test_models_lists_the_video_towers(capfd):
    assert main(["models"]) == 0
    assert "clip4clip_b32" in capfd.readouterr().out
    assert main(["models", "clip4clip_b32"]) == 0
    assert "TempMe" in capfd.readouterr().out
