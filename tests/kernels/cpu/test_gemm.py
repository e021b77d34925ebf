"""The C++ GEMM with fp32 accuracy, against float64 and PyTorch's fp32 GEMM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt_kernels.kernels.cpu.gemm import fastest_gemm, gemm_, has_fast_gemm, has_gemm
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.problems.tensors import DTYPES

pytestmark = pytest.mark.usefixtures("gemm_is_available")


@pytest.fixture(scope="module")
def gemm_is_available(module):
    if not has_gemm():
        pytest.skip(f"neither AMX nor AVX-512: the instruction set is {module.instruction_set()}")


def matmul(left, right):
    return gemm_(torch.full((left.shape[0], right.shape[1]), torch.nan), left, right)


def transposed_in_memory(matrix):
    return matrix.mT.contiguous().mT


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@given(
    rows=st.sampled_from([1, 8, 16, 17, 33, 160, 1030]),
    depth=st.sampled_from([1, 31, 32, 33, 100, 576]),
    columns=st.sampled_from([1, 15, 32, 49, 300]),
    dtype=st.sampled_from(list(DTYPES)),
    transposed=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_float64_at_any_size(rows, depth, columns, dtype, transposed, threads, seed):
    torch.manual_seed(seed)
    left, right = torch.randn(rows, depth), torch.randn(depth, columns).to(dtype)
    right = transposed_in_memory(right) if transposed else right
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = matmul(left, right)
    finally:
        torch.set_num_threads(count)
    exact = left.double() @ right.double()
    bound = left.double().abs() @ right.double().abs()
    assert ((found - exact).abs() <= 6e-7 * bound).all()  # 2^-21 of each product, plus rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(64, 576, 300), (16, 5000, 70), (1100, 40, 40), (40, 22000, 17)])
def test_error_is_no_worse_than_that_of_pytorch_s_fp32_gemm(dtype, transposed, sizes):
    torch.manual_seed(0)
    left, right = torch.randn(sizes[0], sizes[1]), torch.randn(sizes[1], sizes[2]).to(dtype)
    right = transposed_in_memory(right) if transposed else right
    exact = left.double() @ right.double()
    assert error(matmul(left, right), exact) <= 1.5 * error(left @ right.float(), exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_accuracy_holds_for_numbers_of_very_different_size(transposed):
    """Sizes differ within a row and between rows. All numbers have one sign, so that errors cannot cancel."""
    torch.manual_seed(0)
    left = torch.exp(torch.randn(50, 700) * 8) * torch.exp(torch.randn(50, 1) * 12)
    right = torch.exp(torch.randn(700, 60) * 8)
    right = transposed_in_memory(right) if transposed else right
    exact = left.double() @ right.double()
    ours, theirs = (((found - exact) / exact).abs().max() for found in (matmul(left, right), left @ right))
    assert ours <= max(1.5 * theirs, 4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_accumulate_adds_to_out(dtype, transposed):
    torch.manual_seed(0)
    left, right, out = torch.randn(70, 650), torch.randn(650, 45).to(dtype), torch.randn(70, 45)
    right = transposed_in_memory(right) if transposed else right
    exact = out.double() + left.double() @ right.double()
    torch.testing.assert_close(gemm_(out, left, right, accumulate=True).double(), exact, rtol=0, atol=1e-4)


def test_views_of_larger_matrices_need_no_copies():
    torch.manual_seed(0)
    left, right, out = torch.randn(40, 90)[:, 5:75], torch.randn(80, 100)[3:73, 11:61], torch.zeros(40, 120)
    gemm_(out[:, 20:70], left, right)
    assert torch.equal(out[:, 20:70], matmul(left.contiguous(), right.contiguous()))
    assert (out[:, :20] == 0).all() and (out[:, 70:] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_matrices(sizes):
    rows, depth, columns = sizes
    out = matmul(torch.ones(rows, depth), torch.ones(depth, columns))
    assert out.shape == (rows, columns) and (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_in_every_run_and_for_any_number_of_threads(threads, dtype, transposed):
    torch.manual_seed(0)
    left, right = torch.randn(300, 1500), torch.randn(1500, 200).to(dtype)
    right = transposed_in_memory(right) if transposed else right
    threads(1)
    first = matmul(left, right)
    for count in (1, 2, 3, 7):
        threads(count)
        assert torch.equal(first, matmul(left, right))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000, -0x800000, 0x7F800001])
def test_a_non_finite_number_changes_only_its_row_and_its_column(bits, module):
    """NaN, infinities, and a NaN whose upper half is that of an infinity. The matrix unit makes NaN of all of them."""
    on_matrix_unit = module.instruction_set() == "amx"
    torch.manual_seed(0)
    left, right = torch.randn(40, 70), torch.randn(70, 50)
    clean = matmul(left, right)
    left.view(torch.int32)[17, 33] = bits
    found = matmul(left, right)
    assert found[17].isnan().all() if on_matrix_unit else not found[17].isfinite().any()
    others = torch.arange(40) != 17
    assert torch.equal(found[others], clean[others])
    columns = matmul(right.mT.contiguous(), left.mT)
    assert columns[:, 17].isnan().all() if on_matrix_unit else not columns[:, 17].isfinite().any()
    assert columns[:, others].isfinite().all()


def test_sums_beyond_the_range_of_fp32_are_infinite():
    left = torch.full((2, 40), 1e30)
    assert (matmul(left, torch.full((40, 3), 1e30)) == torch.inf).all()
    assert (matmul(-left, torch.full((40, 3), 1e30)) == -torch.inf).all()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux has /proc")
def test_losses_use_this_gemm_where_pytorch_s_is_slower(module):
    vendor_is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    faster = module.instruction_set() == "amx" or not vendor_is_intel
    assert (fastest_gemm() is not TORCH) == has_fast_gemm() == faster


def test_other_instruction_sets_pass_these_tests_too(module):
    chosen = module.instruction_set()
    for name in {"amx", "avx512"} & set(module.instruction_sets()) - {chosen}:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "not other_instruction",
        ]
        done = subprocess.run(command, env={**os.environ, "SOFTPROMPT_ISA": name}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_other_shapes_dtypes_and_strides_are_refused():
    out, left, right = torch.empty(2, 4), torch.empty(2, 3), torch.empty(3, 4)
    with pytest.raises(ValueError, match=r"out must be \[n, m\] for \[n, k\] and \[k, m\]"):
        gemm_(out, left, right.mT)
    with pytest.raises(ValueError, match="out and left must be float32"):
        gemm_(out, left.bfloat16(), right)
    with pytest.raises(ValueError, match="right a stride of 1 in either dimension"):
        gemm_(out, left, torch.empty(6, 8)[::2, ::2])
    with pytest.raises(ValueError, match="out and left must have a last stride of 1"):
        gemm_(torch.empty(4, 2).mT, left, right)
