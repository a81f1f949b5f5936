"""Decoding by DALI: the config, what is refused, and the pipeline where DALI is installed."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tome_export.artifact import Artifact
from tome_export.data import pixels
from tome_export.data.samples import sample_paths
from tome_export.errors import InputError
from tome_export.serve.client import encoded_file
from tome_export.serve.config import PYTHON_MODELS, ServeOptions, config_from_text, config_text
from tome_export.serve.dali import dali_folder, path_note
from tome_export.serve.ensemble import pipeline_folders
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.repository import write
from tome_export.serve.self_test import sample_image, sample_request
from tome_export.spec import Preprocessing

OPTIONS = ServeOptions(preprocess=True, dali=True)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_the_pipeline_takes_bytes_of_any_length(make_artifact, tmp_path):
    folders = pipeline_folders(Artifact.open(make_artifact()), "m", OPTIONS)
    write(tmp_path / "repository", folders)
    model = tmp_path / "repository" / "m_preprocess"
    config = config_from_text((model / "config.pbtxt").read_text(), "it")
    assert config == folders[0].config
    assert (config.backend, config.max_batch_size) == ("dali", 8)
    (image,) = config.input
    assert (image.name, [*image.dims], image.allow_ragged_batch) == ("image", [-1], True)
    assert [*config.output[0].dims] == [3, 8, 8]
    assert {path.name for path in (model / "1").iterdir()} == {"dali.py", "preprocessing.json"}
    settings = json.loads((model / "1" / "preprocessing.json").read_text())
    assert (settings["max_batch"], settings["device"]) == (8, "mixed")
    ensemble = folders[-1].config
    assert ensemble.input[0].data_type == image.data_type
    assert "allow_ragged_batch" not in config_text(ensemble)
    request = sample_request(folders, ensemble)
    assert request["image"].tobytes() == sample_image()
    assert encoded_file(b"abc", "UINT8", 2).tolist() == [[97, 98, 99]]
    assert encoded_file(b"abc", "BYTES", 2).tolist() == [[b"abc"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (1, 8, 8)}, "images of 1 channels"),
        ({"resize": "pad"}, "images resized by the rule «pad»"),
        ({"interpolation": "nearest"}, "images resized by the filter «nearest»"),
        ({"crop_pct": 1.1}, r"images with borders \(crop_pct above 1\)"),
    ],
)
def test_what_dali_does_otherwise_is_refused(changes, message, make_artifact):
    manifest = Artifact.open(make_artifact()).manifest
    recipe = replace(manifest.preprocessing, **changes)
    manifest = manifest.model_copy(update={"preprocessing": recipe})
    with pytest.raises(InputError, match=f"the model takes {message}, which DALI"):
        dali_folder(manifest, "m_preprocess", OPTIONS, 8, [])


def test_a_path_that_the_backend_does_not_take_is_said(make_artifact, tmp_path):
    options = ServeOptions(name="m", preprocess=True, dali=True)
    done = serve(ServeRequest((make_artifact(),), tmp_path / "my models", options))
    (said,) = [note for note in done.notes if "DALI" in note]
    assert f"{tmp_path}/my models has to be another where it is served" in said
    assert path_note(Path("/models/v1.0_a")) == ""


def test_a_name_that_the_backend_does_not_take_is_refused(make_artifact, tmp_path):
    options = replace(OPTIONS, name="vit-b16")
    with pytest.raises(InputError, match="vit-b16_preprocess; DALI's backend takes letters"):
        serve(ServeRequest((make_artifact(),), tmp_path / "repository", options))
    assert not (tmp_path / "repository").exists()


class Numbers:
    """What the pipeline asks of DALI's arithmetic, by NumPy."""

    FLOAT64 = np.float64
    INTERP_LINEAR = INTERP_CUBIC = None
    max, min, floor = (staticmethod(f) for f in (np.maximum, np.minimum, np.floor))

    @staticmethod
    def cast(value, dtype):
        return np.asarray(value).astype(dtype)


def load(folder, recipe, **settings):
    """The pipeline's module for a recipe, from a folder as the server has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dali.py").write_bytes((PYTHON_MODELS / "dali.py").read_bytes())
    given = {**asdict(recipe), "max_batch": 8, "threads": 1, "device": "cpu", **settings}
    (folder / "preprocessing.json").write_text(json.dumps(given))
    spec = importlib.util.spec_from_file_location("dali_pipeline", folder / "dali.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = [
    Preprocessing((3, 224, 224), MEAN, STD, 0.9, "bicubic"),
    Preprocessing((3, 160, 96), MEAN, STD, 0.875, "bilinear", crop_offset="floor"),
    Preprocessing((3, 96, 160), MEAN, STD, 0.95, "bicubic", resize="squash"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.input_size}-{r.resize}")
def test_sizes_are_ours_exactly(recipe, tmp_path, monkeypatch):
    """Its arithmetic, run by NumPy, gives the sizes that ``pixels.py`` resizes to."""
    package = ModuleType("nvidia.dali")
    package.fn = package.types = package.math = Numbers
    package.pipeline_def = lambda **_: lambda function: function
    plugin = SimpleNamespace(autoserialize=lambda function: function)
    names = ("nvidia", "nvidia.dali", "nvidia.dali.plugin", "nvidia.dali.plugin.triton")
    for name, module in zip(names, (ModuleType("nvidia"), package, package, plugin), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    module = load(tmp_path, recipe)
    height, width = np.random.default_rng(0).integers(30, 5000, (2, 20_000))
    found = np.stack(module.resized(height.astype(np.float64), width.astype(np.float64)))
    targets = [int(side / recipe.crop_pct) for side in recipe.input_size[1:]]
    sizes = zip(width.tolist(), height.tolist(), strict=True)
    expected = [pixels._resized(size, *targets, recipe.resize)[::-1] for size in sizes]
    np.testing.assert_array_equal(found.T, expected)
    halves = [round(number / 2) for number in range(50)]
    assert module.rounded(np.arange(50) / 2).tolist() == halves


@pytest.mark.parametrize("form", ["float32", "uint8", "uint8-nchw"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.input_size}-{r.resize}")
def test_pixels_are_near_ours(recipe, form, tmp_path):
    """Run by DALI itself, on the CPU."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip: nvidia-dali-cuda130)")
    recipe = replace(recipe, form=form)
    files = []
    for path, size in zip(sample_paths(), [(640, 480), (333, 777), (1280, 961)], strict=False):
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).convert("RGB").resize(size).save(stream, "JPEG", quality=90, exif=exif)
        files.append(stream.getvalue())
    pipeline = load(tmp_path, recipe).preprocess(prefetch_queue_depth=1)
    pipeline.build()
    pipeline.feed_input("image", [np.frombuffer(file, np.uint8) for file in files])
    (found,) = pipeline.run()
    scale = 255 * min(STD) if form == "float32" else 1
    for number, file in enumerate(files):
        expected = pixels.pixels_from_bytes(file, asdict(recipe))
        one = np.asarray(found.at(number))
        assert (one.shape, one.dtype) == (expected.shape, expected.dtype)
        off = np.abs(one.astype(np.float32) - expected) * scale
        assert off.mean() < 0.3
        assert off.max() < 12


def test_the_router_of_sizes_reads_bytes_as_dali_takes_them():
    from tome_export.serve.python_models.router import IMAGE, TritonPythonModel

    model = TritonPythonModel.__new__(TritonPythonModel)
    model.sizes = ["8x8", "8x16"]
    model._size_of = lambda data: {b"abc": "8x8", b"ab\0": "8x16"}[bytes(data)]
    for given in (np.array([[b"abc"], [b"ab\0"]], object), np.array([[97, 98, 99], [97, 98, 0]])):
        array = given if given.dtype == object else given.astype(np.uint8)
        tensor = SimpleNamespace(as_numpy=lambda array=array: array, shape=lambda: [2, 1])
        assert model._sizes({IMAGE: tensor}, {}).tolist() == ["8x8", "8x16"]
