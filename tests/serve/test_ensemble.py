"""Encoded images in, labels out: on the real server, against ONNX Runtime.

The server at hand may have no ONNX Runtime backend; our stand-in then runs the model itself.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from image_bombs import progressive
from PIL import Image
from server_rules import problems
from timm.data import create_transform

from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.data.preprocess import load_images
from tome_export.data.samples import _digits, sample_paths
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.serve.config import ServeOptions, model_folders
from tome_export.serve.ensemble import pipeline_folders
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.repository import write
from tome_export.serve.server import RunRequest, running
from tome_export.spec import BatchRange

NAME = "vit_digits_r8"
PIPELINE, PREPROCESS = f"{NAME}_pipeline", f"{NAME}_preprocess"
TOWER = "tower_r2"
TOWER_BATCH = 2

TOWER_MODULE = """
import timm
import torch

def made():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0).eval()
"""


class Served(NamedTuple):
    http: str
    grpc: str
    artifacts: dict[str, Artifact]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    digits = BuildRequest("vit_digits", folder / NAME, schedule=Schedule(r=8))
    batch = BatchRange(*[TOWER_BATCH] * 3)
    tower = BuildRequest("serve_tower:made", folder / TOWER, Schedule(r=2), batch=batch)
    (folder / "serve_tower.py").write_text(TOWER_MODULE)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        return {
            name: build(replace(request, engine="none", check=False))
            for name, request in {NAME: digits, TOWER: tower}.items()
        }


@pytest.fixture(scope="module")
def served(request, artifacts, tmp_path_factory) -> Served:
    request.getfixturevalue("installation")
    repository = tmp_path_factory.mktemp("repository")
    options = ServeOptions()
    folders = []
    for name, artifact in artifacts.items():
        folders += model_folders(model_file_from_artifact(artifact), name, options)
        folders += pipeline_folders(artifact, name, options)
    for folder in folders:
        assert [*problems(folder.config, folder, [other.name for other in folders])] == []
    write(repository, folders)
    with running(RunRequest(repository, gpu=False)) as server:
        yield Served(server.http, server.grpc, artifacts)
        server.stop(0)


@pytest.fixture
def grpc(served):
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(served.grpc) as client:
        yield client


@pytest.fixture(params=["grpc", "http"])
def client(request, served):
    """A client's module and a client, of each protocol."""
    import tritonclient.grpc
    import tritonclient.http

    module = {"grpc": tritonclient.grpc, "http": tritonclient.http}[request.param]
    with module.InferenceServerClient(getattr(served, request.param)) as made:
        yield module, made


def image_input(module, images, shape=None):
    array = np.array(images, dtype=object).reshape(shape or (len(images), 1))
    tensor = module.InferInput("image", list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return [tensor]


def ort(artifact, pixels):
    session = onnxruntime.InferenceSession(
        str(artifact.model_path), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"pixel_values": pixels})[0]


def photos():
    return [path.read_bytes() for path in sample_paths()]


def digits(count=32):
    """PNG files of digits that the model was not trained on, and what they show."""
    images, labels = _digits()
    files = []
    for image in images[:count]:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        files.append(stream.getvalue())
    return files, labels[:count]


def pixels_of(artifact, files, folder):
    paths = [folder / f"{index}.png" for index in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return load_images(paths, artifact.manifest.preprocessing)


BAD_REQUEST = ("StatusCode.INVALID_ARGUMENT", "400")


def refused(client, inputs, model=PREPROCESS):
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs)
    assert caught.value.status() in BAD_REQUEST
    assert "\n" not in caught.value.message()
    return caught.value.message()


def test_preprocessing_is_pytorchs_exactly(served, client):
    module, made = client
    p = served.artifacts[NAME].manifest.preprocessing
    transform = create_transform(
        p.input_size,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
        crop_mode="center",
    )
    answer = made.infer(PREPROCESS, image_input(module, photos())).as_numpy("pixel_values")
    assert answer.dtype == np.float32
    ours = torch.from_numpy(answer.copy())
    expected = torch.stack([transform(Image.open(p).convert("L")) for p in sample_paths()])
    assert torch.equal(ours, expected)
    np.testing.assert_array_equal(answer, load_images(sample_paths(), p))


def test_pipeline_gives_the_labels_of_ort(served, client, tmp_path):
    module, made = client
    files, labels = digits()
    artifact = served.artifacts[NAME]
    logits = ort(artifact, pixels_of(artifact, files, tmp_path))
    scores = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    answer = made.infer(PIPELINE, image_input(module, files))
    index, score = answer.as_numpy("index"), answer.as_numpy("score")
    assert (index.shape, index.dtype, score.dtype) == ((32, 5), np.int32, np.float32)
    np.testing.assert_array_equal(index, np.argsort(-logits, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(score, np.take_along_axis(scores, index, 1), atol=1e-5)
    names = np.array(artifact.manifest.labels)[index]
    np.testing.assert_array_equal(answer.as_numpy("label").astype(str), names)
    assert (index[:, 0] == labels).mean() > 0.9


def test_tower_of_fixed_batch_gives_features(served, client):
    module, made = client
    artifact = served.artifacts[TOWER]
    p = artifact.manifest.preprocessing
    pixels = load_images(sample_paths()[:TOWER_BATCH], p)
    expected = ort(artifact, pixels)
    for rows in range(1, TOWER_BATCH + 1):
        inputs = image_input(module, photos()[:rows])
        answer = made.infer(f"{TOWER}_pipeline", inputs).as_numpy("features")
        np.testing.assert_allclose(answer, expected[:rows], rtol=1e-4, atol=1e-5)


def test_images_of_a_request_go_through_in_one_inference(grpc, counts):
    import tritonclient.grpc

    models = (PREPROCESS, NAME, f"{NAME}_postprocess")
    before = {model: counts(grpc, model) for model in models}
    grpc.infer(PIPELINE, image_input(tritonclient.grpc, photos()))
    for model in models:
        assert (counts(grpc, model) - before[model]).tolist() == [len(photos()), 1], model


def test_a_slow_image_and_a_bad_one_are_nothing_to_the_others(grpc):
    """They are answered, each by itself, while the slow one is still decoded."""
    import tritonclient.grpc

    slow = progressive(8000, 60)
    files = digits(23)[0]
    alone = [grpc.infer(PIPELINE, image_input(tritonclient.grpc, [f])) for f in files]
    files[7] = files[7][:60]
    order: list[int] = []
    waiting = [
        _async(grpc, file, lambda n=n: order.append(n)) for n, file in enumerate([slow, *files], -1)
    ]
    first, *answers = [future() for future in waiting]
    assert not isinstance(first, str)
    assert order[-1] == -1
    assert "cannot be decoded" in answers[7]
    for index, (answer, expected) in enumerate(zip(answers, alone, strict=True)):
        if index != 7:
            for name in ("label", "index"):
                np.testing.assert_array_equal(answer.as_numpy(name), expected.as_numpy(name))


def _async(grpc, file, on_done):
    """Send a request; returns a function that waits for its result or error message."""
    import queue

    import tritonclient.grpc

    done = queue.Queue()

    def take(result, error):
        on_done()
        done.put(error.message() if error else result)

    grpc.async_infer(PIPELINE, image_input(tritonclient.grpc, [file]), take)
    return lambda: done.get(timeout=60)


def bad_images():
    huge = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(huge, "PNG")
    return {
        "truncated": (photos()[0][:9000], "image cannot be decoded (image file is truncated"),
        "text": (b"hello", "image is not a JPEG or PNG file (it begins with b'hello')"),
        "empty": (b"", "image is empty; expected the bytes of a JPEG or PNG file"),
        "huge": (huge.getvalue(), "image is 10000 x 10000 pixels (100.0 megapixels); at most 64.0"),
    }


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "huge"])
def test_bad_image_is_an_error_of_its_request(client, kind):
    module, made = client
    data, message = bad_images()[kind]
    good = photos()[1]
    for model in (PREPROCESS, PIPELINE):
        assert message in refused(made, image_input(module, [data]), model)
        several = refused(made, image_input(module, [good, data, good]), model)
        assert message.replace("image", "image 2 of 3", 1) in several
        assert made.infer(model, image_input(module, [good])).get_response() is not None


@pytest.mark.parametrize(
    ("count", "shape"), [(0, (0, 1)), (2, (1, 2)), (33, (33, 1))], ids=["none", "wide", "many"]
)
def test_wrong_batch_is_an_error_of_its_request(client, count, shape):
    module, made = client
    good = photos()[1]
    message = refused(made, image_input(module, [good] * count, shape), PIPELINE)
    assert "image" in message or "batch" in message
    answer = made.infer(PIPELINE, image_input(module, [good]))
    assert answer.as_numpy("label").shape == (1, 5)


def test_only_the_outputs_asked_for_are_given(client):
    module, made = client
    wanted = [module.InferRequestedOutput("index")]
    answer = made.infer(PIPELINE, image_input(module, digits(2)[0]), outputs=wanted)
    assert answer.as_numpy("index").shape == (2, 5)
    assert answer.as_numpy("score") is None


def test_options_reach_every_config(artifacts):
    options = ServeOptions(version=3, instances=2, max_queue_size=7, timeout_ms=40)
    *steps, pipeline = pipeline_folders(artifacts[NAME], NAME, options)
    for folder in steps:
        assert all(name.startswith("3/") for name in folder.files)
        assert folder.config.instance_group[0].count == 2
        # What decodes takes requests one by one: one that lies about its bytes is alone with that.
        batches = folder.config.HasField("dynamic_batching")
        assert batches is not folder.name.endswith("_preprocess")
        assert not folder.config.dynamic_batching.HasField("default_queue_policy")
    assert [*pipeline.files] == ["3/README"]
    assert pipeline.config.max_batch_size == 32


def test_batch_of_the_served_file_counts(artifacts):
    folders = pipeline_folders(artifacts[NAME], NAME, ServeOptions(), 4)
    assert [folder.config.max_batch_size for folder in folders] == [4, 4, 4]


def changed(artifact, **entries):
    manifest = artifact.manifest
    if "output" in entries:
        output = manifest.output.model_copy(update=entries["output"])
        entries |= {"output": output, "outputs": (output, *manifest.outputs[1:])}
    if "preprocessing" in entries:
        recipe = replace(manifest.preprocessing, **entries["preprocessing"])
        entries |= {"preprocessing": recipe}
    return Artifact(artifact.path, manifest.model_copy(update=entries))


def test_models_without_label_names_have_their_indices(artifacts):
    folders = pipeline_folders(changed(artifacts[NAME], labels=None), NAME, ServeOptions())
    settings = json.loads(folders[1].files["1/postprocessing.json"])
    assert settings == {
        "k": 5,
        "labels": [str(index) for index in range(10)],
        "activation": "softmax",
    }


def test_fewer_classes_than_labels_shown(artifacts):
    two = changed(artifacts[NAME], labels=["no", "yes"], output={"shape": ["batch", 2]})
    _, post, pipeline = pipeline_folders(two, NAME, ServeOptions())
    assert json.loads(post.files["1/postprocessing.json"])["k"] == 2
    assert [list(tensor.dims) for tensor in pipeline.config.output] == [[2]] * 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"preprocessing": {"input_size": [4, 32, 32]}}, "takes 4 channels; images can be given"),
        ({"labels": ["one"]}, r"has logits \[10\] and 1 labels; expected one logit per label"),
        ({"output": {"shape": ["batch", 7, 10]}}, r"has logits \[7, 10\] and 10 labels"),
    ],
)
def test_artifact_that_takes_no_images_is_refused(artifacts, entries, message):
    with pytest.raises(InputError, match=message):
        pipeline_folders(changed(artifacts[NAME], **entries), NAME, ServeOptions())


def test_sources_are_those_of_the_package(artifacts):
    """What is tested without a server is what the server runs."""
    from tome_export.serve import python_models

    folder = Path(python_models.__file__).parent
    folders = pipeline_folders(artifacts[NAME], NAME, ServeOptions())
    for made, name in zip(folders, ("preprocess.py", "postprocess.py"), strict=False):
        assert made.files["1/model.py"] == folder / name


def test_bytes_shorter_than_they_say_fail_their_own_request_only(served):
    """The server refuses all requests that a model takes together with such a one."""
    from concurrent.futures import ThreadPoolExecutor

    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    files, _ = digits(1)

    def ask(number):
        with InferenceServerClient(served.grpc) as client:
            tensor = InferInput("image", [1, 1], "BYTES")
            if number % 3:
                tensor.set_data_from_numpy(np.array([[files[0]]], np.object_))
            else:
                tensor._raw_content = b"\xff\xff\xff\x7fx"
            try:
                client.infer(PIPELINE, [tensor])
            except InferenceServerException as error:
                return error.message()
        return ""

    with ThreadPoolExecutor(12) as pool:
        said = [*pool.map(ask, range(120))]
    assert {s for number, s in enumerate(said) if number % 3} == {""}
    assert all("incomplete string data" in s for s in said[::3])
