"""``--image-size``: the commands hand it on, and the folder of a build is named by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tome_export.cli.main import main
from tome_export.errors import InputError
from tome_export.spec import ImageSize


@pytest.fixture
def requests(monkeypatch):
    """What build and tune are asked for; neither does anything."""
    seen = []

    def stop(request, *_):
        seen.append(request)
        raise InputError("stopped")

    monkeypatch.setattr("tome_export.build.build", stop)
    monkeypatch.setattr("tome_export.tune.main.tune", stop)
    return seen


@pytest.mark.parametrize("more", [["build"], ["tune", "--target-macs", "70%"]], ids=lambda m: m[0])
def test_the_size_is_handed_on(requests, more):
    assert main([*more, "vit_digits", "--image-size", "48x32", "--weights", "random"]) == 3
    assert requests[0].image_size == ImageSize(48, 32)


def test_the_folder_has_the_size_and_its_r_in_its_name(requests):
    main(["build", "vit_digits", "--image-size", "48x32", "--weights", "random"])
    assert requests[0].output == Path("vit_digits-48x32-r12-fp32")


def test_models_describes_one_model_at_a_size(capsys):
    assert main(["models", "--image-size", "48x32"]) == 2
    assert "--image-size is for one model; give its NAME" in capsys.readouterr().err
    assert main(["models", "vit_digits", "--image-size", "48x32"]) == 0
    assert "Input       1x48x32" in capsys.readouterr().out
