"""The client and ``tome-export query`` against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from video_files import write_video

from tome_export.cli.main import main
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.serve.client import connect, parse_url
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.server import SHARED_MEMORY, RunRequest, running

BOTH = pytest.mark.parametrize("protocol", ["grpc", "http"])


def regions() -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob("tome_export_query_*")]


@pytest.fixture
def image(tmp_path):
    """A picture whose first pixel is the answer: blue before red before green."""
    Image.new("RGB", (4, 4), (102, 51, 204)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture(scope="module")
def router_server(request, by_hand, tmp_path_factory):
    """A server of two pipelines of different weights, and the routers in front of them."""
    request.getfixturevalue("installation")
    folder = tmp_path_factory.mktemp("router")
    artifacts = [
        by_hand.write_artifact(folder / str(r), schedule=f"r={r} constant", r=[r], seed=r, ms=ms)
        for r, ms in ((0, 3), (8, 1))
    ]
    options = ServeOptions(preprocess=True)
    serve(ServeRequest(tuple(artifacts), folder / "models", options))
    with running(RunRequest(folder / "models", gpu=False)) as server:
        yield server
        server.stop(0)


@pytest.fixture
def run(capfd):
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@BOTH
def test_what_the_server_serves(plain_server, protocol):
    server, _ = plain_server
    with connect(getattr(server, protocol), protocol) as client:
        assert client.models() == ["identity", "small"]
        inputs, outputs = client.tensors("small")
    assert inputs == {"pixel_values": {"datatype": "FP32", "shape": [-1, 3, 8, 8]}}
    assert outputs == {"logits": {"datatype": "FP32", "shape": [-1, 5]}}


@BOTH
@pytest.mark.parametrize("shared_memory", [False, True])
def test_query_prints_labels(image_server, run, image, protocol, shared_memory):
    options = ["--model", "colour", "--protocol", protocol]
    options += ["--shared-memory"] if shared_memory else []
    code, out, err = run("query", getattr(image_server, protocol), image, *options)
    assert (code, err) == (0, f"Ask {getattr(image_server, protocol)} about 1 image\n")
    assert out.splitlines() == [
        "Model  colour_pipeline",
        "",
        str(image),
        "  label   score  index",
        "  blue   0.8000      2",
        "  röd    0.4000      0",
        "  green  0.2000      1",
    ]
    assert regions() == []


def test_query_as_json_over_the_schemes_protocol(image_server, run, image):
    url = f"http://{image_server.http}"
    code, out, _ = run("query", url, image, image, "--model", "colour", "--top", "1", "--json")
    assert code == 0
    label = {"label": "blue", "score": pytest.approx(0.8), "index": 2}
    answer = {"image": str(image), "labels": [label]}
    assert json.loads(out) == {
        "server": image_server.http,
        "protocol": "http",
        "model": "colour_pipeline",
        "images": [answer, answer],
    }


def test_a_stray_video_in_a_folder_of_images(image_server, run, image, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    picture = folder / "camera.png"
    picture.write_bytes(image.read_bytes())
    video = write_video(folder / "stray.mp4", 9)
    asked = ("query", image_server.grpc)
    code, out, err = run(*asked, folder, "--model", "colour", "--json")
    assert (code, err) == (0, f"Ask {image_server.grpc} about 1 image\n")
    assert [answer["image"] for answer in json.loads(out)["images"]] == [str(picture)]
    code, out, err = run(*asked, folder, video, "--model", "colour")
    assert (code, out) == (3, "")
    assert err == f"Error: {video} is a video, and model colour_pipeline takes images\n"


def test_query_of_a_tower(image_server, run, image):
    code, out, _ = run("query", image_server.grpc, image, "--model", "tower_pipeline")
    size = image.stat().st_size
    assert code == 0
    assert out.splitlines()[-1] == f"  features [2]: {size:.4f}, {size + 1:.4f}"
    code, out, _ = run("query", image_server.grpc, image, "--model", "tower", "--json")
    assert json.loads(out)["images"] == [{"image": str(image), "features": [size, size + 1]}]


@BOTH
@pytest.mark.parametrize(
    ("options", "model", "r"),
    [
        ([], "small_router_pipeline", 0),
        (["--r", "8"], "small_router_pipeline", 8),
        (["--r", "7"], "small_router_pipeline", 0),
        (["--max-ms", "1.5"], "small_router_pipeline", 8),
        (["--max-ms", "4"], "small_router_pipeline", 0),
        (["--r", "8", "--model", "small"], "small_router_pipeline", 8),
        (["--r", "8", "--model", "small_router"], "small_router_pipeline", 8),
        (["--model", "small_r8"], "small_r8_pipeline", 8),
    ],
    ids=str,
)
def test_query_of_a_router(router_server, run, image, protocol, options, model, r):
    address = getattr(router_server, protocol)
    options = [*options, "--protocol", protocol, "--json"]
    code, out, err = run("query", address, image, *options)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["model"] == model
    direct = {}
    for other in (0, 8):
        options = ["--protocol", protocol, "--model", f"small_r{other}_pipeline", "--json"]
        _, out, _ = run("query", address, image, *options)
        direct[other] = json.loads(out)["images"]
    assert answer["images"] == direct[r]
    assert direct[0] != direct[8]


@BOTH
def test_a_budget_is_for_routers(router_server, image_server, run, image, protocol):
    for server, model in ((router_server, "small_r8"), (image_server, "colour")):
        address = getattr(server, protocol)
        options = ["--protocol", protocol, "--model", model]
        for budget in (["--r", "8"], ["--max-ms", "2"]):
            code, out, err = run("query", address, image, *options, *budget)
            assert (code, out) == (3, "")
            expected = f"Error: model {model}_pipeline at {address} is no router, which is what"
            assert err.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--r", "-1"], "r is -1; expected a number, 0 or more"),
        (["--max-ms", "nan"], "max-ms is nan; expected a number, 0 or more"),
        (["--r", "1", "--max-ms", "1"], "both r and max-ms are given; give one of them"),
    ],
)
def test_no_budget(run, image, options, error):
    code, out, err = run("query", "localhost:1", image, *options)
    assert (code, out, err.splitlines()[-1]) == (2, "", f"Error: {error}")


IDLE = """
class TritonPythonModel:
    def execute(self, requests):
        raise NotImplementedError
"""


@BOTH
def test_a_pipeline_is_known_by_what_it_does(installation, by_hand, tmp_path, protocol):
    """A name may end in any way."""
    assert installation.binary.is_file()
    image, pixels = ("image", "STRING", [1]), ("pixel_values", "FP32", [4])
    label = [("label", "STRING", [3])]
    by_hand.write_python(tmp_path, "my_pipeline", IDLE, [pixels], [pixels])
    by_hand.write_python(tmp_path, "decode", IDLE, [image], [pixels])
    by_hand.write_python(tmp_path, "cat", IDLE, [image], label)
    with running(RunRequest(tmp_path)) as server:
        with connect(getattr(server, protocol), protocol) as client:
            assert client.pipeline() == "cat"
            with pytest.raises(InputError, match=r"my_pipeline at .* takes no encoded .* of cat$"):
                client.pipeline("my_pipeline")
        server.stop(0)


@BOTH
def test_errors_of_the_server_name_the_image_in_one_line(image_server, run, tmp_path, protocol):
    path = tmp_path / "thirteen.png"
    Image.new("RGB", (13, 13)).save(path)
    address = getattr(image_server, protocol)
    for extra in ([], ["--shared-memory"]):
        options = ["--model", "colour", "--protocol", protocol, *extra]
        code, out, err = run("query", address, path, *options)
        assert (code, out) == (3, "")
        line = err.splitlines()[-1]
        assert line.startswith(f"Error: image {path}: {address} refused: ")
        assert line.endswith("13 x 13 is no good size")
    assert regions() == []


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["{image}"], 3, "serves 2 models that take images; choose one with --model: colour_pip"),
        (
            ["{image}", "--model", "cat"],
            3,
            "no model cat is ready at .*; it serves colour_pipeline, ",
        ),
        (["{image}", "--model", "colour", "--top", "4"], 3, "gives the best 3 labels"),
        (["{image}", "--model", "colour", "--top", "0"], 2, "top is 0; expected 1 or more"),
        (["none.png", "--model", "colour"], 3, "none.png does not exist"),
        (["{broken}", "--model", "colour"], 3, "broken.png .*"),
        (["{image}", "{broken}", "--model", "colour"], 3, "broken.png .*"),
        ([], 2, "Missing argument 'IMAGE...'"),
    ],
)
def test_what_a_user_can_get_wrong(image_server, run, image, tmp_path, arguments, code, error):
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:40])
    values = {"image": image, "broken": tmp_path / "broken.png"}
    given = [argument.format(**values) for argument in arguments]
    ended, out, err = run("query", image_server.grpc, *given)
    assert (ended, out) == (code, "")
    assert re.search(error, err.splitlines()[-1]), err
    assert "Traceback" not in err


def test_no_pipeline(plain_server, run, image):
    server, _ = plain_server
    code, _, err = run("query", server.grpc, image)
    assert code == 3
    assert "serves identity, small, none of which takes encoded images" in err
    assert "'tome-export serve ... --preprocess'" in err
    code, _, err = run("query", server.grpc, image, "--model", "small")
    assert code == 3
    assert "model small at" in err
    assert "takes no encoded images" in err


@BOTH
def test_no_server(run, image, protocol):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody else gets it, and nobody listens
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        code, out, err = run("query", address, image, "--protocol", protocol)
    assert (code, out) == (4, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"Error: no server answers {protocol} at {address} (")
    assert "'tome-export serve ... --run'" in line


@BOTH
def test_the_port_of_the_other_protocol(plain_server, protocol):
    server, _ = plain_server
    other = server.http if protocol == "grpc" else server.grpc
    with pytest.raises(MissingComponentError, match=f"no server answers {protocol} at {other}"):
        connect(other, protocol, seconds=3).__enter__()


@BOTH
def test_a_server_that_never_answers(protocol):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MissingComponentError, match="no server answers"):
            connect(address, protocol, seconds=0.5).__enter__()


@BOTH
def test_requests_the_server_refuses_and_the_next_one(plain_server, protocol):
    server, _ = plain_server
    good = np.zeros((1, 3, 8, 8), np.float32)
    with connect(getattr(server, protocol), protocol) as client:
        for bad in (good[..., :7], good.astype(np.int32), good[:0], np.repeat(good, 9, axis=0)):
            with pytest.raises(InputError, match="refused: ") as raised:
                client.infer("small", {"pixel_values": bad})
            assert "\n" not in str(raised.value)
            assert client.infer("small", {"pixel_values": good})["logits"].shape == (1, 5)
        with pytest.raises(InputError, match=r"refused: .*unknown model"):
            client.infer("cat", {"pixel_values": good})


SLEEPS = """
import time
class TritonPythonModel:
    def execute(self, requests):
        time.sleep(60)
"""


@BOTH
def test_the_server_is_killed_during_a_request(
    installation, by_hand, tmp_path, nothing_left, protocol
):
    assert installation.binary.is_file()
    by_hand.write_identity(tmp_path, "sleeps", SLEEPS)
    with running(RunRequest(tmp_path)) as server:
        nothing_left(server)
        with connect(getattr(server, protocol), protocol) as client:
            timer = threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL))
            timer.start()
            x = np.zeros((1, 4), np.float32)
            with pytest.raises(MissingComponentError, match=f"no server answers {protocol} at"):
                client.infer("sleeps", {"x": x}, shared_memory=True)
            timer.join()
    assert regions() == []


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("localhost:8001", None, ("localhost:8001", "grpc", False)),
        ("localhost", "http", ("localhost:8000", "http", False)),
        ("https://x.org/", None, ("x.org:8000", "http", True)),
        ("grpcs://x.org:443", "grpc", ("x.org:443", "grpc", True)),
    ],
)
def test_urls(url, protocol, expected):
    assert parse_url(url, protocol) == expected


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("ftp://x", None),
        ("://x", None),
        ("", None),
        ("x:y", None),
        ("x:0", None),
        ("x:99999", None),
        ("x/v2", None),
        ("x:²", None),
        ("x:٣", None),
        ("x:" + "9" * 5000, None),
        ("user@x:1", None),
        ("a b:1", None),
        ("::1", None),
        ("http://x", "grpc"),
    ],
)
def test_what_is_no_url(url, protocol):
    with pytest.raises(UsageError, match="URL is"):
        parse_url(url, protocol)


def test_without_tritonclient(monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(MissingComponentError, match=r"pip install 'tome-export\[serve\]'"):
        connect("localhost").__enter__()
