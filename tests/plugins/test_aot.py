"""Kernels compiled ahead of time: always the same, and what stops a bad one."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tome_export.errors import ExportError, MissingComponentError, UsageError
from tome_export.merge import spec
from tome_export.plugins import aot
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.variants import POINTER_TYPES

pytest.importorskip("triton", reason="the Triton language compiles the kernels")

VARIANTS = {
    "match_197": match_contract.variant(197, 64, "float16"),
    "match_4096": match_contract.variant(4096, 64, "float16"),
    "merge_768": merge_contract.variant(768, "float16"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_signature_is_the_kernels_own(name):
    variant = VARIANTS[name]
    kernel, contract = aot._kernel(variant.op)
    assert kernel.arg_names == [*contract.signature("float32"), *variant.constants]
    pointers = [*contract.INPUTS, *contract.OUTPUTS]
    kinds = contract.signature("bfloat16")
    assert {kinds[scalar] for scalar in contract.SCALARS} == {"i32"}
    assert {kinds[pointer] for pointer in pointers} <= set(POINTER_TYPES.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_compiling_again_gives_the_same_text(name, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    again = aot.compile_ptx(VARIANTS[name], (9, 0))
    assert any((tmp_path / "cache").iterdir()), "the cache is elsewhere"
    assert again == compiled(VARIANTS[name], "9.0")


def test_norm_bound_is_that_of_the_contract():
    from tome_export.plugins.match import kernel

    assert kernel.NORM_EPS.value == spec.NORM_EPS


@pytest.mark.parametrize("capability", [(7, 0), (9, 1), (11, 0), (99, 0)])
def test_a_gpu_that_is_not_known_is_refused(capability):
    with pytest.raises(UsageError) as error:
        aot.compile_ptx(VARIANTS["merge_768"], capability)
    assert str(error.value) == (
        f"compute capability is {capability[0]}.{capability[1]}; the plugin's kernels can be "
        "compiled for 7.5, 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 12.0, 12.1"
    )


METADATA = {"shared": 0, "global_scratch_size": 0, "profile_scratch_size": 0}


@pytest.mark.parametrize(
    ("metadata", "ptx_bytes", "problem"),
    [
        pytest.param({}, 150_000, None, id="largest"),
        pytest.param({"shared": 49_152}, 1, None, id="most_shared"),
        pytest.param(
            {"shared": 49_153},
            1,
            "needs 49153 bytes of shared memory; expected at most 49152",
            id="shared",
        ),
        pytest.param(
            {"global_scratch_size": 1}, 1, "needs scratch memory; expected none", id="scratch"
        ),
        pytest.param(
            {"profile_scratch_size": 1}, 1, "needs scratch memory; expected none", id="profile"
        ),
        pytest.param(
            {}, 150_001, "has 150001 bytes of PTX; expected at most 150000", id="too_large"
        ),
    ],
)
def test_limits(metadata, ptx_bytes, problem):
    assert aot._problem(SimpleNamespace(**{**METADATA, **metadata}), "x" * ptx_bytes) == problem


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_SHARED_BYTES", 15, r"for compute capability 8\.0 needs 16 bytes of shared memory"),
        ("MAX_PTX_BYTES", 99, r"for compute capability 8\.0 has \d+ bytes of PTX; expected at"),
    ],
)
def test_a_kernel_over_a_limit_is_refused(monkeypatch, limit, value, message):
    monkeypatch.setattr(aot, limit, value)
    with pytest.raises(ExportError, match=f"^{VARIANTS['merge_768'].name} {message}"):
        aot.compile_ptx(VARIANTS["merge_768"], (8, 0))


def test_a_kernel_that_does_not_compile_is_refused():
    merge = VARIANTS["merge_768"]
    broken = type(merge)(**{**vars(merge), "constants": {**merge.constants, "BLOCK_C": 1000}})
    with pytest.raises(ExportError, match=r"^the Triton language \S+ cannot compile TomeMerge for"):
        aot.compile_ptx(broken, (8, 0))


PTX = """.version 8.0
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2,
\t.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
\tld.param.b64 %rd1, [kernel_param_0];
\tld.param.b32 %r1, [kernel_param_1];
\tret;
}
"""


def test_unused_scratch_pointers_go():
    assert aot.without_scratch_parameters(PTX, "kernel", 2) == PTX.replace(
        "kernel_param_1,\n\t.param .u64 .ptr .global .align 1 kernel_param_2,\n"
        "\t.param .u64 .ptr .global .align 1 kernel_param_3\n",
        "kernel_param_1\n",
    )


USED = "kernel kernel has 4 parameters, used by the kernel;"

# PTX, parameters of the source, beginning of the message.
OTHERWISE = {
    "uses_the_first": (PTX.replace("[kernel_param_1]", "[kernel_param_2]"), 2, USED),
    "uses_the_last": (PTX.replace("[kernel_param_1]", "[kernel_param_3]"), 2, USED),
    "one_too_many": (PTX, 1, "kernel kernel has 4 parameters"),
    "one_too_few": (PTX, 3, "kernel kernel has 4 parameters;"),
    "without_them": (PTX, 4, "kernel kernel has 4 parameters;"),
    "other_entry": (PTX.replace("kernel", "other"), 2, "kernel kernel has 0 parameters;"),
    "other_names": (PTX.replace("_param_3", "_end"), 2, "kernel kernel has 3 parameters;"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_parameters_are_refused(case):
    ptx, arguments, beginning = OTHERWISE[case]
    with pytest.raises(ExportError) as error:
        aot.without_scratch_parameters(ptx, "kernel", arguments)
    assert str(error.value).startswith(beginning)
    assert f"expected {arguments} and 2 unused ones" in str(error.value)


@pytest.mark.parametrize("index", [9, 10])
def test_real_code_that_uses_a_scratch_pointer_is_refused(monkeypatch, index):
    """The compiler's own text, with one instruction that reads an extra parameter."""
    seen = []
    remove = aot.without_scratch_parameters
    monkeypatch.setattr(
        aot,
        "without_scratch_parameters",
        lambda ptx, entry, arguments: (
            seen.append((ptx, entry, arguments)) or remove(ptx, entry, arguments)
        ),
    )
    aot.compile_ptx(VARIANTS["merge_768"], (8, 0))
    ((ptx, entry, arguments),) = seen
    assert arguments == 9
    edited = ptx.replace(
        "// %bb.0:", f"// %bb.0:\n\tld.param.b64 \t%rd1, [{entry}_param_{index}];", 1
    )
    assert edited != ptx
    with pytest.raises(ExportError, match="has 11 parameters, used by the kernel; expected 9 and"):
        remove(edited, entry, arguments)


def test_without_the_triton_language(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingComponentError) as error:
        aot.compile_ptx(VARIANTS["merge_768"], (9, 0))
    assert str(error.value) == (
        "the Triton language compiles the plugin's kernels and is not installed: "
        "pip install 'triton>=3.6', or use --merge-op matmul"
    )


INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from tome_export.errors import MissingComponentError
from tome_export.plugins import aot
from tome_export.plugins.merge import contract
try:
    aot.compile_ptx(contract.variant(64, "float16"), (9, 0))
except MissingComponentError as error:
    print(error)
"""


def test_under_the_interpreter():
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True)
    assert done.stdout == "kernels cannot be compiled while TRITON_INTERPRET is set: unset it\n"
    assert done.stderr == ""
