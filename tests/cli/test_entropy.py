"""``check --min-entropy`` on the command line."""

from __future__ import annotations


def test_over_merged_images_end_a_check_with_5(run, artifact):
    ran = run("check", artifact, "--min-entropy", "0.5")
    assert ran.code == 5
    assert ran.error.startswith("over-merged: ")
    assert " of 24 images have a token-size entropy under 0.5 (8.0 effective tokens of 64)" in (
        ran.error
    )
    # What was found is not lost, and parity itself has passed.
    assert "Parity passed" in ran.out
    assert "Under 0.5:\n  sample " in ran.out
    assert ran.out.endswith(f"FAILED: {artifact}\n")
    ran = run("check", artifact, "--min-entropy", "0.5", "--json")
    found = ran.json
    assert (ran.code, found["error"]["type"]) == (5, "OverMergedError")
    assert found["entropy"]["patches"] == 64
    assert {value < 0.5 for _, value in found["entropy"]["under"]} == {True}
    assert found["reports"][0]["passed"]


def test_it_is_said_of_every_artifact(run, artifact):
    ran = run("check", artifact, "--min-entropy", "0")
    assert ran.code == 0
    assert "Token-size entropy: least 0." in ran.out
    assert "; 1 is 64 tokens" in ran.out
    assert "Under" not in ran.out
