"""``build hf:...``: an artifact of a checkpoint, and one clear line for every bad one."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import make

pytest.importorskip("transformers")


def build(run, folder, *more):
    return run("build", f"hf:{folder}", "--engine", "none", "-o", "out", *more)


def test_a_half_precision_checkpoint_is_built_in_half_precision(run, tmp_path):
    make("CLIP, projection").half().save_pretrained(tmp_path / "m")
    ran = build(run, "m")
    assert (ran.code, ran.error) == (
        3,
        "weights of hf:m are stored as float16; fp32 would only store the same values wider; use "
        "--fp16, or a checkpoint in float32",
    )
    assert not (tmp_path / "out").exists()
    assert build(run, "m", "--fp16").code == 0
    manifest = json.loads((tmp_path / "out" / "build.json").read_text())
    assert manifest["output"]["shape"] == ["batch", 24]
    assert manifest["model"]["weights"]["stored_dtype"] == "float16"


def spoil(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **values}))


BAD = {
    "no config": (
        lambda m: (m / "config.json").unlink(),
        "folder m has no config.json; expected a checkpoint folder as it is on the hub",
    ),
    "text only": (
        lambda m: (m / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}'),
        "m is a model of model type 'bert' without a vision tower, so it has no image tokens to "
        "merge; expected model type clip, siglip, clip_vision_model, siglip_vision_model, vit, "
        "deit, dinov2, dinov2_with_registers, llava",
    ),
    "text half of CLIP": (
        lambda m: (m / "config.json").write_text('{"model_type": "clip_text_model"}'),
        "m is a model of model type 'clip_text_model' without a vision tower, so it has no image "
        "tokens to merge; expected model type clip, siglip, clip_vision_model, "
        "siglip_vision_model, vit, deit, dinov2, dinov2_with_registers, llava",
    ),
    "unknown type": (
        lambda m: spoil(m, model_type="swin"),
        "model type 'swin' of m is not supported; supported: clip, siglip, clip_vision_model, "
        "siglip_vision_model, vit, deit, dinov2, dinov2_with_registers, llava",
    ),
    "attention": (
        lambda m: spoil(m, _attn_implementation="flash_attention_2"),
        "attention implementation 'flash_attention_2' of model m takes no additive bias, which "
        "token merging needs; load it with attn_implementation='sdpa' or 'eager'",
    ),
    "patch size": (
        lambda m: spoil(m, image_size=34),
        "model CLIPVisionModel has an image size of 34 x 34, which is not a multiple of its patch "
        "size of 4 x 4; correct its configuration",
    ),
    "quantised": (
        lambda m: spoil(m, quantization_config={"load_in_8bit": True}),
        "weights of m are quantised (quantization_config in config.json), which is not supported; "
        "use the checkpoint in float32, float16 or bfloat16",
    ),
    "shallow": (
        lambda m: spoil(m, num_hidden_layers=2),
        "weights of m do not fit its config.json: keys 16 unexpected (encoder.layers.2.",
    ),
    "deep": (
        lambda m: spoil(m, num_hidden_layers=4),
        "weights of m do not fit its config.json: keys 16 missing (encoder.layers.3.",
    ),
    "corrupt": (
        lambda m: (m / "model.safetensors").write_bytes(b"\x10" * 100),
        "weights file m/model.safetensors is not a whole safetensors file, or not that of its",
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        "folder m has no weights; expected model.safetensors, pytorch_model.bin, or the index of a "
        "sharded one beside its shards",
    ),
    "size": (
        lambda m: (m / "preprocessor_config.json").write_text('{"size": 36, "crop_size": 36}'),
        "preprocessor_config.json of m makes images of 36 x 36, and its config.json says 32 x 32; "
        "expected the same",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(run, tmp_path, case):
    change, message = BAD[case]
    make("CLIP").save_pretrained(tmp_path / "m")
    change(tmp_path / "m")
    ran = build(run, "m")
    assert ran.code == 3
    assert ran.error.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_hub_answers_for(run, monkeypatch):
    def unreachable(*_args, **_options):
        raise ConnectionError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    ran = build(run, "nobody/nothing")
    assert (ran.code, ran.error) == (
        3,
        "nobody/nothing is no folder here, and cannot be had from the hub ([Errno -3] Temporary "
        "failure in name resolution); give the folder of a checkpoint downloaded elsewhere: "
        "hf:<folder>",
    )


def test_a_folder_that_is_not_there(run):
    ran = build(run, "./nowhere")
    assert (ran.code, ran.error) == (
        3,
        "folder ./nowhere does not exist; expected a checkpoint folder or a name on the hub",
    )


def test_nan_weights(run, tmp_path):
    model = make("CLIP")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "m")
    ran = build(run, "m")
    assert ran.code == 3
    assert "have NaN or infinite values in embeddings.class_embedding" in ran.error
