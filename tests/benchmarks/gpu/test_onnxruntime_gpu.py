"""The thinned onnxruntime-gpu: what is left of it, and that it loads beside the CUDA libraries."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts import thin_onnxruntime_gpu

    return thin_onnxruntime_gpu


# Containers of device code


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    """As NVIDIA's compilers write it: 64 bytes of header, then the code."""
    header = struct.pack("<HHIQIIHHII", kind, 0x101, 64, len(code), 0, 0, 0, 8, architecture, 0)
    return header.ljust(64, b"\0") + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.fixture(scope="module")
def make_library(tmp_path_factory):
    """A shared library with a section of device code, by the C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed; one makes a library with device code")

    def make(content: bytes) -> bytearray:
        folder = tmp_path_factory.mktemp("library")
        numbers = ",".join(map(str, content))
        (folder / "code.c").write_text(
            '__attribute__((section(".nv_fatbin"), used, aligned(8)))\n'
            f"static const unsigned char code[] = {{{numbers}}};\n"
        )
        command = [compiler, "-shared", "-fPIC", "-o", folder / "code.so", folder / "code.c", "-lm"]
        subprocess.run([*command, "-Wl,--no-as-needed"], check=True)
        return bytearray((folder / "code.so").read_bytes())

    return make


CODE = (
    container(
        entry(2, 80, b"older" * 8), entry(2, 90, b"hopper! " * 5), entry(1, 120, b"ptx " * 6)
    ),
    container(entry(2, 120, b"only newer  " * 4)),
    container(entry(2, 90, b"hopper alone" * 2)),
)


def test_other_architectures_become_zeros_in_place(thin, make_library):
    library = make_library(b"".join(CODE))
    before = bytes(library)
    found = [[(e.kind, e.architecture, e.size) for e in c] for c in thin.entries(library)]
    assert found == [[(2, 80, 40), (2, 90, 40), (1, 120, 24)], [(2, 120, 48)], [(2, 90, 24)]]
    assert thin.keep_architecture(library, 90) == 40 + 24
    assert len(library) == len(before)
    assert b"older" not in library
    assert b"ptx " not in library
    # What has no code for the architecture stays whole: it is not ours to judge.
    for kept in (b"hopper! " * 5, b"only newer  " * 4, b"hopper alone" * 2):
        assert library.count(kept) == 1
    differing = [i for i, (a, b) in enumerate(zip(before, library, strict=True)) if a != b]
    assert all(library[i] == 0 for i in differing)
    assert [len(c) for c in thin.entries(library)] == [3, 1, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\1" * 64, "no container of device code"),
        (container(entry(2, 80, b"older" * 8)), "no code for architecture 90"),
        (container(entry(2, 90, b"hopper! "))[:-4] + b"\0" * 4 * 9, "no container"),
        (CODE[2][:8] + struct.pack("<Q", 1 << 40) + CODE[2][16:], "no container"),
        (CODE[2][:24] + struct.pack("<Q", 1 << 40) + CODE[2][32:], "reaches out of its container"),
    ],
)
def test_what_is_not_understood_is_refused(thin, make_library, content, reason):
    with pytest.raises(thin.ThinningError, match=reason):
        thin.keep_architecture(make_library(content), 90)


def test_only_elf_libraries_with_device_code_are_read(thin, make_library):
    with pytest.raises(thin.ThinningError, match="no 64-bit little-endian ELF file"):
        thin.section(b"PK\3\4 and more", b".nv_fatbin")
    with pytest.raises(thin.ThinningError, match=r"no section \.nowhere"):
        thin.section(make_library(CODE[2]), b".nowhere")


# The wheel


@pytest.fixture
def wheel(thin, make_library, tmp_path):
    """A wheel with the names of the public one, and little inside."""
    info = f"onnxruntime_gpu-{thin.VERSION}.dist-info"
    files = {
        "onnxruntime/__init__.py": b"import\n",
        "onnxruntime/capi/_pybind_state.py": b"state\n",
        thin.PROVIDER: bytes(make_library(b"".join(CODE))),
        "onnxruntime/capi/libonnxruntime_providers_tensorrt.so": b"trt",
        f"onnxruntime/capi/libonnxruntime.so.{thin.VERSION}": b"second copy",
        "onnxruntime/transformers/a.py": b"",
        "onnxruntime/LICENSE": b"MIT",
        f"{info}/METADATA": b"Name: onnxruntime-gpu\n",
        f"{info}/RECORD": b"sums",
    }
    path = tmp_path / "onnxruntime_gpu.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


KEPT = [
    "onnxruntime/LICENSE",
    "onnxruntime/__init__.py",
    "onnxruntime/capi/_pybind_state.py",
    "onnxruntime/capi/libonnxruntime_providers_cuda.so",
    "onnxruntime_gpu-{}.dist-info/METADATA",
]


def test_the_archive_is_the_tree_and_equal_every_time(thin, wheel, tmp_path, gpu_bench):
    kept = sorted(name.format(thin.VERSION) for name in KEPT)
    thin.write_tree(wheel, 90, tmp_path / "tree")
    tree = tmp_path / "tree"
    assert sorted(str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()) == kept
    library = (tree / thin.PROVIDER).read_bytes()
    assert b"older" not in library
    assert b"hopper" in library
    first, second = (
        thin.write_parts(wheel, 90, tmp_path / name, 2) for name in ("first", "second")
    )
    assert [path.name for path in first] == [f"onnxruntime-gpu.tar.xz.{i}" for i in (0, 1)]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    joined = b"".join(path.read_bytes() for path in first)
    assert abs(len(first[0].read_bytes()) - len(joined) / 2) <= 1
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(joined))) as archive:
        assert archive.getnames() == kept
    # And the other machine makes the same tree of it.
    prepared = gpu_bench("prepared").Prepared(tmp_path / "prepared")
    for index, path in enumerate(first):
        prepared.part(index).parent.mkdir(parents=True)
        shutil.copy(path, prepared.part(index))
    prepared.join_onnxruntime()
    prepared.join_onnxruntime()
    for name in kept:
        assert (prepared.onnxruntime / name).read_bytes() == (tree / name).read_bytes()


def test_another_wheel_is_refused(thin, wheel, tmp_path, capsys):
    assert thin.main([str(tmp_path / "tree"), "--wheel", str(wheel)]) == 1
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert f"has the sha256 {digest}; expected onnxruntime-gpu" in capsys.readouterr().err
    assert not (tmp_path / "tree").exists()


def test_a_python_without_a_wheel_is_refused(thin, tmp_path, capsys):
    assert thin.main([str(tmp_path / "tree"), "--python", "3.9"]) == 1
    assert "has no wheel for Python 3.9; it has 3.11, 3.12, 3.13" in capsys.readouterr().err


# The folder that is carried


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--python", "3.10"), "Python is '3.10'; expected one that {} is for: 3.11, 3.12, 3.13"),
        (
            ("--compute-capability", "10.0"),
            "compute capability is '10.0'; expected one that {} has code for: "
            "8.0, 8.6, 8.9, 9.0, 12.0",
        ),
    ],
)
def test_a_machine_without_an_onnxruntime_is_refused_before_any_work(
    thin, gpu_bench, tmp_path, capsys, arguments, problem
):
    kept = tmp_path / "kept"
    kept.touch()
    assert gpu_bench("prepare").main([str(tmp_path), *arguments]) == 2
    whose = f"{thin.NAME} {thin.VERSION}"
    assert capsys.readouterr().err == f"nothing was prepared: {problem.format(whose)}\n"
    assert kept.exists()


def test_the_readme_names_every_machine_that_can_be_prepared_for(thin, gpu_bench):
    text = " ".join((ROOT / "benchmarks" / "gpu" / "README.md").read_text().split())
    for what, known in (
        ("Python", thin.PYTHONS),
        ("compute capabilities", gpu_bench("prepared").COMPUTE_CAPABILITIES),
    ):
        assert f"{what} {', '.join(known[:-1])} and {known[-1]}" in text


def test_onnxruntime_is_made_for_the_gpu_that_is_asked_for(
    thin, gpu_bench, wheel, monkeypatch, tmp_path
):
    """From a wheel with little inside, whose digest is taken for the public one's."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(thin, "SHA256", {"cp312": digest})
    for capability, kept in (("9.0", b"hopper! "), ("8.0", b"older")):
        prepared = gpu_bench("prepared").Prepared(tmp_path / capability)
        gpu_bench("prepare").write_onnxruntime(prepared, "3.12", capability, wheel)
        prepared.join_onnxruntime()
        library = (prepared.onnxruntime / thin.PROVIDER).read_bytes()
        assert {text for text in (b"hopper! ", b"older") if text in library} == {kept}


def test_only_packages_that_are_missing_or_older_are_unpacked(gpu_bench, tmp_path):
    from importlib import metadata

    prepared = gpu_bench("prepared").Prepared(tmp_path / "prepared")
    wheels = {f"numpy-{metadata.version('numpy')}": "numpy", "torch-0.1": "torch"}
    wheels |= {"onnx-9999.0": "onnx", "a_package_nobody_has-1.0": "nobody"}
    prepared.wheels(1).mkdir(parents=True)
    for name, package in wheels.items():
        with zipfile.ZipFile(prepared.wheels(1) / f"{name}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{package}/__init__.py", "")
    assert prepared.unpack_wheels() == ["a_package_nobody_has 1.0", "onnx 9999.0"]
    assert sorted(path.name for path in prepared.site.iterdir()) == ["nobody", "onnx"]


def test_a_step_that_would_bring_too_much_fails(gpu_bench, monkeypatch, tmp_path, capsys):
    prepare, module = gpu_bench("prepare"), gpu_bench("prepared")
    prepared = module.Prepared(tmp_path / "prepared")
    prepared.kernels.mkdir(parents=True)
    (prepared.kernels / "k.ptx").write_bytes(bytes(1000))
    prepared.graphs.mkdir(parents=True)
    (prepared.graphs / "g.onnx").write_bytes(bytes(5000))
    prepare.report(prepared)
    assert "step1/kernels/k.ptx" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "LIMIT_BYTES", 4000)
    with pytest.raises(prepare.PreparingError, match=r"step 2 would bring 0\.0 MiB"):
        prepare.report(prepared)
    monkeypatch.setattr(prepare, "LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(prepare, "KERNELS_LIMIT_BYTES", 900)
    with pytest.raises(prepare.PreparingError, match="the kernels have"):
        prepare.report(prepared)


# The real one


def test_the_real_library_keeps_hoppers_code_alone(thin, thinned_onnxruntime):
    tree, _ = thinned_onnxruntime
    library = (tree / thin.PROVIDER).read_bytes()
    kept = gone = 0
    for found in thin.entries(library):
        hopper = [e for e in found if (e.kind, e.architecture) == (thin.MACHINE_CODE, 90)]
        for part in found if hopper else ():
            code = library[part.start : part.start + part.size]
            assert any(code) == (part in hopper), part
            kept += part.size * (part in hopper)
            gone += part.size * (part not in hopper)
    assert gone > kept > 50e6
    code = [e for found in thin.entries(library) for e in found if e.kind == thin.MACHINE_CODE]
    assert {e.architecture for e in code} == set(thin.ARCHITECTURES)
    assert not list(tree.rglob("*tensorrt*"))
    assert (tree / "onnxruntime" / "LICENSE").read_text().startswith("MIT License")


SESSION = """
import ctypes, json, sys
import onnxruntime
from onnx import TensorProto, helper

values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
)
driver = ctypes.CDLL("libcuda.so.1")
driver.stub_record.restype = ctypes.c_char_p
print("found: " + json.dumps({
    "file": onnxruntime.__file__,
    "providers": onnxruntime.get_available_providers(),
    "used": session.get_providers(),
    "mapped": sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}),
    "driver": driver.stub_record().decode().splitlines(),
}))
"""


def test_it_loads_beside_the_cuda_libraries_and_asks_the_driver(
    thin, thinned_onnxruntime, stub_library
):
    """A session with the CUDA provider: it is really loaded, with every symbol, and its code runs.

    The driver says that there is no GPU, which the provider reports in its own words.
    """
    pytest.importorskip("nvidia", reason="torch's CUDA libraries are what it is loaded beside")
    tree, curand = thinned_onnxruntime
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tree, curand)))}
    libraries = [*sys.path, str(curand)]
    folders = [str(stub_library.parent)]
    for name in thin.linked_libraries((tree / thin.PROVIDER).read_bytes()):
        places = (found for p in libraries for found in Path(p).glob(f"nvidia/*/lib/{name}"))
        folders += [str(place.parent) for place in places]
    environment |= {"LD_LIBRARY_PATH": os.pathsep.join(folders), "LD_BIND_NOW": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    found = json.loads(line.removeprefix("found: "))
    assert found["file"] == str(tree / "onnxruntime" / "__init__.py")
    assert "CUDAExecutionProvider" in found["providers"]
    # The driver's answer came back through the CUDA runtime and the provider's own code.
    assert "CUDA failure 100: no CUDA-capable device is detected" in said
    assert found["used"] == ["CPUExecutionProvider"]
    assert str(tree / thin.PROVIDER) in found["mapped"]
    assert str(stub_library) in found["mapped"]
    for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"):
        assert any(path.endswith(f"/nvidia/cu13/lib/{name}") for path in found["mapped"]), name
    assert "cuInit flags=0" in found["driver"]
