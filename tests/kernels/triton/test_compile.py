"""Kernels compiled ahead of time, without a GPU: what the check finds, and its results for the shipped kernels."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from softprompt_kernels.kernels.triton.compile import ahead_of_time, shipped_configurations
from softprompt_kernels.kernels.triton.compile.ahead_of_time import Report, Request
from softprompt_kernels.kernels.triton.launch import Launch, Options
from softprompt_kernels.kernels.triton.targets import TARGETS

if ahead_of_time.unavailable():
    pytest.skip(str(ahead_of_time.unavailable()), allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

CHECKED = ("sm_80", "sm_90", "sm_100", "gfx942")


@triton.jit
def gemm(
    a, b, bias, out, rows, columns, depth, stride_a, stride_b, stride_out, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = scale · a b, plus bias if it is not None."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_tile = tl.load(a + m * stride_a + k[None, :], mask=(m < rows) & (k[None, :] < depth), other=0)
        b_tile = tl.load(b + k[:, None] * stride_b + n, mask=(k[:, None] < depth) & (n < columns), other=0)
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision="ieee")
    if bias is not None:
        accumulator += tl.load(bias + n, mask=n < columns, other=0)
    tl.store(out + m * stride_out + n, (accumulator * scale).to(out.dtype.element_ty), mask=(m < rows) & (n < columns))


@triton.jit
def sum_of_rows(values, out, columns, stride, BLOCK_N: tl.constexpr):
    """out[0] = Σ values[n, i] over n and i."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        total += tl.load(values + row * stride + n, mask=n < columns, other=0).to(tl.float32)
    tl.atomic_add(out, tl.sum(total))


class Matrix(NamedTuple):
    base: torch.Tensor
    stride: int


class Tile(NamedTuple):
    block_m: int
    block_n: int


@triton.jit
def copy(source, out, TILE: tl.constexpr):
    """A kernel with tuples as arguments."""
    at = tl.arange(0, TILE.block_m)[:, None] * source.stride + tl.arange(0, TILE.block_n)[None, :]
    tl.store(out.base + at, tl.load(source.base + at))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm_launch(tile: int = 64, depth_tile: int = 32, stages: int = 2) -> Launch:
    dtype, depth = torch.bfloat16, 4096
    return Launch(
        gemm,
        (1, 1),
        {
            "a": empty(8192, depth, dtype=dtype), "b": empty(depth, 512, dtype=dtype), "bias": None,
            "out": empty(8192, 512, dtype=dtype), "rows": 8192, "columns": 512, "depth": depth,
            "stride_a": depth, "stride_b": 512, "stride_out": 1, "scale": 2.0,
        },
        {"BLOCK_M": tile, "BLOCK_N": tile, "BLOCK_K": depth_tile},
        Options(4, stages),
    )  # fmt: skip


def sum_launch(dtype: torch.dtype = torch.float16, columns: int = 50257) -> Launch:
    arguments = {"values": empty(8, columns, dtype=dtype), "out": empty(1, dtype=torch.float32)}
    return Launch(
        sum_of_rows, (8,), {**arguments, "columns": columns, "stride": columns}, {"BLOCK_N": 1024}, Options(4, 2)
    )


def compile_for(*targets: str, launches: list[Launch]) -> list[Report]:
    requests = [Request("test", launch, TARGETS[target]) for target in targets for launch in launches]
    return ahead_of_time.compile_all(ahead_of_time.distinct(requests))


def test_each_chip_gets_its_matrix_instruction_for_the_same_tile() -> None:
    reports = compile_for(*CHECKED, launches=[gemm_launch()])
    assert [report.code.matrix for report in reports] == [("mma.sync",), ("wgmma",), ("tcgen05",), ("mfma",)]
    assert not any(report.violations for report in reports)
    for report in reports:
        assert report.code.registers > 0 and report.shared_memory > 0 and report.occupancy > 0
    assert all("cp.async" in report.code.copies for report in reports[:3])


def test_a_kernel_with_atomics_and_without_dots() -> None:
    for report in compile_for("sm_90", "gfx942", launches=[sum_launch()]):
        assert report.code.matrix == () and report.expected is None
        assert report.code.atomics >= 1
        assert not report.violations


def test_arguments_are_specialised_as_by_the_launcher() -> None:
    (report,) = compile_for("sm_80", launches=[gemm_launch()])
    assert report.signature["a"] == "*bf16" and report.signature["depth"] == "i32"
    assert report.signature["scale"] == "fp32"
    assert report.constants == {"bias": None, "stride_out": 1, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}


def test_fields_of_tuple_arguments_have_names() -> None:
    matrices = {name: Matrix(empty(64, stride), stride) for name, stride in (("source", 64), ("out", 1))}
    (report,) = compile_for("sm_80", launches=[Launch(copy, (1,), matrices, {"TILE": Tile(16, 64)}, Options(4, 2))])
    assert not report.violations
    assert report.signature == {"source.base": "*bf16", "source.stride": "i32", "out.base": "*bf16"}
    assert report.constants == {"out.stride": 1, "TILE.block_m": 16, "TILE.block_n": 64}


def test_large_sizes_are_64_bits_wide() -> None:
    launch = sum_launch(columns=2**31 + 1)
    (source,) = ahead_of_time.distinct([Request("test", launch, TARGETS["sm_90"])])
    assert source.signature["columns"] == "i64"


def test_launches_that_look_the_same_to_the_compiler_are_compiled_once() -> None:
    target = TARGETS["sm_80"]
    wide = [sum_launch(columns=128 * 1024), sum_launch(columns=256 * 1024)]  # multiples of 16 both
    launches = {"one": wide[0], "two": wide[1], "odd": sum_launch(columns=50257)}
    sources = ahead_of_time.distinct([Request(name, launch, target) for name, launch in launches.items()])
    assert [source.examples for source in sources] == [["one", "two"], ["odd"]]


def test_a_tile_too_large_for_registers_and_shared_memory_is_a_violation() -> None:
    (report,) = compile_for("sm_86", launches=[gemm_launch(tile=256, depth_tile=64, stages=3)])
    assert report.code.stack > 0 and report.occupancy == 0
    assert any("spills" in violation for violation in report.violations)
    assert any("shared memory" in violation for violation in report.violations)


def test_a_kernel_that_does_not_compile_is_a_violation_and_the_others_still_compile() -> None:
    broken = gemm_launch()
    broken.constants["BLOCK_M"] = 48  # not a power of 2
    reports = compile_for("sm_80", launches=[broken, sum_launch()])
    assert reports[0].code is None and "does not compile" in reports[0].violations[0]
    assert not reports[1].violations


def test_a_launch_that_the_launcher_would_refuse_is_a_violation() -> None:
    @dataclass(frozen=True)
    class MoreOptions(Options):
        maxnreg: int = 128  # only NVIDIA GPUs have it

    launch = replace(sum_launch(), options=MoreOptions(4, 2))
    missing = sum_launch()
    del missing.arguments["stride"]
    nvidia, amd = compile_for("sm_80", "gfx942", launches=[launch])
    assert not nvidia.violations and nvidia.code.registers <= 128
    assert amd.violations == ("cannot be launched: Keyword argument maxnreg was specified but unrecognised",)
    (report,) = compile_for("sm_80", launches=[missing])
    assert "cannot be launched" in report.violations[0] and "stride" in report.violations[0]


# --- shipped kernels --------------------------------------------------------------------------------------------------

REPRESENTATIVE = (
    "attention training D64 bf16",
    "attention training D128 bf16",
    "attention decoding D128 bf16",
    "kl_div forward N1024 V128256 bf16",
    "linear_kl_div forward N1024 V128256 bf16",
    "teacher_moments N1024 V128256 bf16",
    "log-partition N1024 V128256 bf16 labels",
)
"""Examples that every run of the tests compiles. `make compile` compiles all examples for all targets."""


@pytest.fixture(scope="module")
def compiled() -> list[Report]:
    """Reports of the representative kernels for the checked targets."""
    examples = {example.name: example for example in shipped_configurations.examples()}
    requests = [
        Request(name, launch, TARGETS[target])
        for target in CHECKED
        for name in REPRESENTATIVE
        for launch in examples[name].launches(TARGETS[target])
    ]
    return ahead_of_time.compile_all(ahead_of_time.distinct(requests))


def test_shipped_kernels_do_not_spill_and_fit_the_chip(compiled: list[Report]) -> None:
    failed = [f"{r.kernel} on {r.target} ({r.examples[0]}): {r.violations}" for r in compiled if r.violations]
    assert not failed, "\n".join(failed)
    assert {report.target for report in compiled} == set(CHECKED)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_divergence_of_an_unknown_kind_does_not_compile(backward: bool) -> None:
    examples = {example.name: example for example in shipped_configurations.examples()}
    launch = examples["kl_div jsd N1024 V128256 bf16"].launches(TARGETS["sm_80"])[backward]
    unknown = replace(launch, constants={**launch.constants, "KIND": "hinge"})
    (source,) = ahead_of_time.distinct([Request("test", unknown, TARGETS["sm_80"])])
    ast = ASTSource(unknown.kernel, source.signature, source.constants, source.attributes)
    with pytest.raises(CompilationError) as caught:
        triton.compile(ast, target=GPUTarget("cuda", 80, 32), options=source.options)
    assert "KIND must be 'forward', 'reverse' or 'jsd'" in str(caught.value.__cause__)


def test_16_bit_attention_uses_wgmma_on_sm_90_and_row_kernels_have_no_dots(compiled: list[Report]) -> None:
    hopper = [report for report in compiled if report.target == "sm_90"]
    attention = [r for r in hopper if r.expected is not None and "training" in r.examples[0]]
    assert len(attention) >= 5
    for report in attention:
        assert "wgmma" in report.code.matrix, f"{report.kernel} of {report.examples[0]}"
    rows = [report for report in compiled if not report.examples[0].startswith("attention")]
    assert len(rows) >= 3 * len(CHECKED)
    for report in rows:
        assert report.code.matrix == () and report.expected is None
        assert max(report.code.load_bytes, default=16) == 16 or "cp.async" in report.code.copies


@pytest.mark.parametrize("target", TARGETS)
def test_every_attention_configuration_is_reached_by_an_example(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprompt_kernels.kernels.triton.attention import configs as attention_configs

    reached: set[int] = set()
    find = attention_configs.candidates

    def recording(*arguments: object) -> object:
        found = find(*arguments)
        reached.add(id(found))
        return found

    monkeypatch.setattr(attention_configs, "candidates", recording)
    for example in shipped_configurations.examples():
        example.launches(TARGETS[target])
    for kernel in attention_configs.CONFIGS:
        for element in (2, 4):
            for head in (64, 128, 256):
                for rows in (4, 1000):
                    found = find(kernel, TARGETS[target], element, head, rows)
                    assert len(found) <= shipped_configurations.MAX_CANDIDATES
                    assert id(found) in reached, f"{kernel} on {target}: {element} bytes, heads of {head}, {rows} rows"


def test_examples_have_unique_names_and_allocate_no_memory() -> None:
    names = [example.name for example in shipped_configurations.examples()]
    assert len(set(names)) == len(names)
    for example in shipped_configurations.examples():
        for launch in example.launches(TARGETS["sm_90"]):
            tensors = [value for value in tree_leaves(launch.arguments) if isinstance(value, torch.Tensor)]
            assert tensors and all(tensor.device.type == "meta" for tensor in tensors)


def test_a_kernel_that_fails_is_compiled_once_more_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_one, failures = ahead_of_time._compile, [True, True]

    def failing_at_first(source: ahead_of_time.Source) -> Report:
        report = compile_one(source)
        return replace(report, code=None, violations=("does not compile",)) if failures.pop() else report

    monkeypatch.setattr(ahead_of_time, "_compile", failing_at_first)
    failures[:] = [False, True]
    (report,) = compile_for("sm_80", launches=[gemm_launch()])
    assert report.code is not None and not report.violations
    failures[:] = [True, True]
    (report,) = compile_for("sm_80", launches=[gemm_launch()])
    assert report.violations == ("does not compile",)
