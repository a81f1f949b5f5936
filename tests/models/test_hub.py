from __future__ import annotations

import socket
import time

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save_file

from tome_export.errors import InputError
from tome_export.models import RECIPES, hub, resolve

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
    monkeypatch.setattr(hub, "ask_hub", lambda *_args: time.sleep(3))
    monkeypatch.setattr(hub, "recorded_file", lambda _recipe: None)
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
