"""Our launcher against a driver that records what it is asked: nothing is lost on the way."""

from __future__ import annotations

import re

import pytest
import torch

from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import Kernel, KernelStore

PTX = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0,
	.param .u32 some_kernel_param_1,
	.param .u32 some_kernel_param_2,
	.param .u64 .ptr .global .align 1 some_kernel_param_3
)
{ ret; } // ä
"""
MODULE, FUNCTION = "0x7a11c0de00000022", "0x7a11c0de00000033"
STREAM = 0x7FFF_FFFF_FFFF_0010


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter that a kernel declares, which is what a driver reads."""
    bits = re.findall(r"^\s*\.param \.[ub](\d+)", ptx, re.MULTILINE)
    return [int(number) // 8 for number in bits]


def test_what_is_loaded_and_started_arrives_whole(gpu_bench, stub):
    driver_module = gpu_bench("driver")
    driver = driver_module.Driver(stub.path)
    assert parameter_sizes(PTX) == [8, 4, 4, 8]
    stub.expect_parameters(parameter_sizes(PTX))
    kernel = driver.load(PTX, "some_kernel")
    given = driver_module.parameters([0x1234_5678_9ABC_DEF0], [-3, 0x7FFF_FFFF], [0xF << 60])
    driver.start(kernel, (70_000, 2, 3), 256, 48 << 10, STREAM, given)
    driver.unload(kernel)

    (loading,) = stub.named("cuModuleLoadDataEx")
    assert loading["image"] == PTX.encode() + b"\0"
    assert loading["info_bytes"] == loading["error_bytes"] == str(1 << 14)
    (finding,) = stub.named("cuModuleGetFunction")
    assert (finding["module"], finding["name"]) == (MODULE, "some_kernel")
    (launch,) = stub.named("cuLaunchKernel")
    assert launch["function"] == FUNCTION
    assert launch["grid"] == "70000,2,3"
    assert launch["block"] == "256,1,1"
    assert launch["shared_bytes"] == str(48 << 10)
    assert launch["stream"] == hex(STREAM)
    assert launch["extra"] == "0"
    pointers_and_numbers = [
        (0x1234_5678_9ABC_DEF0).to_bytes(8, "little"),
        (-3).to_bytes(4, "little", signed=True),
        (0x7FFF_FFFF).to_bytes(4, "little"),
        (0xF << 60).to_bytes(8, "little"),
    ]
    assert launch["parameter"] == pointers_and_numbers
    assert [call["module"] for call in stub.named("cuModuleUnload")] == [MODULE]
    # What it says of the kernel: registers (attribute 4), local memory (3), the compiler's remarks.
    assert (kernel.registers, kernel.local_bytes) == (104, 103)
    assert {call["function"] for call in stub.named("cuFuncGetAttribute")} == {FUNCTION}
    assert kernel.log == "info    : 0 bytes spill stores"


def test_the_drivers_errors_are_told_with_its_compilers_log(gpu_bench, stub):
    driver_module = gpu_bench("driver")
    driver = driver_module.Driver(stub.path)
    stub.fail("cuModuleLoadDataEx", 218, "ptxas application ptx input, line 9; fatal: unexpected")
    with pytest.raises(driver_module.DriverError) as error:
        driver.load(PTX, "some_kernel")
    assert str(error.value) == (
        "cuModuleLoadDataEx returned 218 (CUDA_ERROR_INVALID_PTX: a PTX JIT compilation failed); "
        "the driver's compiler: ptxas application ptx input, line 9; fatal: unexpected"
    )
    stub.reset()
    kernel = driver.load(PTX, "some_kernel")
    stub.fail("cuLaunchKernel", 700)
    with pytest.raises(driver_module.DriverError, match=r"700 .*illegal memory access"):
        driver.start(kernel, (1, 1, 1), 32, 0, 0, [])
    stub.fail("cuModuleUnload", 42)
    with pytest.raises(driver_module.DriverError, match=r"returned 42 .unknown to this driver"):
        driver.unload(kernel)


def test_without_a_context_nothing_is_started(gpu_bench, stub):
    driver_module = gpu_bench("driver")
    stub.without_context()
    with pytest.raises(driver_module.DriverError, match="no CUDA context is current"):
        driver_module.Driver(stub.path)


def integers(values: list[bytes]) -> list[int]:
    return [int.from_bytes(value, "little", signed=len(value) == 4) for value in values]


@pytest.fixture(scope="module")
def store():
    """A match kernel for keys in a QKV product and a merge kernel, compiled."""
    pytest.importorskip("triton", reason="the Triton language compiles the kernels")
    from tome_export.plugins.aot import compile_ptx

    variants = [
        match_contract.variant(197, 64, "float16"),
        merge_contract.variant(96, "float16"),
    ]
    return KernelStore(
        Kernel.of(variant, tuple(compile_ptx(variant, one) for one in ((8, 0), (9, 0))))
        for variant in variants
    )


def make_carried(gpu_bench, stub, store, capability=(9, 0)):
    driver = gpu_bench("driver").Driver(stub.path)
    return gpu_bench("kernels").PrecompiledKernels(store, driver, capability, lambda: STREAM)


def test_match_is_started_as_its_contract_says(gpu_bench, stub, store):
    carried = make_carried(gpu_bench, stub, store)
    qkv = torch.zeros(2, 197, 3 * 12 * 64, dtype=torch.float16)
    keys = qkv.chunk(3, dim=-1)[1].reshape(2, 197, 12, 64).transpose(1, 2)
    assert keys.data_ptr() == qkv.data_ptr() + 2 * 12 * 64
    variant = match_contract.variant(197, 64, "float16", keys.stride()[:3])
    (binary, older) = carried.binaries(variant)
    assert (binary.compute_capability, older.compute_capability) == ("9.0", "8.0")
    stub.expect_parameters(parameter_sizes(binary.ptx))
    keep, src, dst = carried.match(keys, 16, 1, True)
    launch = match_contract.launch(2, 12, 197, 64, 16, 1, True, keys.stride()[:3])
    (started,) = stub.named("cuLaunchKernel")
    outputs = [tensor.data_ptr() for tensor in (keep, src, dst)]
    assert integers(started["parameter"]) == [keys.data_ptr(), *launch.scalars, *outputs]
    assert len(launch.scalars) == len(match_contract.SCALARS)
    assert min(keys.data_ptr(), *outputs) > 1 << 32
    assert started["grid"] == "2,1,1"
    assert started["block"] == f"{binary.threads},1,1"
    assert started["shared_bytes"] == str(binary.shared_bytes)
    assert started["stream"] == hex(STREAM)
    assert [tuple(t.shape) for t in (keep, src, dst)] == [(2, 181), (2, 16), (2, 16)]
    (loading,) = stub.named("cuModuleLoadDataEx")
    assert loading["image"] == binary.ptx.encode() + b"\0"
    assert [call["name"] for call in stub.named("cuModuleGetFunction")] == [binary.entry]


def test_merge_is_started_as_its_contract_says(gpu_bench, stub, store):
    carried = make_carried(gpu_bench, stub, store)
    x, size = torch.zeros(3, 50, 96, dtype=torch.float16), torch.ones(3, 50)
    keep, src, dst = (torch.zeros(3, n, dtype=torch.int32) for n in (40, 10, 10))
    (binary, _) = carried.binaries(merge_contract.variant(96, "float16"))
    stub.expect_parameters(parameter_sizes(binary.ptx))
    merged = carried.merge(x, size, keep, src, dst)
    again = carried.merge(x, size, keep, src, dst)
    launch = merge_contract.launch(3, 50, 10)
    first, second = stub.named("cuLaunchKernel")
    inputs = [tensor.data_ptr() for tensor in (x, size, keep, src, dst)]
    for started, outputs in ((first, merged), (second, again)):
        places = [tensor.data_ptr() for tensor in outputs]
        assert integers(started["parameter"]) == [*inputs, *launch.scalars, *places]
    assert first["grid"] == f"{3 * 40},1,1"
    assert first["block"] == f"{binary.threads},1,1"
    assert len(stub.named("cuModuleLoadDataEx")) == 1


def test_an_older_gpu_gets_the_older_code(gpu_bench, stub, store):
    carried = make_carried(gpu_bench, stub, store, (8, 6))
    (binary,) = carried.binaries(merge_contract.variant(96, "float16"))
    assert binary.compute_capability == "8.0"


def test_a_tensor_at_an_odd_place_is_refused(gpu_bench, stub, store):
    carried = make_carried(gpu_bench, stub, store)
    x = torch.zeros(50 * 96 + 1, dtype=torch.float16)[1:].view(1, 50, 96)
    plan = (torch.zeros(1, n, dtype=torch.int32) for n in (40, 10, 10))
    with pytest.raises(ValueError, match="a multiple of 16"):
        carried.merge(x, torch.ones(1, 50), *plan)
    assert stub.named("cuLaunchKernel") == []


def test_no_kernel_that_ran_fails_the_memory_check(gpu_bench, stub, monkeypatch, tmp_path, capsys):
    """The sanitizer sees no wrong access of a kernel that the driver refused to start."""
    pytest.importorskip("triton", reason="the Triton language compiles the kernels")
    from tome_export.plugins.aot import compile_ptx

    check, tools = gpu_bench("check_kernels"), gpu_bench("run_tools")
    store = KernelStore(
        Kernel.of(case.variant, (compile_ptx(case.variant, (9, 0)),))
        for case in check.memcheck_cases()
    )
    carried = make_carried(gpu_bench, stub, store)
    monkeypatch.setattr(check, "precompiled_kernels", lambda _: carried)
    stub.fail("cuLaunchKernel", 700)
    assert tools.main([str(tmp_path), "cpu"]) == 1
    assert len(stub.named("cuLaunchKernel")) == 2
    assert "cuLaunchKernel returned 700" in capsys.readouterr().out


def test_the_operators_run_the_carried_kernels_only_inside(gpu_bench, stub, store):
    """On the CPU, where the recording driver starts nothing: its plans are left unwritten."""
    from tome_export.merge import ops

    kernels = gpu_bench("kernels")
    carried = make_carried(gpu_bench, stub, store)
    keys = torch.randn(2, 12, 197, 64, generator=torch.Generator().manual_seed(0)).half()
    with kernels.use_kernels(carried, device="cpu"):
        ops.match(keys, 16, 1, True)
    assert len(stub.named("cuLaunchKernel")) == 1
    with kernels.use_kernels(None, device="cpu"):
        plan = ops.match(keys, 16, 1, True)
    assert all(map(torch.equal, plan, ops.eager_match(keys, 16, 1, True)))
    assert all(map(torch.equal, ops.match(keys, 16, 1, True), plan))
    assert len(stub.named("cuLaunchKernel")) == 1
