"""Compiled kernels on disk: what is written is read, the right one is chosen, damage is said."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tome_export.errors import InputError
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import (
    DEFAULT_CAPABILITIES,
    INDEX,
    Binary,
    Kernel,
    KernelStore,
    parse_capability,
)

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
VARIANTS = (
    match_contract.variant(197, 64, "float16"),
    match_contract.variant(4096, 64, "float16"),
    match_contract.variant(197, 64, "bfloat16"),
    merge_contract.variant(768, "float16"),
)


def binary(capability, target):
    ptx = f".version 8.0\n.target {target}\n.visible .entry kernel(\n)\n"
    return Binary(capability, target, "kernel", 256, 49152, ptx)


def store(variants=VARIANTS, capabilities=DEFAULT_CAPABILITIES):
    targets = dict(zip(DEFAULT_CAPABILITIES, TARGETS, strict=True))
    binaries = tuple(binary(capability, targets[capability]) for capability in capabilities)
    return KernelStore([Kernel.of(variant, binaries) for variant in variants])


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "plugins"
    written = store().write(folder, "triton 3.9.0")
    assert sorted(written) == sorted(folder.iterdir())
    assert len(written) == 1 + len(VARIANTS) * len(TARGETS)
    read = KernelStore.read(folder)
    assert read.kernels == store().kernels
    for variant in VARIANTS:
        assert read.kernel(variant) == store().kernel(variant)


def test_index_says_what_compiled_it(tmp_path):
    store().write(tmp_path / "plugins", "triton 3.9.0")
    index = json.loads((tmp_path / "plugins" / INDEX).read_text())
    assert index["compiler"] == "triton 3.9.0"
    assert all("ptx" not in record for k in index["kernels"] for record in k["binaries"])


def test_no_kernels(tmp_path):
    KernelStore([]).write(tmp_path / "plugins", "triton 3.9.0")
    read = KernelStore.read(tmp_path / "plugins")
    read.check((9, 0))
    with pytest.raises(InputError, match="it has none: rebuild the artifact"):
        read.kernel(VARIANTS[0])


@pytest.mark.parametrize(
    ("gpu", "target"),
    {
        "8.0": "sm_80",
        "8.6": "sm_86",
        "8.7": "sm_86",
        "8.8": "sm_86",
        "8.9": "sm_89",
        "9.0": "sm_90a",
        "10.0": "sm_100a",
        "10.3": "sm_89",
        "11.0": "sm_89",
        "12.0": "sm_120a",
        "12.1": "sm_89",
        "13.0": "sm_89",
    }.items(),
)
def test_the_newest_that_runs_is_chosen(gpu, target):
    kernel = store().kernel(VARIANTS[0])
    assert kernel.binary_for(parse_capability(gpu)).target == target
    store().check(parse_capability(gpu))


def test_order_of_the_binaries_does_not_matter():
    kernel = store(capabilities=DEFAULT_CAPABILITIES[::-1]).kernel(VARIANTS[0])
    assert kernel.binary_for((8, 7)).target == "sm_86"
    assert kernel.binary_for((10, 0)).target == "sm_100a"


def test_a_gpu_older_than_all_is_refused():
    expected = (
        "the artifact's TomeMatch kernel was compiled for compute capabilities 8.0, 8.6, 8.9, 9.0, "
        "10.0, 12.0; the engine is for 7.5: rebuild the artifact with --compute-capability 7.5, "
        "or with --merge-op matmul"
    )
    for refused in (store().kernel(VARIANTS[0]).binary_for, store().check):
        with pytest.raises(InputError) as error:
            refused((7, 5))
        assert str(error.value) == expected


@pytest.mark.parametrize("gpu", [(8, 9), (9, 1), (10, 0), (12, 0)])
def test_code_for_one_gpu_only_is_not_given_to_another(gpu):
    with pytest.raises(InputError, match=r"compute capabilities 9\.0; the engine is"):
        store(capabilities=["9.0"]).check(gpu)


def test_a_missing_variant_is_named():
    wanted = match_contract.variant(577, 64, "float32")
    with pytest.raises(InputError, match=f"the artifact has no kernel {wanted.name}; it has Tome"):
        store().kernel(wanted)


def test_names_of_variants_differ():
    variants = [
        match_contract.variant(tokens, width, dtype)
        for tokens in (197, 257, 577, 4096)
        for width in (8, 24, 64, 80)
        for dtype in match_contract.DTYPES
    ]
    names = {}
    for variant in variants:
        assert names.setdefault(variant.name, variant) == variant
    assert len(names) > len(match_contract.DTYPES) * 4


def empty(_):
    return ""


def not_json(_):
    return "{"


def a_list(_):
    return []


def no_kernels_key(index):
    del index["kernels"]
    return index


def kernels_is_null(index):
    return {**index, "kernels": None}


def kernel_is_text(index):
    return {**index, "kernels": ["TomeMatch"]}


def binary_is_text(index):
    index["kernels"][0]["binaries"] = ["sm_80"]
    return index


def binaries_missing(index):
    del index["kernels"][0]["binaries"]
    return index


def constants_is_list(index):
    index["kernels"][0]["constants"] = [1, 2]
    return index


def capability_is_number(index):
    index["kernels"][0]["binaries"][0]["compute_capability"] = 8.0
    return index


def threads_is_text(index):
    index["kernels"][0]["binaries"][0]["threads"] = "256"
    return index


def file_of_another_gpu(index):
    records = index["kernels"][0]["binaries"]
    records[0]["file"], records[1]["file"] = records[1]["file"], records[0]["file"]
    return index


def unknown_field(index):
    index["kernels"][0]["binaries"][0]["colour"] = "blue"
    return index


DAMAGES = [
    empty,
    not_json,
    a_list,
    no_kernels_key,
    kernels_is_null,
    kernel_is_text,
    binary_is_text,
    binaries_missing,
    constants_is_list,
    capability_is_number,
    threads_is_text,
    file_of_another_gpu,
    unknown_field,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_index_is_said(tmp_path, damage):
    folder = tmp_path / "plugins"
    store().write(folder, "triton 3.9.0")
    damaged = damage(json.loads((folder / INDEX).read_text()))
    text = damaged if isinstance(damaged, str) else json.dumps(damaged)
    (folder / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"kernels\.json is not an index of kernels \(.*rebuild"):
        KernelStore.read(folder)


def test_bytes_that_are_no_text_are_said(tmp_path):
    folder = tmp_path / "plugins"
    written = store().write(folder, "triton 3.9.0")
    written[1].write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"is not an index of kernels \(UnicodeDecodeError"):
        KernelStore.read(folder)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_missing_file_is_named(tmp_path, which):
    folder = tmp_path / "plugins"
    written = store().write(folder, "triton 3.9.0")
    written[which].unlink()
    with pytest.raises(InputError) as error:
        KernelStore.read(folder)
    assert str(error.value) == (
        f"cannot read {written[which]} (No such file or directory): rebuild the artifact or copy "
        "it whole"
    )


@pytest.mark.parametrize("key", ["format", "operators"])
def test_another_format_is_said(tmp_path, key):
    folder = tmp_path / "plugins"
    store().write(folder, "triton 3.9.0")
    index = json.loads((folder / INDEX).read_text())
    index[key] = 99
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"99.*this version reads 1 and 1: rebuild"):
        KernelStore.read(folder)


def test_files_are_read_from_the_folder_only(tmp_path):
    folder = tmp_path / "plugins"
    written = store().write(folder, "triton 3.9.0")
    (tmp_path / written[1].name).write_text("outside")
    index = json.loads((folder / INDEX).read_text())
    index["kernels"][0]["binaries"][0]["file"] = f"../{written[1].name}"
    (folder / INDEX).write_text(json.dumps(index))
    assert KernelStore.read(folder).kernels == store().kernels


@pytest.mark.parametrize(
    ("text", "expected"), [("8.0", (8, 0)), ("9.0", (9, 0)), ("12.1", (12, 1))]
)
def test_capability(text, expected):
    assert parse_capability(text) == expected


@pytest.mark.parametrize(
    "text", ["", "9", "9.", ".0", "sm_90", "9.0a", "9,0", "-9.0", "9.0.1", "9.²"]
)
def test_what_is_no_capability_is_said(text):
    with pytest.raises(InputError) as error:
        parse_capability(text)
    assert str(error.value) == (f"compute capability is {text!r}; expected two numbers such as 9.0")


BLOCKED = """
import sys
for name in ("torch", "triton", "numpy", "onnx"):
    sys.modules[name] = None
from pathlib import Path
from tome_export.plugins.match import contract
from tome_export.plugins.store import KernelStore
store = KernelStore.read(Path(sys.argv[1]))
print(store.kernel(contract.variant(197, 64, "float16")).binary_for((8, 7)).target)
"""


def test_reading_needs_no_framework(tmp_path):
    store().write(tmp_path / "plugins", "triton 3.9.0")
    command = [sys.executable, "-c", BLOCKED, tmp_path / "plugins"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sm_86\n", "")
