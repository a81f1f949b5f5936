from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.models import RECIPES, hub, resolve
from tome_export.models.timm.loader import TimmLoader

WAYS_OUT = (
    "; give a .safetensors or .pth file downloaded elsewhere with --weights PATH, or try the "
    "toolchain with --weights random"
)


@pytest.fixture
def listener():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """Points huggingface_hub at a local port, with an empty cache."""

    def point(port):
        address = f"http://127.0.0.1:{port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            for name, value in (
                ("ENDPOINT", address),
                ("HUGGINGFACE_CO_URL_TEMPLATE", template),
                ("HF_HUB_CACHE", str(tmp_path / "cache")),
                ("HF_HUB_OFFLINE", False),
            ):
                monkeypatch.setattr(module, name, value, raising=False)
        return address

    return point


def failure(recipe):
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        recipe.load()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value), time.perf_counter() - start


def test_refused_connection_ends_at_once(hub_at):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hub_at(port)
    message, seconds = failure(RECIPES["vit_b16"])
    assert message.startswith("pretrained weights of vit_b16 cannot be had from the hub (")
    assert message.endswith(WAYS_OUT)
    assert seconds < 5


def test_silent_server_ends_within_the_bound(hub_at, listener, monkeypatch):
    assert hub.ANSWER_S + 2 < 20
    monkeypatch.setattr(hub, "ANSWER_S", 0.5)
    hub_at(listener.getsockname()[1])
    message, seconds = failure(RECIPES["deit_ti16"])
    assert message.startswith("pretrained weights of deit_ti16 cannot be had from the hub (")
    assert message.endswith(WAYS_OUT)
    assert seconds < 5


def test_question_that_never_returns_is_left_behind(monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_S", -1.5)
    monkeypatch.setattr(hub, "_ask_hub", lambda *_args: time.sleep(3))
    monkeypatch.setattr(TimmLoader, "recorded_file", lambda _loader: None)
    message, seconds = failure(RECIPES["vit_s16"])
    assert "no answer in" in message
    assert seconds < 2.5


def test_cached_weights_need_no_network(hub_at, listener, tmp_path):
    hub_at(listener.getsockname()[1])
    recipe = RECIPES["deit_ti16"]
    state = recipe.load("random", seed=2, depth=12).module.state_dict()
    folder = tmp_path / "cache" / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(dict(state), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    loaded = recipe.load()
    assert loaded.weights.kind == "pretrained"
    assert loaded.weights.sha256 is not None
    assert torch.equal(loaded.module.head.weight, state["head.weight"])


def test_architecture_without_weights():
    recipe = resolve("timm:vit_small_patch16_36x1_224")
    message, _ = failure(recipe)
    assert message.startswith(
        "timm has no pretrained weights for timm:vit_small_patch16_36x1_224.untrained; "
    )


@contextlib.contextmanager
def served(files):
    """A hub with one repository of text files: its port, and the paths that are asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.rpartition("/")[2].partition("?")[0]
            if "/tree/" in self.path:
                entry = {"type": "file", "size": 1, "oid": "1"}
                self.answer(json.dumps([{**entry, "path": name} for name in files]).encode())
            elif self.path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in files]
                told = {"_id": "1", "id": "owner/name", "sha": "0" * 40, "siblings": siblings}
                self.answer(json.dumps(told).encode())
            elif name in files:
                self.answer(files[name].encode())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (http.server's name)

        def answer(self, body):
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hash(body)}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()
            thread.join()


VIT = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 32}
VIT |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = {"image_mean": [0.1] * 3, "image_std": [0.9] * 3, "size": {"height": 32, "width": 32}}


@pytest.mark.parametrize("cached", [False, True], ids=["new", "the model alone is cached"])
def test_the_image_processor_of_transformers_5_is_downloaded(hub_at, tmp_path, cached):
    pytest.importorskip("transformers")
    processor = json.dumps({"image_processor": {**IMAGES, "resample": 2}})
    files = {"config.json": json.dumps(VIT), "processor_config.json": processor, "README.md": ""}
    cache = tmp_path / "cache" / "models--owner--name"
    if cached:
        for name, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", "")):
            (cache / name).parent.mkdir(parents=True)
            (cache / name).write_text(text or files["config.json"])
    with served(files) as (port, asked):
        hub_at(port)
        recipe = resolve("hf:owner/name")
        found = recipe.preprocessing
        assert (found.mean, found.interpolation) == ((0.1,) * 3, "bilinear")
        assert not any("README" in path for path in asked)
        count = len(asked)
        assert resolve("hf:owner/name").preprocessing == found
        assert len(asked) == count
    # Without a network what is cached holds, and what is not there is said.
    next(cache.rglob("snapshots/*/processor_config.json")).unlink()
    told = resolve("hf:owner/name").description
    assert "without preprocessor_config.json and processor_config.json" in told
