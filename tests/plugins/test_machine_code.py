"""What is compiled for every GPU, down to machine code: limits, parameters, the page's figures."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tome_export.merge import spec
from tome_export.plugins import aot
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import DEFAULT_CAPABILITIES
from tome_export.plugins.variants import MAX_SHARED_BYTES

pytest.importorskip("triton", reason="the Triton language compiles the kernels")

CONTRACTS = {spec.MATCH: match_contract, spec.MERGE: merge_contract}

VARIANTS = {
    "match_197": match_contract.variant(197, 64, "float16"),
    "match_4096": match_contract.variant(4096, 64, "float16"),
    "merge_768": merge_contract.variant(768, "float16"),
}

# One architecture each: other lengths, data types, widths and alignments.
OTHERS = {
    "match_577": (match_contract.variant(577, 64, "float16"), "8.0"),
    "match_1025": (match_contract.variant(1025, 64, "float16"), "12.0"),
    "match_fp32": (match_contract.variant(197, 64, "float32"), "8.6"),
    "match_bf16": (match_contract.variant(257, 80, "bfloat16"), "9.0"),
    "match_widest": (match_contract.variant(4096, 1024, "float32"), "8.0"),
    "match_narrow": (match_contract.variant(50, 1, "float16"), "12.0"),
    "match_odd": (match_contract.variant(577, 72, "float16", (577 * 219, 73, 219)), "8.9"),
    "merge_fp32": (merge_contract.variant(1152, "float32"), "10.0"),
    "merge_bf16": (merge_contract.variant(192, "bfloat16"), "8.0"),
    "merge_widest": (merge_contract.variant(8192, "float32"), "9.0"),
    "merge_narrow": (merge_contract.variant(1, "float16"), "12.0"),
}

COMPILED = [
    *(
        pytest.param((variant, capability), id=f"{name}-{capability}")
        for name, variant in VARIANTS.items()
        for capability in DEFAULT_CAPABILITIES
    ),
    *(pytest.param(other, id=f"{name}-{other[1]}") for name, other in OTHERS.items()),
    *(
        pytest.param((VARIANTS["match_197"], f"{major}.{minor}"), id=f"match_197-{major}.{minor}")
        for major, minor in aot.PTX_VERSIONS
        if f"{major}.{minor}" not in DEFAULT_CAPABILITIES
    ),
]

SCATTERED_SPILL_BYTES = 1024
"""Keys that lie apart are loaded one by one: 96 at a time for four heads, in as many registers."""

STALE = "plugins/README.md is stale; run `python scripts/kernel_figures.py`"


@pytest.fixture(scope="module")
def kernel_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        module = importlib.import_module("kernel_figures")
    reason = module.missing_tool()
    if reason:
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def page(kernel_figures):
    """The page's table: cells by kernel's name and compute capability."""
    start, end = kernel_figures.MARKS
    text = kernel_figures.PAGE.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    version = re.match(r"Compiled by ([\w. ]+);", text)[1]
    if version != aot.compiler():
        pytest.skip(f"plugins/README.md gives the figures of {version}, this is {aot.compiler()}")
    return {
        (name, capability): cell
        for name, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
        for capability, cell in zip(DEFAULT_CAPABILITIES, cells.split(" | "), strict=True)
    }


@pytest.fixture(scope="module", params=COMPILED)
def kernel(request, compiled):
    """Variant, compute capability and binary; one module-wide fixture, so compiled once."""
    variant, capability = request.param
    return variant, capability, compiled(variant, capability)


@pytest.fixture(scope="module")
def figures(kernel, kernel_figures, tmp_path_factory):
    return kernel_figures.figures(kernel[2], tmp_path_factory.mktemp("cubin"))


def parameters(ptx, entry):
    """Types of the entry's parameters, such as u64."""
    found = re.search(rf"\.visible \.entry {entry}\((.*?)\)\n", ptx, re.DOTALL)
    return re.findall(r"\.param \.(\w+)", found[1])


def test_a_kernel_that_tensorrt_can_start(kernel):
    variant, capability, binary = kernel
    assert binary.compute_capability == capability
    number = capability.replace(".", "")
    assert re.fullmatch(rf"sm_{number}a?", binary.target)
    assert binary.threads == 32 * variant.num_warps
    assert 0 <= binary.shared_bytes <= MAX_SHARED_BYTES
    assert len(binary.ptx) <= aot.MAX_PTX_BYTES

    contract = CONTRACTS[variant.op]
    names = (*contract.INPUTS, *contract.SCALARS, *contract.OUTPUTS)
    assert list(contract.signature(variant.dtype)) == list(names)
    expected = ["u32" if name in contract.SCALARS else "u64" for name in names]
    assert parameters(binary.ptx, binary.entry) == expected
    # No name of a file on this machine, in comments, line information or elsewhere.
    assert not re.search(r"/\w+/|\.file|\.loc\b|\.py\b", binary.ptx)


def test_the_machine_code_reads_the_contracts_parameters(kernel, figures, kernel_figures):
    contract = CONTRACTS[kernel[0].op]
    expected = kernel_figures.expected_parameters(kernel[0])
    assert figures.parameters == expected
    sizes = [size for _, size in expected]
    assert sizes == [
        4 if name in contract.SCALARS else 8
        for name in (*contract.INPUTS, *contract.SCALARS, *contract.OUTPUTS)
    ]


def test_machine_code_keeps_to_its_limits(kernel, figures, kernel_figures, page):
    variant, capability, _ = kernel
    if variant in kernel_figures.SHIPPED and capability in DEFAULT_CAPABILITIES:
        assert kernel_figures.problems(variant, capability, figures) == []
        assert page[variant.name, capability] == figures.cell, STALE
    elif variant.constants.get("STRIDE_UNIT") == 1:
        assert figures.spill_bytes <= SCATTERED_SPILL_BYTES
    else:
        assert figures.spill_bytes == figures.loop_spills == 0


def test_every_figure_of_the_page_keeps_to_the_limits(kernel_figures, page):
    assert len(page) == len(kernel_figures.SHIPPED) * len(DEFAULT_CAPABILITIES), STALE
    for variant in kernel_figures.SHIPPED:
        for capability in DEFAULT_CAPABILITIES:
            limits = kernel_figures.limits_of(variant, capability)
            cell = page[variant.name, capability].split(" · ")
            registers, spill_bytes, loads_in_flight = map(int, cell)
            assert registers <= limits.registers
            assert spill_bytes <= limits.spill_bytes
            assert loads_in_flight >= limits.loads_in_flight


def test_the_page_gives_the_contracts_parameters(kernel_figures):
    text = kernel_figures.PAGE.read_text(encoding="utf-8")
    for line in kernel_figures.parameter_lines():
        assert line in text.splitlines(), STALE


def test_registers_left_to_the_assembler_are_too_few(compiled, kernel_figures, tmp_path):
    """Why the match kernel asks for all of them."""
    spared = replace(VARIANTS["match_197"], max_registers=None)
    found = kernel_figures.figures(compiled(spared, "8.6"), tmp_path)
    problems = " ".join(kernel_figures.problems(spared, "8.6", found))
    assert found.registers < kernel_figures.limits_of(spared, "8.6").registers
    assert re.search(r"has \d loads in flight; expected at least 12", problems)
    assert re.search(r"has \d+ bytes spilled; expected at most 0", problems)


def test_a_product_of_lower_precision_is_seen(compiled, kernel_figures, tmp_path):
    plain = match_contract.variant(197, 64, "float16", dot="tf32")
    found = kernel_figures.figures(compiled(plain, "9.0"), tmp_path)
    (problem,) = kernel_figures.problems(plain, "9.0", found)
    assert problem.endswith(
        "has tensor-core instructions {'HGMMA.64x64x8.F32.TF32': 4}; "
        "expected {'HGMMA.64x64x8.F32.TF32': 12}"
    )


def test_another_order_of_parameters_is_seen(compiled, kernel_figures, tmp_path, monkeypatch):
    merge = VARIANTS["merge_768"]
    found = kernel_figures.figures(compiled(merge, "9.0"), tmp_path)
    kinds = merge_contract.signature(merge.dtype)
    scalars_last = dict(sorted(kinds.items(), key=lambda item: item[0] in merge_contract.SCALARS))
    monkeypatch.setattr(merge_contract, "signature", lambda _: scalars_last)
    (problem,) = kernel_figures.problems(merge, "9.0", found)
    assert "has parameters at ((0, 8), (8, 8)," in problem


# Loads in program order with what reads them, and how many are under way at most.
RUNS = {
    "none": ("FADD R1, R2, R3 ;", 0),
    "both": ("LDG.E R4, desc[UR4][R2.64] ; LDG.E R5, desc[UR4][R6.64] ; FADD R1, R4, R5 ;", 2),
    "one_by_one": (
        "LDG.E R4, desc[UR4][R2.64] ; FADD R1, R4, R1 ; LDG.E R5, desc[UR4][R2.64] ;"
        " FADD R1, R5, R1 ;",
        1,
    ),
    "last_of_four": (
        "LDG.E.128 R4, desc[UR4][R2.64] ; FADD R1, R7, R1 ; LDG.E R9, desc[UR4][R2.64] ;",
        1,
    ),
    "behind_the_last": (
        "LDG.E.128 R4, desc[UR4][R2.64] ; FADD R1, R8, R1 ; LDG.E R9, desc[UR4][R2.64] ;",
        2,
    ),
    "an_address": ("LDG.E.64 R4, desc[UR4][R2.64] ; LDG.E R6, desc[UR4][R4.64] ;", 1),
    "half_an_address": ("LDG.E R5, desc[UR4][R2.64] ; LDG.E R6, desc[UR4][R4.64] ;", 1),
    "written_over": ("LDG.E R4, desc[UR4][R2.64] ; MOV R4, R1 ; LDG.E R5, desc[UR4][R2.64] ;", 2),
    "stored": ("LDG.E R4, desc[UR4][R2.64] ; STG.E desc[UR4][R2.64], R4 ; LDG.E R5, R6 ;", 1),
}


@pytest.mark.parametrize("case", RUNS)
def test_loads_are_counted_until_one_is_needed(kernel_figures, case):
    text, expected = RUNS[case]
    lines = [f"/*{16 * n:04x}*/  @!P0 {part} ;" for n, part in enumerate(text.split(";")[:-1])]
    instructions, _ = kernel_figures.parse("\n".join(lines))
    assert len(instructions) == len(lines)
    assert kernel_figures.loads_in_flight(instructions) == expected


NESTED = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   LDG.E R3, desc[UR4][R4.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R1, R3, R1 ;
.L_x_2:
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_a_loop_is_from_a_label_to_a_branch_back(kernel_figures):
    loops = list(kernel_figures.innermost_loops(*kernel_figures.parse(NESTED)))
    assert [[i.name for i in body] for body in loops] == [["LDG.E", "BRA", "FADD", "BRA"], ["BRA"]]


def test_a_page_without_marks_is_refused(kernel_figures):
    with pytest.raises(SystemExit, match="lacks the marks"):
        kernel_figures.written("nothing", "")
