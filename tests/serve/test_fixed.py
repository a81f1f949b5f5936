"""Models of one batch size, and what fills requests up to it, on the real server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tome_export.artifact import Artifact
from tome_export.data.pixels import pixels_from_bytes
from tome_export.errors import InputError, UsageError
from tome_export.serve.client import connect
from tome_export.serve.config import ServeOptions, model_folders
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.names import check_chosen_name
from tome_export.serve.python_models.fixed import pad_to_batch
from tome_export.serve.repository import write
from tome_export.serve.server import RunRequest, running

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

BATCH = 4
NAME, MODEL = "small_r8", "small_r8_fixed"
LABELS = ("a", "b", "c", "d", "e")
PIXELS = np.random.default_rng(1).standard_normal((50, 3, 8, 8), dtype=np.float32)


class Served(NamedTuple):
    grpc: str
    versions: list[Path]
    routed: Path


@pytest.fixture(scope="module")
def served(request, by_hand, tmp_path_factory):
    """Two versions of one model of batch 4, one with a pipeline, and a router of two others."""
    request.getfixturevalue("installation")
    folder = tmp_path_factory.mktemp("fixed")
    made = [
        by_hand.write_artifact(folder / str(seed), batch=str(BATCH), labels=LABELS, seed=seed)
        for seed in (0, 1)
    ]
    routed = [
        by_hand.write_artifact(
            folder / f"r{r}", batch=str(BATCH), model="two", r=[r], schedule=f"r={r} constant"
        )
        for r in (0, 4)
    ]
    repository = folder / "repository"
    for version, artifact in enumerate(made, 1):
        options = ServeOptions(version=version, preprocess=version == len(made))
        serve(ServeRequest((artifact,), repository, options))
    serve(ServeRequest(tuple(routed), repository, ServeOptions(max_queue_delay_us=20_000)))
    with running(RunRequest(repository, http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield Served(server.grpc, made, routed[-1])
        server.stop(0)


@pytest.fixture
def client(served):
    with connect(served.grpc) as made:
        yield made


@pytest.fixture
def grpc(served):
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(served.grpc) as made:
        yield made


def ort(artifact, pixels, batch=BATCH):
    """What ONNX Runtime gives for full batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        artifact / "model.onnx", providers=["CPUExecutionProvider"]
    )
    padded = np.concatenate([pixels, np.zeros((-len(pixels) % batch, 3, 8, 8), np.float32)])
    batches = padded.reshape(-1, batch, 3, 8, 8)
    logits = [session.run(["logits"], {"pixel_values": batch})[0] for batch in batches]
    return np.concatenate(logits)[: len(pixels)]


def test_single_requests_share_full_batches(served, grpc, counts):
    names = ("two_r4", "two_r4_fixed")
    before = {name: counts(grpc, name) for name in names}

    def ask(part):
        with connect(served.grpc) as client:
            return client.infer("two_r4", {"pixel_values": part})["logits"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, np.split(PIXELS, len(PIXELS))))
    expected = ort(served.routed, PIXELS)
    np.testing.assert_allclose(np.concatenate(answers), expected, rtol=1e-6, atol=1e-6)
    batching, model = (counts(grpc, name) - before[name] for name in names)
    assert batching[0] == len(PIXELS)
    # One request to the model for each batch, and fewer batches than requests.
    assert model.tolist() == [batching[1], batching[1]]
    assert len(PIXELS) / BATCH <= model[0] < len(PIXELS)


def test_the_model_behind_takes_its_batch_only(client):
    assert client.tensors(MODEL)[0]["pixel_values"]["shape"] == [BATCH, 3, 8, 8]
    assert client.tensors(NAME)[0]["pixel_values"]["shape"] == [-1, 3, 8, 8]
    for rows in (1, 3, 5):
        with pytest.raises(InputError, match=r"unexpected shape .* Expected \[4,3,8,8\]"):
            client.infer(MODEL, {"pixel_values": PIXELS[:rows]})
    with pytest.raises(InputError, match="batch-size must be <= 4"):
        client.infer(NAME, {"pixel_values": PIXELS[:5]})


@pytest.mark.parametrize("rows", range(1, BATCH + 1))
def test_requests_of_several_images(served, client, rows):
    answer = client.infer(NAME, {"pixel_values": PIXELS[:rows]})["logits"]
    expected = ort(served.versions[-1], PIXELS[:rows])
    np.testing.assert_allclose(answer, expected, rtol=1e-6, atol=1e-6)


def test_each_version_asks_its_own(served, grpc):
    import tritonclient.grpc

    given = tritonclient.grpc.InferInput("pixel_values", [1, 3, 8, 8], "FP32")
    given.set_data_from_numpy(PIXELS[:1])
    answers = [
        grpc.infer(NAME, [given], model_version=version).as_numpy("logits")
        for version in ("1", "2")
    ]
    for artifact, answer in zip(served.versions, answers, strict=True):
        np.testing.assert_allclose(answer, ort(artifact, PIXELS[:1]), rtol=1e-6, atol=1e-6)
    assert np.abs(answers[0] - answers[1]).max() > 0.1


def test_pipeline_of_single_images(served, client, tmp_path):
    Image.fromarray((np.arange(192) % 256).astype(np.uint8).reshape(8, 8, 3)).save(
        tmp_path / "x.png"
    )
    data = (tmp_path / "x.png").read_bytes()
    pipeline = client.pipeline(NAME)
    answer = client.infer(pipeline, {"image": np.array([[data]], object)})
    artifact = served.versions[-1]
    settings = asdict(Artifact.open(artifact).manifest.preprocessing) | {"max_pixels": 1000}
    logits = ort(artifact, pixels_from_bytes(data, settings)[None])
    assert answer["label"][0, 0].decode() == LABELS[int(logits.argmax())]


def test_router_over_fixed_batches(client):
    assert client.routes("two_router") == ("two_r0", "two_r4")
    for r in (0, 4):
        routed = client.infer("two_router", {"pixel_values": PIXELS[:3]}, parameters={"r": r})
        own = client.infer(f"two_r{r}", {"pixel_values": PIXELS[:3]})
        np.testing.assert_array_equal(routed["logits"], own["logits"])


@pytest.mark.usefixtures("installation")
def test_an_error_of_the_model_is_the_answer_to_every_request(make_artifact, by_hand, tmp_path):
    source = model_file_from_artifact(Artifact.open(make_artifact(batch="4")))
    options = ServeOptions(max_queue_delay_us=200_000)
    repository = tmp_path / "repository"
    write(repository, model_folders(source, "x", options)[-1:])
    by_hand.write_refusing(repository, "x_fixed")
    with running(RunRequest(repository)) as server:

        def ask(part):
            with connect(server.grpc) as client, pytest.raises(InputError, match="not today"):
                client.infer("x", {"pixel_values": part})

        with ThreadPoolExecutor(BATCH) as pool:
            for _ in range(3):
                assert len([*pool.map(ask, np.split(PIXELS[:BATCH], BATCH))]) == BATCH
        assert server.is_alive()
        server.stop(0)


def test_rows_are_filled_up_with_the_last():
    parts = [np.arange(2).reshape(1, 2), np.arange(2, 6).reshape(2, 2)]
    assert pad_to_batch(parts, 4).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert pad_to_batch(parts, 3).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_queue_and_labels_are_those_of_the_batching_model(make_artifact):
    source = model_file_from_artifact(Artifact.open(make_artifact(batch="4", labels=LABELS)))
    options = ServeOptions(instances=2, max_queue_delay_us=70, max_queue_size=9)
    model, batching = model_folders(source, "x", options)
    assert (model.name, batching.name) == ("x_fixed", "x")
    assert [folder.config.max_batch_size for folder in (model, batching)] == [0, BATCH]
    assert not model.config.HasField("dynamic_batching")
    queue = batching.config.dynamic_batching
    assert queue.max_queue_delay_microseconds == 70
    assert queue.default_queue_policy.max_queue_size == 9
    assert [f.config.instance_group[0].count for f in (model, batching)] == [2, 3]
    assert [f.config.output[0].label_filename for f in (model, batching)] == ["", "labels.txt"]
    assert "labels.txt" in batching.files
    assert "labels.txt" not in model.files
    assert json.loads(batching.files["1/fixed.json"]) == {"model": "x_fixed"}


def test_what_is_said(make_artifact, tmp_path):
    done = serve(ServeRequest((make_artifact(batch="4"),), tmp_path / "repository"))
    assert [model.name for model in done.models] == [MODEL, NAME]
    assert done.entry == NAME
    assert done.notes == (
        f"{MODEL} takes batches of exactly 4; {NAME} takes 1 to 4 images of any number of "
        "requests and fills them up for it",
    )
    with pytest.raises(UsageError, match="names that end in _fixed are given to models made"):
        check_chosen_name("mine_fixed")


RANGE, ONE_SIZE = {}, {"batch": "4"}
FILES = {NAME: "model.onnx"}, {NAME: "model.py", MODEL: "model.onnx"}
LEFT = (
    f"{NAME} holds its file itself now, and servers go on loading {MODEL}, which filled batches up "
    "for it: remove that folder"
)


@pytest.mark.parametrize(("first", "then"), [(0, 1), (1, 0)])
def test_from_a_range_to_one_size_and_back(make_artifact, tmp_path, first, then):
    """What is said first is what helps, and what nobody asks any more is named."""
    repository = tmp_path / "repository"
    made = [make_artifact(**changes) for changes in (RANGE, ONE_SIZE)]

    def served():
        return {
            path.name: next(
                name for name in ("model.onnx", "model.py") if (path / "1" / name).exists()
            )
            for path in repository.iterdir()
        }

    serve(ServeRequest((made[first],), repository))
    said = (
        r"small_r8 has version 1 with another platform, batch, inputs or outputs, and versions "
        r"share one config; give another --name, or --version 1 --force to replace that one"
    )
    for version in (None, 2):
        with pytest.raises(InputError, match=said):
            serve(ServeRequest((made[then],), repository, ServeOptions(version=version)))
    assert served() == FILES[first]
    request = ServeRequest((made[then],), repository, ServeOptions(version=1), force=True)
    done = serve(request)
    assert served() == {**FILES[first], **FILES[then]}
    assert (LEFT in done.notes) == (then == 0)
    assert serve(request).notes == done.notes


@pytest.mark.usefixtures("installation")
def test_a_batch_of_one_is_the_file_itself_until_models_ask_it(by_hand, tmp_path):
    repository = tmp_path / "repository"
    artifacts = [
        by_hand.write_artifact(tmp_path / name, batch="1", model=name, labels=LABELS)
        for name in ("alone", "asked")
    ]
    options = ServeOptions(max_queue_size=9)
    alone = serve(ServeRequest((artifacts[0],), repository, options))
    assert [model.name for model in alone.models] == ["alone_r8"]
    assert alone.notes == ()
    asked = serve(ServeRequest((artifacts[1],), repository, ServeOptions(preprocess=True)))
    assert asked.notes == (
        "asked_r8_fixed takes one image at a time; asked_r8 hands them on to it for pipelines, "
        "routers and cascades, which can ask only models that the server batches",
    )
    again = serve(ServeRequest((artifacts[1],), repository))  # its pipeline is there
    assert [(m.name, m.status) for m in again.models] == [
        ("asked_r8_fixed", "unchanged"),
        ("asked_r8", "unchanged"),
    ]
    with running(RunRequest(repository, gpu=False)) as server:
        with connect(server.grpc) as client:
            for model in ("alone_r8", "asked_r8"):
                answer = client.infer(model, {"pixel_values": PIXELS[:1]})["logits"]
                expected = ort(artifacts[0], PIXELS[:1], batch=1)
                np.testing.assert_allclose(answer, expected, rtol=1e-6, atol=1e-6)
            with pytest.raises(InputError, match=r"Expected \[1,3,8,8\]"):
                client.infer("alone_r8", {"pixel_values": PIXELS[:2]})
            assert client.pipeline() == "asked_r8_pipeline"
        server.stop(0)


def test_a_batch_of_one_gets_its_pipeline_later(make_artifact, tmp_path):
    """The same file goes on being served, by the model behind: nothing is lost."""
    repository, artifact = tmp_path / "repository", make_artifact(batch="1")
    serve(ServeRequest((artifact,), repository))
    serve(ServeRequest((artifact,), repository, ServeOptions(preprocess=True)))
    assert sorted(path.name for path in repository.iterdir()) == [
        NAME,
        MODEL,
        f"{NAME}_pipeline",
        f"{NAME}_postprocess",
        f"{NAME}_preprocess",
    ]
    holds = {name: next((repository / name / "1").glob("model.*")).name for name in (NAME, MODEL)}
    assert holds == {NAME: "model.py", MODEL: "model.onnx"}
    other = tmp_path / "other"
    serve(ServeRequest((artifact,), other))
    request = ServeRequest(
        (make_artifact(batch="1", seed=1),), other, ServeOptions(preprocess=True)
    )
    with pytest.raises(InputError, match="give another --name, or --version 1 --force"):
        serve(request)
