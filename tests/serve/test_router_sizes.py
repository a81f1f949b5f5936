"""The router of several image sizes: on the real server, with models whose answers tell them apart.

The models have one layer, with other weights for each size and r.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tome_export.artifact import Artifact, write_manifest
from tome_export.artifact.compatibility import check_one_model, shared_facts
from tome_export.artifact.manifest import read_manifest
from tome_export.data import best_size as best_size_module
from tome_export.data import headers
from tome_export.data.best_size import best_size
from tome_export.errors import InputError
from tome_export.serve.client import connect
from tome_export.serve.config import ModelFolder
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.names import ROUTES
from tome_export.serve.python_models import router
from tome_export.serve.repository import config_of
from tome_export.serve.self_test import _requests
from tome_export.serve.server import RunRequest, running

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

SIZES = [(8, 8), (8, 16), (16, 16)]
MODELS = [(SIZES[0], 0), (SIZES[0], 8), (SIZES[1], 0), (SIZES[2], 8)]
PLAIN = [f"small_{size[0]}x{size[1]}_r{r}" for size, r in MODELS]
ROUTER, IMAGE_ROUTER = "small_router", "small_router_pipeline"


def made(write, folder, size, r, **changes):
    seed = 10 * size[0] + size[1] + r
    given = {"labels": list("abcde"), "ms": 9.0 - r + size[0] * size[1] / 100, **changes}
    return write(folder, size=size, r=[r], schedule=f"r={r} constant", seed=seed, **given)


@pytest.fixture(scope="module")
def artifacts(by_hand, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        (size, r): made(by_hand.write_artifact, folder / f"{size}{r}", size, r)
        for size, r in MODELS
    }


@pytest.fixture(scope="module")
def repository(artifacts, tmp_path_factory, request):
    request.getfixturevalue("installation")
    folder = tmp_path_factory.mktemp("repository") / "models"
    done = serve(ServeRequest(tuple(artifacts.values()), folder, ServeOptions(preprocess=True)))
    assert done.entry == IMAGE_ROUTER
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with running(RunRequest(repository, gpu=False)) as started:
        yield started
        started.stop(0)


@pytest.fixture(params=["grpc", "http"])
def client(request, server):
    with connect(getattr(server, request.param), request.param) as connected:
        yield connected


def pixels_of(size, count=2):
    return np.random.default_rng(1).standard_normal((count, 3, *size), dtype=np.float32)


def logits_of(folder, pixels):
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"pixel_values": pixels})[0]


def file_of(width, height, orientation=1, kind="JPEG"):
    """An encoded image of this size when it is held upright."""
    stored = (height, width) if orientation in range(5, 9) else (width, height)
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.effect_noise(stored, 90).convert("RGB").save(stream, kind, exif=exif)
    return stream.getvalue()


def images_of(*files):
    images = np.empty((len(files), 1), np.object_)
    images[:, 0] = files
    return {"image": images}


def text_of(size):
    return "x".join(map(str, size))


@pytest.mark.parametrize(("size", "r"), MODELS)
def test_pixels_go_to_the_model_of_their_shape(client, artifacts, size, r):
    pixels = pixels_of(size)
    expected = logits_of(artifacts[size, r], pixels)
    for parameters in ({"r": r}, {"r": str(r + 7), "size": text_of(size)}):
        answer = client.infer(ROUTER, {"pixel_values": pixels}, parameters=parameters)
        np.testing.assert_allclose(answer["logits"], expected, atol=1e-4)
    # Models of one size do not agree by chance, and as fast as can be is the most merging of it.
    of_size = {o: logits_of(folder, pixels) for (s, o), folder in artifacts.items() if s == size}
    assert all(np.abs(one - expected).max() > 1e-2 for o, one in of_size.items() if o != r)
    answer = client.infer(ROUTER, {"pixel_values": pixels}, parameters={"max_ms": "0.1"})
    np.testing.assert_allclose(answer["logits"], of_size[max(of_size)], atol=1e-4)


def test_pixels_of_another_shape_are_refused_with_the_sizes(client):
    for shape in ((16, 8), (8, 9)):
        with pytest.raises(InputError) as caught:
            client.infer(ROUTER, {"pixel_values": pixels_of(shape)})
        assert (
            f"pixel_values of an image are [3, {shape[0]}, {shape[1]}]; there are 8x8 [3, 8, 8], "
            "8x16 [3, 8, 16], 16x16 [3, 16, 16]"
        ) in str(caught.value)


FILES = [
    ((8, 8), {}),
    ((16, 8), {}),
    ((8, 16), {"orientation": 6}),  # stored lying, held upright
    ((16, 8), {"orientation": 6}),
    ((40, 20), {"kind": "PNG", "orientation": 8}),
    ((500, 501), {}),
    ((5, 4), {"kind": "PNG"}),
]


@pytest.mark.parametrize(("image", "how"), FILES, ids=str)
def test_an_image_goes_to_the_size_that_wastes_least(client, image, how):
    size = best_size(image, SIZES)
    given = images_of(file_of(*image, **how))
    for r in (r for known, r in MODELS if known == size):
        direct = client.infer(f"small_{text_of(size)}_r{r}_pipeline", given)
        answer = client.infer(IMAGE_ROUTER, given, parameters={"r": r})
        for name in ("label", "score", "index"):
            np.testing.assert_array_equal(answer[name], direct[name])
    for other, r in MODELS:
        asked = client.infer(IMAGE_ROUTER, given, parameters={"r": r, "size": text_of(other)})
        direct = client.infer(f"small_{text_of(other)}_r{r}_pipeline", given)
        np.testing.assert_array_equal(asked["score"], direct["score"])


def test_images_of_one_request_are_answered_by_their_sizes_in_their_order(client):
    files = [file_of(*image, **how) for image, how in FILES]
    assert len({best_size(image, SIZES) for image, _ in FILES}) == len(SIZES)
    alone = [client.infer(IMAGE_ROUTER, images_of(file)) for file in files]
    together = client.infer(IMAGE_ROUTER, images_of(*files))
    for name, rows in together.items():
        np.testing.assert_array_equal(rows, np.concatenate([one[name] for one in alone]))


def test_what_cannot_be_decoded_fails_its_request_and_is_told_apart(client):
    cut = file_of(16, 8)[:300]
    with pytest.raises(InputError, match=r"go to size 8x16 \(2, 3\): .*image 2 of 2 cannot be"):
        client.infer(IMAGE_ROUTER, images_of(file_of(8, 8), file_of(16, 8), cut))
    with pytest.raises(InputError, match="image is not a JPEG or PNG file"):
        client.infer(IMAGE_ROUTER, images_of(b"hello"))
    assert client.infer(IMAGE_ROUTER, images_of(file_of(8, 8)))["label"].shape == (1, 5)


def test_a_bad_size_is_an_error_of_its_request(client):
    given = images_of(file_of(8, 8))
    for size, message in (
        ("9x9", "size is '9x9'; expected one of 8x8, 8x16, 16x16"),
        ("wide", "size is 'wide'; expected one of"),
        (9, "size is '9'; expected one of"),
    ):
        with pytest.raises(InputError, match=message):
            client.infer(IMAGE_ROUTER, given, parameters={"size": size})
    one = client.infer(IMAGE_ROUTER, given, parameters={"size": 16})
    same = client.infer(IMAGE_ROUTER, given, parameters={"size": "16x16"})
    np.testing.assert_array_equal(one["score"], same["score"])
    pixels = {"pixel_values": pixels_of((8, 8))}
    with pytest.raises(
        InputError, match=r"size is 16x16 and pixel_values .* \[3, 8, 8\], size 8x8"
    ):
        client.infer(ROUTER, pixels, parameters={"size": "16x16"})


def test_bytes_as_dali_takes_them_are_looked_at_too():
    model = router.TritonPythonModel()
    model.rule, model.headers, model.sizes = best_size_module, headers, ["8x8", "8x16"]
    model.settings = {"crop_pct": 1.0, "resize": "crop"}
    files = [file_of(*image, kind="PNG") for image in ((8, 8), (16, 8))]
    width = max(map(len, files))
    rows = [np.frombuffer(data.ljust(width, b"\0"), np.uint8) for data in files]
    for array in (np.stack(rows), images_of(*files)["image"]):
        tensor = SimpleNamespace(as_numpy=lambda array=array: array, shape=lambda a=array: a.shape)
        assert [*model._sizes({"image": tensor}, {})] == ["8x8", "8x16"]


def test_outputs_whose_shape_depends_on_the_size_are_not_put_together(monkeypatch):
    def ask(route, _request, inputs):
        ((_, images),) = inputs
        array = np.full((len(images), route["tokens"]), route["tokens"])
        answer = SimpleNamespace(has_error=lambda: False, array=array)
        return asyncio.sleep(0, answer)

    backend = SimpleNamespace(
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda outputs: outputs,
        get_output_tensor_by_name=lambda answer, _: SimpleNamespace(as_numpy=lambda: answer.array),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    image = SimpleNamespace(name=lambda: "image", as_numpy=lambda: np.zeros((3, 1)))
    request = SimpleNamespace(inputs=lambda: [image], requested_output_names=lambda: ["features"])
    model = router.TritonPythonModel()
    model._ask = ask

    def together(tokens):
        groups = {
            "8x8": ({"tokens": 4}, np.array([0, 2])),
            "8x16": ({"tokens": tokens}, np.array([1])),
        }
        return asyncio.run(model._answer_together(request, groups))

    message = r"whose features differ in shape \(8x8 \[4\], 8x16 \[8\]\); ask about each in a req"
    with pytest.raises(router.BadRequestError, match=message):
        together(8)
    ((name, array),) = together(4)
    assert (name, array.shape) == ("features", (3, 4))


# Repositories, without a server.


def test_the_self_test_asks_a_router_about_each_model(repository):
    folders = {name: ModelFolder(name, config_of(repository / name)) for name in (ROUTER, *PLAIN)}
    routes = {"1/routes.json": (repository / ROUTER / "1" / "routes.json").read_bytes()}
    routing = replace(folders[ROUTER], files=routes)
    asked = [
        ([*config.input[0].dims], dict(parameters))
        for config, parameters in _requests([*folders.values()], routing)
    ]
    assert asked == [
        ([3, *size], {"r": f"{r}", "size": text_of(size)})
        for size, r in sorted(MODELS, key=lambda one: (text_of(one[0]), one[1]))
    ]


def test_a_size_joins_the_router_of_another(make_artifact, tmp_path):
    models = tmp_path / "models"

    def put(*given):
        paths = [made(lambda _, **c: make_artifact(**c), None, size, r) for size, r in given]
        done = serve(ServeRequest(tuple(paths), models, ServeOptions(preprocess=True)))
        return [model.name for model in done.models if model.status == "written"]

    def routes():
        listed = json.loads((models / IMAGE_ROUTER / "1" / "routes.json").read_text())
        return [(route["model"], route["size"]) for route in listed["routes"]]

    put(((8, 8), 0), ((8, 8), 8))
    config = config_of(models / ROUTER)
    assert [*config.input[0].dims] == [3, 8, 8]
    # Alone, the router says which sizes there are by now.
    assert put(((8, 16), 0))[0] == "small_8x16_r0"
    assert routes() == [
        ("small_8x16_r0_pipeline", "8x16"),
        ("small_r0_pipeline", "8x8"),
        ("small_r8_pipeline", "8x8"),
    ]
    config = config_of(models / ROUTER)
    assert [*config.input[0].dims] == [3, 8, -1]
    assert config.parameters[ROUTES].string_value == "small_8x16_r0,small_r0,small_r8"
    with pytest.raises(InputError, match="r = 0 at 8x8; a router needs one model for each r"):
        put(((8, 8), 0))


def test_a_size_of_other_weights_is_said(make_artifact, tmp_path):
    """They may be on their way into the repository one by one, and nobody would notice else."""

    def put(size, digest, **options):
        path = made(lambda _, **c: make_artifact(**c), None, size, 0)
        manifest = read_manifest(path)
        weights = manifest.model.weights.model_copy(update={"common_sha256": digest * 64})
        model = manifest.model.model_copy(update={"weights": weights})
        write_manifest(path, manifest.model_copy(update={"model": model}))
        request = ServeRequest((path,), tmp_path / "models", ServeOptions(name="n"), **options)
        return serve(
            replace(request, options=replace(request.options, name=f"n_{text_of(size)}_r0"))
        )

    paths = [made(lambda _, **c: make_artifact(**c), None, size, 0) for size in SIZES[:2]]
    together = serve(ServeRequest(tuple(paths), tmp_path / "models", ServeOptions(name="n")))
    assert not [note for note in together.notes if "weights" in note]
    mixed = [note for note in put((16, 16), "b").notes if "weights" in note]
    assert mixed == [
        "n_router chooses among models of different weights now (n_16x16_r0; n_8x16_r0, n_8x8_r0): "
        "serve the others again too, or give this one another --name"
    ]


def test_models_of_one_size_are_called_as_before(make_artifact, tmp_path):
    path = made(lambda _, **changes: make_artifact(**changes), None, (8, 16), 8)
    done = serve(ServeRequest((path,), tmp_path / "models"))
    assert done.entry == "small_r8"
    done = serve(ServeRequest((path,), tmp_path / "named", ServeOptions(name="mine_8x16_r8")))
    assert done.entry == "mine_8x16_r8"
    # A size that was asked for is not the model's own, which may be served later.
    manifest = read_manifest(path)
    model = manifest.model.model_copy(update={"image_size": "8x16"})
    write_manifest(path, manifest.model_copy(update={"model": model}))
    done = serve(ServeRequest((path,), tmp_path / "asked"))
    assert done.entry == "small_8x16_r8"


def test_what_does_not_belong_together_is_refused(make_artifact, tmp_path):
    def refused(*changes):
        paths = tuple(make_artifact(**one) for one in changes)
        with pytest.raises(InputError) as caught:
            serve(ServeRequest(paths, tmp_path / "models"))
        assert not (tmp_path / "models").exists()
        return str(caught.value)

    assert "have different models; several artifacts served together must be of one model" in (
        refused({"size": (8, 8)}, {"size": (8, 16), "model": "other"})
    )
    assert "merge the same tokens per layer" in refused({"size": (8, 8)}, {"size": (8, 8)})
    assert "merge the same" in refused({}, {"size": (8, 16)}, {"size": (8, 16), "seed": 1})


def give_size(folder, **outputs):
    """Make an artifact say that its output has these dims."""
    manifest = read_manifest(folder)
    output = manifest.output.model_copy(update={"shape": ("batch", *outputs["logits"])})
    write_manifest(folder, manifest.model_copy(update={"output": output, "outputs": (output,)}))


def test_outputs_that_depend_on_the_size_have_open_dims(make_artifact, tmp_path):
    paths = [made(lambda _, **c: make_artifact(**c), None, size, 0, labels=None) for size in SIZES]
    for tokens, path in enumerate(paths, 7):
        give_size(path, logits=(tokens, 5))
    done = serve(ServeRequest(tuple(paths), tmp_path / "models"))
    assert done.entry == ROUTER
    config = config_of(tmp_path / "models" / ROUTER)
    assert [*config.output[0].dims] == [-1, 5]
    assert [*config.input[0].dims] == [3, -1, -1]


def test_a_cascade_is_of_one_size(make_artifact):
    members = [
        Artifact.open(made(lambda _, **c: make_artifact(**c), None, size, 0)) for size in SIZES[:2]
    ]
    with pytest.raises(InputError, match="have different image sizes; a cascade is made of"):
        check_one_model(members, shared_facts, "a cascade is made of artifacts of one model")


def test_weights_that_models_share_are_stored_once(make_artifact, tmp_path):
    paths = [made(lambda _, **c: make_artifact(**c), None, size, 0) for size in SIZES]
    for content, path in zip((b"same" * 100, b"same" * 100, b"else" * 100), paths, strict=True):
        (path / "model.onnx.data").write_bytes(content)
        write_manifest(path, read_manifest(path))
    models = tmp_path / "models"
    serve(ServeRequest(tuple(paths[1:]), models))
    serve(ServeRequest(tuple(paths[:1]), models))
    found = {path.parent.parent.name: path.stat() for path in models.rglob("*.data")}
    assert found["small_8x8_r0"].st_ino == found["small_8x16_r0"].st_ino
    assert found["small_16x16_r0"].st_ino != found["small_8x16_r0"].st_ino
    # Files of artifacts are never those of a repository.
    assert {path.stat().st_nlink for path in tmp_path.glob("artifacts/*/*.data")} == {1}
    for name, content in (("small_8x8_r0", b"same"), ("small_16x16_r0", b"else")):
        assert (models / name / "1" / "model.onnx.data").read_bytes() == content * 100
