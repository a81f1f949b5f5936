"""The router: on the real server, with models whose answers tell them apart.

The models have one layer, with other weights for each r.
"""

from __future__ import annotations

import io
import json
import queue
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tome_export.artifact import Artifact, write_manifest
from tome_export.artifact.manifest import read_manifest
from tome_export.errors import InputError
from tome_export.serve.client import connect
from tome_export.serve.config import FRONT_INSTANCES, config_from_text, file_folder
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.names import ROUTES
from tome_export.serve.repository import write
from tome_export.serve.router import (
    ROUTES_FILE,
    Route,
    RouteList,
    route_to,
    router_folder,
)
from tome_export.serve.server import RunRequest, running

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

MS = {0: 3.0, 8: 1.5}
ROUTER, IMAGE_ROUTER = "small_router", "small_router_pipeline"
BAD_REQUEST = {"grpc": "StatusCode.INVALID_ARGUMENT", "http": "400"}


@pytest.fixture(scope="module")
def artifacts(by_hand, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        r: by_hand.write_artifact(
            folder / str(r), schedule=f"r={r} constant", r=[r], seed=r, ms=ms, labels=list("abcde")
        )
        for r, ms in MS.items()
    }


@pytest.fixture(scope="module")
def server(request, artifacts, tmp_path_factory):
    request.getfixturevalue("installation")
    repository = tmp_path_factory.mktemp("repository")
    serve(ServeRequest(tuple(artifacts.values()), repository, ServeOptions(preprocess=True)))
    with running(RunRequest(repository, gpu=False)) as made:
        yield made
        made.stop(0)


@pytest.fixture(params=["grpc", "http"])
def client(request, server):
    with connect(getattr(server, request.param), request.param) as made:
        yield made


@pytest.fixture
def grpc(server):
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server.grpc) as made:
        yield made


def route(model, r, ms=None):
    return Route(model=model, r=r, ms=ms, size="8x8", shape=(3, 8, 8))


def made_pixels(count):
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8), dtype=np.float32)


def logits_of(artifacts, r, pixels):
    session = onnxruntime.InferenceSession(
        str(artifacts[r] / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"pixel_values": pixels})[0]


def images(count):
    files = np.empty((count, 1), dtype=np.object_)
    for index in range(count):
        stream = io.BytesIO()
        Image.effect_noise((16, 16), 90 + index).convert("RGB").save(stream, "PNG")
        files[index] = stream.getvalue()
    return {"image": files}


ROUTED = [
    ({}, 0),
    ({"r": 8}, 8),
    ({"r": 7}, 0),
    ({"r": "20"}, 8),
    ({"max_ms": 3}, 0),
    ({"max_ms": "2.5"}, 8),
    ({"max_ms": 1}, 8),
]


@pytest.mark.parametrize(("parameters", "r"), ROUTED, ids=str)
def test_the_model_of_the_budget_is_asked(client, grpc, artifacts, parameters, r, counts):
    pixels = made_pixels(4)
    before = counts(grpc, f"small_r{r}")
    answer = client.infer(ROUTER, {"pixel_values": pixels}, parameters=parameters)
    assert (counts(grpc, f"small_r{r}") - before).tolist() == [4, 1]
    expected = {r: logits_of(artifacts, r, pixels) for r in MS}
    np.testing.assert_allclose(answer["logits"], expected[r], atol=1e-4)
    # The two models do not agree by chance.
    assert np.abs(expected[0] - expected[8]).max() > 1e-2


def test_images_are_routed_to_the_pipelines(client, grpc, counts):
    for r in MS:
        before = counts(grpc, f"small_r{r}")
        given = images(3)
        answer = client.infer(IMAGE_ROUTER, given, parameters={"r": r})
        direct = client.infer(f"small_r{r}_pipeline", given)
        assert (counts(grpc, f"small_r{r}") - before).tolist() == [6, 2]
        for output in ("label", "score", "index"):
            np.testing.assert_array_equal(answer[output], direct[output])
    with pytest.raises(InputError, match="image is not a JPEG or PNG file"):
        client.infer(IMAGE_ROUTER, {"image": np.array([[b"hello"]], dtype=np.object_)})


def test_only_the_outputs_asked_for_are_given(grpc):
    from tritonclient.grpc import InferInput, InferRequestedOutput

    given = images(2)["image"]
    tensor = InferInput("image", list(given.shape), "BYTES")
    tensor.set_data_from_numpy(given)
    answer = grpc.infer(IMAGE_ROUTER, [tensor], outputs=[InferRequestedOutput("index")])
    assert answer.as_numpy("index").shape == (2, 5)
    assert answer.as_numpy("score") is None


def test_bad_budget_is_an_error_of_its_request(client):
    inputs = {"pixel_values": made_pixels(1)}
    for parameters, message in (
        ({"r": "fast"}, "r is 'fast'; expected a number, 0 or more"),
        ({"r": True}, "r is True; expected a number, 0 or more"),
        ({"max_ms": -1}, "max_ms is -1; expected a number, 0 or more"),
        ({"r": 1, "max_ms": 1}, "both r and max_ms are given; give one of them"),
    ):
        with pytest.raises(InputError) as caught:
            client.infer(ROUTER, inputs, parameters=parameters)
        assert message in str(caught.value)
        assert caught.value.__cause__.status() == BAD_REQUEST[client.protocol]
    assert client.infer(ROUTER, inputs)["logits"].shape == (1, 5)


def pixel_input(pixels):
    from tritonclient.grpc import InferInput

    tensor = InferInput("pixel_values", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    return [tensor]


def test_requests_of_different_budgets_are_kept_apart(artifacts, grpc, counts):
    """Requests that the router gets together are answered each by its own model."""
    pixels = made_pixels(16)
    done: list[queue.Queue] = [queue.Queue() for _ in range(16)]
    budgets = [0 if index % 3 else 8 for index in range(16)]
    before = {r: counts(grpc, f"small_r{r}")[0] for r in MS}
    for index, budget in enumerate(budgets):
        grpc.async_infer(
            ROUTER,
            pixel_input(pixels[index : index + 1]),
            lambda result, error, index=index: done[index].put(error or result),
            parameters={"r": budget},
        )
    logits = np.concatenate([d.get(timeout=30).as_numpy("logits") for d in done])
    expected = {r: logits_of(artifacts, r, pixels) for r in MS}
    rows = np.stack([expected[r][index] for index, r in enumerate(budgets)])
    np.testing.assert_allclose(logits, rows, atol=1e-4)
    after = {r: counts(grpc, f"small_r{r}")[0] - before[r] for r in MS}
    assert after == Counter(budgets)


WAITS = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({seconds})
        inputs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in inputs]
"""


@pytest.mark.usefixtures("installation")
def test_a_fast_model_does_not_wait_for_a_slow_one(by_hand, tmp_path):
    slow_seconds, routes, configs = 3, [], {}
    for r, (name, seconds) in enumerate({"slow": slow_seconds, "fast": 0}.items()):
        by_hand.write_identity(tmp_path, name, WAITS.replace("{seconds}", str(seconds)))
        text = (tmp_path / name / "config.pbtxt").read_text()
        routes.append(route(name, r))
        configs[name] = config_from_text(text, name)
    write(tmp_path, [router_folder("router", RouteList(routes=tuple(routes)), configs)])
    x = np.ones((1, 4), np.float32)
    with running(RunRequest(tmp_path)) as server:

        def ask(r):
            with connect(server.grpc) as own:
                own.infer("router", {"x": x}, parameters={"r": r})
            ended.append(r)

        ended: list[int] = []
        slow = threading.Thread(target=ask, args=(0,))
        slow.start()
        time.sleep(0.5)
        for _ in range(3):
            ask(1)
        assert ended == [1, 1, 1]
        slow.join()
        assert ended[-1] == 0
        server.stop(0)


def artifact_of(make_artifact, **changes):
    return Artifact.open(make_artifact(**changes))


def folder_of(artifact):
    return file_folder(model_file_from_artifact(artifact), "small", ServeOptions())


def config_of(artifact):
    return folder_of(artifact).config


@pytest.mark.parametrize("instances", [1, 9])
def test_config_of_a_router(make_artifact, instances):
    artifact = artifact_of(make_artifact)
    options = ServeOptions(version=3, instances=instances)
    configs = {"small": config_of(artifact)}
    listed = RouteList(routes=(route_to(artifact, "small"),))
    folder = router_folder(ROUTER, listed, configs, options)
    modules = {"best_size.py", "headers.py", "model.py"}
    assert {*folder.files} == {f"3/{name}" for name in (*modules, "routes.json")}
    assert folder.config.instance_group[0].count == max(FRONT_INSTANCES, instances)
    assert folder.config.parameters[ROUTES].string_value == "small"
    assert folder.config.max_batch_size == 8


@pytest.mark.parametrize(
    ("schedule", "layers", "r"),
    [
        ("r=8 constant", [8] * 6, 8),
        ("r=16 decreasing", [32, 10, 0, 0, 0, 0], 16),
        ("9,6,3", [9, 6, 3, 0, 0, 0], 3),
    ],
)
def test_r_of_a_route(make_artifact, schedule, layers, r):
    artifact = artifact_of(make_artifact, schedule=schedule, r=layers)
    assert route_to(artifact, "small").r == r


def test_routes_are_read_back(make_artifact, tmp_path):
    config = config_of(artifact_of(make_artifact))
    listed = RouteList(routes=(route("b", 8, 1.5), route("a", 0.5)), crop_pct=0.9, resize="squash")
    file = tmp_path / ROUTES_FILE
    folder = router_folder(ROUTER, listed, {"a": config, "b": config})
    file.write_bytes(folder.files[f"1/{ROUTES_FILE}"])
    found = RouteList.read(file)
    assert found.routes == listed.routes[::-1]
    assert (found.crop_pct, found.resize, found.sizes) == (0.9, "squash", {"8x8"})
    assert found.json_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is not valid JSON"),
        ("[]", r"is \[\], expected an object"),
        ('{"routes": [{"model": "a"}]}', r"has no routes\[0\]\.r"),
        (
            '{"routes": [{"model": 1, "r": 1, "ms": 1, "size": "8x8", "shape": []}]}',
            r"has routes\[0\].model 1, expected text",
        ),
    ],
)
def test_other_routes_are_refused(text, fault, tmp_path):
    file = tmp_path / ROUTES_FILE
    file.write_text(text)
    with pytest.raises(InputError, match=rf"{ROUTES_FILE} {fault}.*; remove the router's folder"):
        RouteList.read(file)


def test_routes_that_cannot_be_told_apart_are_refused(make_artifact):
    configs = dict.fromkeys("ab", config_of(artifact_of(make_artifact)))
    configs["t"] = config_of(artifact_of(make_artifact, batch="4"))
    for models, message in (
        ({"a": 8, "b": 8}, "models a and b both merge r = 8; a router needs one"),
        ({"a": 8, "t": 2}, "models t and a have different inputs or outputs"),
    ):
        listed = RouteList(routes=tuple(route(model, r) for model, r in models.items()))
        with pytest.raises(InputError, match=message):
            router_folder(ROUTER, listed, configs)


def test_outputs_that_depend_on_r_have_no_router_and_it_is_told(make_artifact, tmp_path):
    """The tokens of a vision tower: 47 for one r, 96 for another."""
    made = []
    for r, tokens in ((8, 47), (4, 96)):
        made.append(make_artifact(schedule=f"r={r} constant", r=[r]))
        give_tokens(made[-1], tokens)
    done = serve(ServeRequest(tuple(made), tmp_path / "repository"))
    assert [model.name for model in done.models] == ["small_r8", "small_r4"]
    assert done.entry == "small_r4"
    assert done.notes == (
        "No router: the shape of the output depends on r (small_r8 [47, 5]; small_r4 [96, 5]); ask "
        "each by its name",
    )


# Routers in a repository, to which models are added later.


def give_tokens(folder, tokens):
    """Make an artifact of classes one whose output is a number of tokens."""
    import onnx
    from onnx import helper

    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    graph.node[-1].output[0] = "flat_logits"
    graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]))
    graph.initializer.append(
        helper.make_tensor("count", onnx.TensorProto.INT64, [3], [1, tokens, 1])
    )
    graph.node.append(helper.make_node("Unsqueeze", ["flat_logits", "one"], ["row"]))
    graph.node.append(helper.make_node("Expand", ["row", "count"], ["logits"]))
    shape = ["batch", tokens, 5]
    graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, shape))
    onnx.save(model, folder / "model.onnx")
    manifest = read_manifest(folder)
    output = manifest.output.model_copy(update={"shape": tuple(shape)})
    manifest = manifest.model_copy(update={"output": output, "outputs": (output,)})
    write_manifest(folder, manifest)


@pytest.fixture
def put(make_artifact, tmp_path):
    """``put(r, ..., option=value)``: serve artifacts of these r; the names of what was written."""
    made = {}

    def call(*given, **options):
        for r in given:
            if r not in made:
                made[r] = make_artifact(
                    r=[r], schedule=f"r={r} constant", seed=r, ms=10 - r, labels=list("abcde")
                )
        artifacts = tuple(made[r] for r in given)
        result = serve(ServeRequest(artifacts, tmp_path / "models", ServeOptions(**options)))
        return [model.name for model in result.models if model.status == "written"], result.entry

    return call


@pytest.fixture
def routed(tmp_path):
    """``routed(router)``: its routes, model -> measured ms."""

    def call(name):
        text = (tmp_path / "models" / name / "1" / "routes.json").read_text()
        return {route["model"]: route["ms"] for route in json.loads(text)["routes"]}

    return call


@pytest.mark.parametrize(
    ("measured", "engines", "expected"),
    [
        (({"torch": 9, "ort-cpu": 2}, {"ort-cpu": 1}), {}, [2, 1]),
        (({"ort-cpu": 9, "ort-cuda": 2}, {"ort-cuda": 1, "ort-cpu": 8}), {}, [2, 1]),
        (({"ort-cpu": 9, "ort-cuda": 2}, {"ort-cpu": 8}), {}, [9, 8]),
        (({"ort-cuda": 2}, {"ort-cpu": 8}), {}, [None, None]),
        (({"ort-cpu": 9, "tensorrt": 2}, {"tensorrt": 1}), {"tensorrt": "1:4:8"}, [2, 1]),
        (({"ort-cpu": 9}, {"ort-cpu": 8}), {"tensorrt": "1:4:8"}, [None, None]),
    ],
)
def test_the_latency_is_that_of_one_backend_that_is_served(
    make_artifact, routed, tmp_path, measured, engines, expected
):
    made = [
        make_artifact(r=[r], schedule=f"r={r} constant", seed=r, engines=engines, ms=ms)
        for r, ms in zip((0, 8), measured, strict=True)
    ]
    serve(ServeRequest(tuple(made), tmp_path / "models"))
    assert routed(ROUTER) == dict(zip(("small_r0", "small_r8"), expected, strict=True))


def test_one_more_r_joins_the_router(put, routed):
    put(8, 4)
    assert put(0) == (["small_r0", ROUTER], ROUTER)
    assert routed(ROUTER) == {"small_r0": 10, "small_r4": 6, "small_r8": 2}
    assert put(0) == ([], ROUTER)
    assert put(0, 4) == ([], ROUTER)
    assert put(0, 2) == (["small_r2", ROUTER], ROUTER)
    assert [*routed(ROUTER)] == ["small_r0", "small_r2", "small_r4", "small_r8"]


def test_a_single_model_has_no_router(put):
    assert put(8) == (["small_r8"], "small_r8")
    assert put(4, preprocess=True)[1] == "small_r4_pipeline"
    assert put(0, name="mine") == (["mine"], "mine")


def test_a_route_whose_model_is_gone_is_dropped(put, routed, tmp_path):
    put(8, 4, preprocess=True)
    for folder in (tmp_path / "models").glob("small_r8*"):
        shutil.rmtree(folder)
    put(0, preprocess=True)
    assert [*routed(ROUTER)] == ["small_r0", "small_r4"]
    assert [*routed(IMAGE_ROUTER)] == ["small_r0_pipeline", "small_r4_pipeline"]


def test_the_router_of_pipelines_has_those_there_are(put, routed):
    put(8, 4)
    assert put(0, preprocess=True)[1] == "small_r0_pipeline"  # the only one
    assert put(8, preprocess=True)[1] == IMAGE_ROUTER
    assert routed(IMAGE_ROUTER) == {"small_r0_pipeline": 10, "small_r8_pipeline": 2}
    assert put(4, preprocess=True)[1] == IMAGE_ROUTER
    assert [*routed(IMAGE_ROUTER)] == [f"small_r{r}_pipeline" for r in (0, 4, 8)]
    assert put(0, 4, 8, preprocess=True) == ([], IMAGE_ROUTER)


@pytest.mark.parametrize("name", ["vit", "vit_r0"])
def test_a_name_is_that_of_the_router(put, routed, name):
    put(8, 4, name="vit")
    assert put(0, name=name) == (["vit_r0", "vit_router"], "vit_router")
    assert [*routed("vit_router")] == ["vit_r0", "vit_r4", "vit_r8"]
    assert put(0, name=name) == ([], "vit_router")


def test_a_model_of_its_own_name_stays_out_of_the_router(put, routed):
    put(8, name="vit")
    put(8, 4, name="vit")
    assert put(8, name="vit") == ([], "vit")
    assert [*routed("vit_router")] == ["vit_r4", "vit_r8"]


def test_unreadable_routes_are_an_error(put, tmp_path):
    put(8, 4)
    (tmp_path / "models" / ROUTER / "1" / "routes.json").write_text("[]")
    with pytest.raises(
        InputError, match=r"small_router/1/routes.json .*, expected an object; remove the"
    ):
        put(0)
    assert not (tmp_path / "models" / "small_r0").exists()


def test_bytes_shorter_than_they_say_fail_their_own_request_only(server):
    """The server refuses all requests that a model takes together with such a one."""
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    def ask(number):
        with InferenceServerClient(server.grpc) as client:
            tensor = InferInput("image", [1, 1], "BYTES")
            tensor.set_data_from_numpy(images(1)["image"])
            if number % 3 == 0:
                tensor._raw_content = b"\xff\xff\xff\x7fx"
            try:
                client.infer(IMAGE_ROUTER, [tensor])
            except InferenceServerException as error:
                return error.message()
        return ""

    with ThreadPoolExecutor(12) as pool:
        said = [*pool.map(ask, range(90))]
    assert {s for number, s in enumerate(said) if number % 3} == {""}
    assert all("incomplete string data" in s for s in said[::3])
