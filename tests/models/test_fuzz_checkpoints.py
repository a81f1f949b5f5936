"""Checkpoints that nobody wrote: each is read, or refused in one line; nothing else happens."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tome_export.errors import InputError
from tome_export.models import resolve
from tome_export.models.hf.checkpoint import PROCESSOR, PROCESSORS
from tome_export.models.llava.recipes import recipe_from_llava
from tome_export.spec import TowerOptions
from tome_export.weights.files import PLAIN, Checkpoint, read_checkpoint
from tome_export.weights.shards import tensors_from_folder

FEW = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
FEWER = settings(FEW, max_examples=30)

PLAIN_STATE = {"a.weight": torch.eye(2), "a.bias": torch.ones(2), "n": torch.tensor(3)}


def torch_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


FILES = {
    ".pth": torch_bytes({"state_dict": PLAIN_STATE, "epoch": 3}),
    ".ckpt": torch_bytes(PLAIN_STATE, _use_new_zipfile_serialization=False),
    ".safetensors": save(PLAIN_STATE),
}
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["cut", "set", "drop", "double"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)

KEYS = st.sampled_from([*PLAIN, "ema", "teacher", "weight", "module.a", "", "epoch", "model.w"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        [
            torch.ones(2),
            torch.empty(0, 3),
            torch.tensor(float("nan")),
            torch.ones(2, dtype=torch.int8),
            torch.ones(2, dtype=torch.complex64),
            torch.ones(1).expand(1 << 40),
            torch.empty(2, device="meta"),
            torch.eye(2).to_sparse(),
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.integers(0, 3), inner, max_size=4)
        | st.tuples(inner)
    ),
    max_leaves=8,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.sampled_from([0, 1, -1, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf")])
    | st.text(max_size=6)
    | st.sampled_from(["gelu", "224", "ViTImageProcessor", "clip_vision_model", "../x", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def damaged(content, steps):
    for kind, place, new in steps:
        at = place % (len(content) + 1)
        if kind == "cut":
            content = content[:at]
        elif kind == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "drop":
            content = content[:at] + content[at + len(new) :]
        else:
            content = content[:at] + content[:at] + content[at:]
    return content


def read_or_refused(read):
    """Whatever is read; a refusal has to be one line that can be printed."""
    try:
        return read()
    except InputError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 3000
        return None


def check(path, key=""):
    found = read_or_refused(lambda: read_checkpoint(path, key))
    if found is not None:
        assert isinstance(found, Checkpoint)
        assert all(isinstance(value, torch.Tensor) for value in found.state.values())


@pytest.mark.parametrize("suffix", FILES)
@FEW
@example([("set", FILES[".pth"].index(b"PK\1\2") + 6, b"@")])  # a version of zip yet to come
@given(steps=DAMAGE)
def test_damaged_files(suffix, steps):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        path.write_bytes(damaged(FILES[suffix], steps))
        check(path)
        name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        path.rename(Path(folder) / name)
        read_or_refused(lambda: tensors_from_folder(Path(folder), lambda key: key))


@FEW
@given(content=VALUES, key=KEYS | st.sampled_from(["model.module", "a.b.c", "."]))
def test_anything_that_torch_saves(content, key):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pytorch_model.bin"
        torch.save(content, path)
        check(path)
        check(path, key)
        read_or_refused(lambda: tensors_from_folder(Path(folder), lambda key: key))


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "F4", "C64", "X", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 1 << 62, -1]), max_size=3) | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 1 << 62, -1]), max_size=3) | JSON,
    }
)


@FEW
@given(header=st.dictionaries(KEYS | st.just("__metadata__"), ENTRY | JSON, max_size=3), size=JSON)
def test_headers_of_safetensors(header, size):
    text = json.dumps(header).encode()
    length = size if isinstance(size, int) and 0 <= size < 1 << 63 else len(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for count in (len(text), length):
            path.write_bytes(struct.pack("<Q", count) + text + bytes(8))
            check(path)
            read_or_refused(lambda: tensors_from_folder(Path(folder), lambda key: key))


@FEW
@given(found=JSON, shards=st.dictionaries(KEYS, JSON | st.just("one.safetensors"), max_size=3))
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_indexes_of_shards(weights, found, shards):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "one.safetensors").write_bytes(FILES[".safetensors"])
        for content in (found, {"weight_map": shards}, {"weight_map": found}):
            (Path(folder) / f"{weights}.index.json").write_text(json.dumps(content))
            read_or_refused(lambda: tensors_from_folder(Path(folder), lambda key: key))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"weight_map": ' * 9999, "\x00", ""])
def test_json_that_no_reader_takes(tmp_path, text):
    pytest.importorskip("transformers")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        tensors_from_folder(tmp_path, lambda key: key)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        resolve(f"hf:{tmp_path}")
    for name in (PROCESSOR, PROCESSORS):
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["clip"]))
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            resolve(f"hf:{tmp_path}")


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 32}
SIZES |= {"num_attention_heads": 2, "patch_size": 8}
CONFIGS = {
    "vit": {"model_type": "vit", "architectures": ["ViTForImageClassification"], **SIZES},
    "dinov2": {"model_type": "dinov2", **SIZES},
    "clip": {"model_type": "clip", "projection_dim": 8, "vision_config": SIZES},
    "siglip": {"model_type": "siglip_vision_model", **SIZES},
}
FIELDS = st.sampled_from(
    [
        *SIZES,
        "model_type",
        "architectures",
        "projection_dim",
        "vision_config",
        "text_config",
        "vision_config_dict",
        "hidden_act",
        "layer_norm_eps",
        "num_channels",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "vision_use_head",
        "qkv_bias",
        "mlp_ratio",
        "use_swiglu_ffn",
        "num_register_tokens",
        "torch_dtype",
        "dtype",
        "auto_map",
        "transformers_version",
    ]
)
LIKELY = st.sampled_from(
    [0, -1, 7, 1 << 40, "gelu", "eager", "", True, 0.5, None, [], {}, [32, 32]]
)


@pytest.mark.parametrize("kind", CONFIGS)
@FEWER
@given(changes=st.dictionaries(FIELDS, JSON | LIKELY, min_size=1, max_size=2), inside=st.booleans())
def test_configurations(kind, changes, inside):
    pytest.importorskip("transformers")
    config = json.loads(json.dumps(CONFIGS[kind]))
    half = config.get("vision_config")
    (half if inside and half else config).update(changes)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        read_or_refused(lambda: resolve(f"hf:{folder}"))


LLAVA = {
    "mm_vision_tower": "clip",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "mm_patch_merge_type": "flat",
    "hidden_size": 16,
    "mm_hidden_size": 32,
    "s2": False,
}
LLAVA_HF = {
    "model_type": "llava",
    "vision_config": {"model_type": "clip_vision_model", **SIZES},
    "text_config": {"hidden_size": 16, "model_type": "llama"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


@pytest.mark.parametrize("layout", [LLAVA, LLAVA_HF], ids=["llava", "transformers"])
@FEWER
@given(data=st.data())
def test_configurations_of_llava(layout, data):
    pytest.importorskip("transformers")
    config = dict(layout)
    config[data.draw(st.sampled_from(list(config)))] = data.draw(JSON | LIKELY)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "clip").mkdir()
        (Path(folder) / "clip" / "config.json").write_text(
            json.dumps({"model_type": "clip_vision_model", **SIZES})
        )
        read_or_refused(lambda: recipe_from_llava("l", Path(folder), TowerOptions("llava")))


IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_pad": False,
    "auto_map": {},
    "feature_extractor_type": None,
    "crop_pct": None,
    "processor_class": "CLIPProcessor",
}


@pytest.mark.parametrize("file", [PROCESSOR, PROCESSORS])
@FEWER
@given(data=st.data(), whole=st.booleans())
def test_image_processors(file, data, whole):
    pytest.importorskip("transformers")
    settings_of = dict(IMAGES)
    key = data.draw(st.sampled_from(list(IMAGES)))
    settings_of[key] = data.draw(JSON | LIKELY)
    settings_of = data.draw(JSON) if whole else settings_of
    text = json.dumps({"image_processor": settings_of} if file == PROCESSORS else settings_of)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS["clip"]))
        (Path(folder) / file).write_text(text)
        read_or_refused(lambda: resolve(f"hf:{folder}"))
