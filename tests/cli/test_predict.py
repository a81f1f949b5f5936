"""``tome-export predict``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tome_export.build import BuildRequest, build
from tome_export.data.preprocess import load_images
from tome_export.merge.schedule import Schedule
from tome_export.models.facts import DATA
from tome_export.runtime.registry import backend_of
from tome_export.spec import BatchRange

DIGIT = DATA / "digit.png"
HELP = "; see 'tome-export predict --help'"

TOWER = """
def tower():
    import timm, torch
    from tome_export.spec import Preprocessing
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, patch_size=8, num_classes=0)
    return model.eval(), Preprocessing((3, 64, 64), (0.5,) * 3, (0.25,) * 3, 0.9, "bicubic")
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The artifact of a tower that merges nothing, of a fixed batch, and its features by timm."""
    import torch
    from timm.data import create_transform

    folder = tmp_path_factory.mktemp("tower")
    (folder / "predict_tower.py").write_text(TOWER)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        request = BuildRequest(
            "predict_tower:tower",
            folder / "built",
            schedule=Schedule(0),
            batch=BatchRange(3, 3, 3),
            engine="none",
            check=False,
        )
        artifact = build(request)
    code: dict = {}
    exec(TOWER, code)  # noqa: S102 (the same model, without this package's loader)
    model, recipe = code["tower"]()
    transform = create_transform(
        (3, 64, 64), mean=recipe.mean, std=recipe.std, crop_pct=0.9, interpolation="bicubic"
    )

    def features(*paths):
        with torch.inference_mode():
            return model(torch.stack([transform(Image.open(p).convert("RGB")) for p in paths]))

    return artifact, features


@pytest.fixture
def photographs(tmp_path):
    """Five files in a folder: the third is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        with Image.open(DATA / f"{name}.jpg") as image:
            image.save(folder / f"{index + (index > 1)}.png")
    (folder / "2.png").write_text("no image")
    return folder


def test_labels_with_scores(run, built, tmp_path):
    ran = run("predict", built, DIGIT, "--top", "2")
    assert ran.code == 0, ran.err
    values = run("predict", built, DIGIT, "--top", "2", "--json").json
    labels = values["images"][0]["labels"]
    assert [(one["label"], one["index"]) for one in labels] == [("2", 2), ("3", 3)]
    assert ran.out.splitlines() == [
        "Model    vit_digits",
        "Backend  ort-cpu",
        "Output   logits [10]",
        "",
        str(DIGIT),
        "  label   score  index",
        f"  2      {labels[0]['score']:.4f}      2",
        f"  3      {labels[1]['score']:.4f}      3",
    ]
    assert ran.err.splitlines() == ["Verify the artifact", "Load vit_digits", "Run 1 image"]
    assert values == {
        "artifact": str(built),
        "model": "vit_digits",
        "random_weights": False,
        "backend": "ort-cpu",
        "kind": "classes",
        "output": {"name": "logits", "shape": [10]},
        "file": None,
        "images": [{"image": str(DIGIT), "labels": labels}],
        "failed": [],
    }
    assert names(tmp_path) == []


def test_random_weights_are_said(run, built_random):
    assert run("predict", built_random, DIGIT).out.startswith("RANDOM WEIGHTS: ")


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_features_are_those_of_timm_in_the_order_of_the_images(
    run, tower, photographs, backend, tmp_path
):
    """A batch of three is filled up, and an image that is none keeps its row."""
    if (reason := backend_of(backend).missing()) is not None:
        pytest.skip(reason)
    artifact, features = tower
    whole = [photographs / f"{index}.png" for index in (0, 1, 3, 4)]
    ran = run("predict", artifact.path, photographs, "-o", "f.npy", "--backend", backend)
    assert ran.code == 3
    assert ran.error == (
        f"1 of 5 images could not be used; the first is {photographs}/2.png: is not a JPEG, PNG, "
        "WEBP, GIF, BMP, PPM or TIFF file (it begins with b'no image'); give one whole"
    )
    assert "Features: f.npy, [5, 64], in the order of the images\n" in ran.out
    assert ran.out.endswith("Rows of images that were not used are NaN\n")
    found, expected = np.load(tmp_path / "f.npy"), features(*whole).numpy()
    assert (found.dtype, found.shape) == (np.float32, (5, 64))
    np.testing.assert_allclose(found[[0, 1, 3, 4]], expected, atol=1e-4)
    assert np.isnan(found[2]).all()
    printed = run("predict", artifact.path, *whole, "--backend", backend, "--json")
    assert printed.code == 0, printed.err
    np.testing.assert_allclose(
        [one["features"] for one in printed.json["images"]], expected, atol=1e-4
    )
    first = run("predict", artifact.path, whole[0], "--backend", backend).out.splitlines()[-1]
    numbers = ", ".join(f"{one:.4f}" for one in printed.json["images"][0]["features"][:4])
    assert first == f"  features [64]: {numbers}, ..."


def test_a_failure_is_in_the_json_too(run, built, photographs):
    ran = run("predict", built, photographs, "--json")
    assert (ran.code, ran.json["error"]["exit_code"]) == (3, 3)
    assert [one["image"][-5:] for one in ran.json["images"]] == [f"{i}.png" for i in (0, 1, 3, 4)]
    assert [one["name"] for one in ran.json["failed"]] == [f"{photographs}/2.png"]


def test_nothing_is_written_where_no_image_can_be_used(run, tower, photographs, tmp_path):
    ran = run("predict", tower[0].path, photographs / "2.png", "-o", "f.npy")
    assert ran.code == 3
    assert ran.error.startswith(f"none of 1 images could be used; the first is {photographs}/2.png")
    assert (ran.out, names(tmp_path)) == ("", ["photos"])


def test_a_file_is_replaced_only_by_force(run, tower, tmp_path):
    given = ("predict", tower[0].path, DATA / "coffee.jpg", "-o", "f.npy")
    (tmp_path / "f.npy").write_text("mine")
    ran = run(*given)
    assert (ran.code, (tmp_path / "f.npy").read_text()) == (3, "mine")
    assert ran.error == "f.npy exists; give another file, or --force to replace it"
    assert run(*given, "--force").code == 0
    assert np.load(tmp_path / "f.npy").shape == (1, 64)
    assert names(tmp_path) == ["f.npy"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--top", "0"), 2, "top is 0; expected 1 or more"),
        (
            ("--output", "x"),
            2,
            "--output is x, but the model gives labels, which are printed; leave it out",
        ),
        (("--raw",), 2, "--raw is for the pictures of a dense map; give --output FOLDER for one"),
        (
            ("--backend", "torch"),
            2,
            "backend is 'torch', which runs no artifact; choose one that runs graphs or engines, "
            "such as 'ort-cpu'",
        ),
        (
            ("--query", "q.npy"),
            2,
            "--query is q.npy, but the model takes images only; leave it out",
        ),
        (("nowhere",), 3, "nowhere does not exist; expected an image or a folder of images"),
        (("a.mp4",), 3, "a.mp4 is a video, and the model takes images"),
    ],
)
def test_bad_input(run, built, arguments, code, message, tmp_path):
    (tmp_path / "a.mp4").touch()
    ran = run("predict", built, DIGIT, *arguments)
    assert (ran.code, ran.error, ran.out) == (code, message, "")


def test_without_an_image_it_says_so(run, built):
    assert run("predict", built).error == f"Missing argument 'IMAGE...'{HELP}"


def test_outputs_that_are_not_finite_are_named(run, built, monkeypatch):
    from tome_export.runtime.ort import OrtRunner

    infer = OrtRunner.infer

    def broken(self, inputs):
        found = infer(self, inputs)
        found["logits"][1] = np.nan
        return found

    monkeypatch.setattr(OrtRunner, "infer", broken)
    ran = run("predict", built, DIGIT, DIGIT, DIGIT, "--json")
    assert ran.code == 3
    assert ran.json["failed"] == [
        {"name": str(DIGIT), "reason": "what the model gives of it is not finite"}
    ]
    assert len(ran.json["images"]) == 2


DENSE = """
import torch
from tome_export.spec import Preprocessing

class Head(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        self.backbone = Dinov2Model(Dinov2Config(image_size=56, patch_size=14, **sizes))
        self.head = torch.nn.Conv2d(32, channels, 1)

    def forward(self, pixel_values):
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]
        return {"seen": self.head(tokens.transpose(1, 2).unflatten(2, (4, 4)))}

def made(channels):
    how = Preprocessing((3, 56, 56), (0.5,) * 3, (0.25,) * 3, 1.0, "bicubic")
    return Head(channels).eval(), how

def grey():
    return made(1)

def classes():
    return made(3)
"""


@pytest.fixture(scope="module", params=["grey", "classes"])
def dense(request, tmp_path_factory):
    """The artifact of a whole model with a head of one channel, or three, and the model itself."""
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    folder = tmp_path_factory.mktemp("dense")
    (folder / f"predict_{request.param}.py").write_text(DENSE)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        made = BuildRequest(
            f"predict_{request.param}:{request.param}",
            folder / "built",
            schedule=Schedule(0),
            engine="none",
            check=False,
        )
        artifact = build(made)
    code: dict = {}
    exec(DENSE, code)  # noqa: S102 (the same model, without this package's loader)
    return artifact, *code[request.param]()


def test_maps_are_those_of_the_model_and_drawn(run, dense, photographs, tmp_path):
    import torch

    artifact, model, preprocessing = dense
    whole = [photographs / f"{index}.png" for index in (0, 1, 3, 4)]
    with torch.inference_mode():
        expected = model(torch.from_numpy(load_images(whole, preprocessing)))["seen"].numpy()
    ran = run("predict", artifact.path, photographs, "-o", "maps", "--raw", "--json")
    assert ran.code == 3
    assert [one["name"] for one in ran.json["failed"]] == [f"{photographs}/2.png"]
    files = [f"{index}.{end}" for index in (0, 1, 3, 4) for end in ("npy", "png")]
    assert names(tmp_path / "maps") == [*files, "predict.json"]
    for values, one in zip(expected, ran.json["images"], strict=True):
        found = np.load(tmp_path / "maps" / one["raw"])
        np.testing.assert_allclose(found, values, atol=1e-4)
        assert (one["low"], one["high"]) == (found.min(), found.max())
        with Image.open(tmp_path / "maps" / one["file"]) as picture:
            drawn = np.asarray(picture)
        if len(values) == 1:
            scaled = (found[0] - one["low"]) / (one["high"] - one["low"])
            np.testing.assert_allclose(drawn, 255 * scaled, atol=0.6)
            assert one["labels"] is None
        else:
            assert drawn.tolist() == found.argmax(axis=0).tolist()
            shares = {label["index"]: label["score"] for label in one["labels"]}
            assert shares == {i: (drawn == i).mean() for i in range(3) if (drawn == i).any()}
    again = run("predict", artifact.path, whole[0], "-o", "maps")
    assert (again.code, names(tmp_path / "maps")) == (3, [*files, "predict.json"])
    assert again.error.endswith("maps exists; give another directory, or --force to replace it")
    again = run("predict", artifact.path, whole[0], "-o", "maps", "--force")
    assert again.code == 0, again.err
    assert names(tmp_path / "maps") == ["0.png", "predict.json"]
    assert "cut to 56 x 56 around the centre" in again.out
    (tmp_path / "maps" / "mine.txt").touch()
    assert run("predict", artifact.path, whole[0], "-o", "maps", "--force").code == 3
    printed = run("predict", artifact.path, whole[0])
    assert printed.code == 0
    assert f"{len(values)}x4x4" in printed.out
    assert run("predict", artifact.path, photographs / "2.png", "-o", "none").code == 3
    assert names(tmp_path) == ["maps", "photos"]
