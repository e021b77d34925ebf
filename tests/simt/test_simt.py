"""csrc/simt: correct kernels give correct results under every schedule, and every error is found."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / "small_kernels.cu"
ERRORS = {
    "reads_beyond_the_end": "reads 4 bytes, 0 beyond the end of a buffer of 256 bytes",
    "reads_before_the_beginning": "reads 4 bytes",
    "writes_to_an_input": "writes a buffer that may only be read",
    "reads_16_bytes_at_an_unaligned_address": "an access of 16 bytes at 0x[0-9a-f]+, which is not a multiple",
    "reads_beyond_shared_memory": "reads 4 bytes, 0 beyond the end of the block's 256 bytes of shared memory",
    "reads_unwritten_shared_memory": "reads shared memory that was never written",
    "needs_more_shared_memory": "uses 2560 bytes of shared memory and was given 256",
    "misses_a_barrier": "race in shared memory|reads shared memory that was never written",
    "overwrites_before_others_have_read": "race in shared memory",
    "misses_a_warp_barrier": "race in shared memory: reads what thread [0-9]+ wrote",
    "shuffles_after_a_lane_has_ended": "an operation of the warp waits for lane 7, which has ended",
    "shuffles_while_a_lane_is_at_a_barrier": "waits for lane 3, which waits at a barrier of the block",
    "is_not_in_its_own_mask": "lane (1[6-9]|2[0-9]|3[01]) is not in its own mask 0xffff",
    "reads_a_copy_without_waiting": "reads shared memory while an asynchronous copy to it is unfinished",
    "waits_for_too_few_copies": "reads shared memory while an asynchronous copy to it is unfinished",
    "never_commits_a_copy": "reads shared memory while an asynchronous copy to it is unfinished",
    "ends_during_a_copy": "the thread ends while a copy to shared memory is unfinished",
    "shares_a_copy_without_a_barrier": "race in shared memory|asynchronous copy to it is unfinished|never written",
    "copies_to_an_unaligned_address": "copy of 16 bytes from .* to .*, which are not both multiples of 16",
    "loads_matrices_from_an_unaligned_address": "ldmatrix of 0x[0-9a-f]+, which is not a multiple of 16",
    "overflows_its_stack": "the thread's stack overflows",
    "reads_again_after_a_warp_barrier": "race in shared memory: (reads|writes) what thread [01] (read|wrote)",
    "waits_at_two_barriers": "thread 0 waits at another barrier, .*small_kernels.cu:[0-9]+",
    "multiplies_at_two_lines": "lane [0-9]+ is at the same operation in another place, .*small_kernels.cu:[0-9]+",
}
ERRORS_OF_TWO_BLOCKS = {
    "writes_where_another_block_writes": "race in global memory: writes what thread [0-9]+ of another block wrote",
    "reads_what_another_block_writes": "race in global memory: (reads|writes) what thread [0-9]+ of another block",
    "adds_atomically_and_reads": "race in global memory",
    "adds_once_and_reads": "race in global memory: (reads|updates) what",
}
CORRECT = ("sum", "has_a_warp_barrier", "copies_correctly", "adds_atomically", "reads_and_updates_in_turn")


@pytest.fixture(params=range(3))
def seed(request, kernels):
    kernels.seed(request.param)
    return request.param


def run_kernel(kernels, registered, name, blocks=1):
    data = torch.arange(1, 65, dtype=torch.float32)
    out = torch.zeros(128)
    with registered([data], [out]):
        kernels.run(name, data.data_ptr(), out.data_ptr(), blocks)
    return data, out


def lines_of(name):
    """The source lines of a kernel, from the one with its name."""
    source = SOURCE.read_text().splitlines()
    first = next(i for i, line in enumerate(source) if line.startswith("__global__") and f" {name}(" in line)
    last = next(i for i in range(first, len(source)) if source[i].endswith("}") and not source[i].startswith(" "))
    return range(first + 1, last + 2)


@pytest.mark.parametrize(("name", "message"), [*ERRORS.items(), *ERRORS_OF_TWO_BLOCKS.items()])
def test_errors_name_the_thread_and_the_line(name, message, seed, kernels, registered):
    with pytest.raises(kernels.SimtError, match=message) as caught:
        run_kernel(kernels, registered, name, blocks=2 if name in ERRORS_OF_TWO_BLOCKS else 1)
    found = re.search(
        r"; block \((\d), 0, 0\), thread \((\d+), 0, 0\) of .*(\w+)\(.*\), in .*\.cu:(\d+)$", str(caught.value)
    )
    if name == "overflows_its_stack":
        assert "deep" in str(caught.value) or "small_kernels.cu" in str(caught.value)
        return
    assert name in str(caught.value), caught.value
    assert found is not None and int(found[2]) < 64, caught.value
    if name != "needs_more_shared_memory":
        assert int(found[4]) in lines_of(name), caught.value


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_pass(name, seed, kernels, registered):
    data, out = run_kernel(kernels, registered, name, blocks=1 if name != "adds_atomically" else 3)
    expected = {
        "sum": [data.sum()],
        "has_a_warp_barrier": data.view(32, 2).flip(1).flatten(),
        "copies_correctly": torch.cat([data[:32], torch.zeros(32)]),
        "adds_atomically": [3 * data.sum()],
        "reads_and_updates_in_turn": data + data.view(2, 32).roll(-1, 1).flatten(),
    }[name]
    assert out[: len(expected)].tolist() == list(expected)


def test_a_launch_after_an_error_is_not_affected(kernels, registered):
    for _ in range(2):
        with pytest.raises(kernels.SimtError):
            run_kernel(kernels, registered, "misses_a_barrier")
        data, out = run_kernel(kernels, registered, "sum")
        assert out[0] == data.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(64, 64, 64), (100, 72, 256), (1, 130, 192)])
def test_gemm_with_asynchronous_copies(dtype, rows, columns, depth, seed, kernels, registered):
    torch.manual_seed(seed)
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    c = torch.full((rows, columns), torch.nan)
    with registered([a, b], [c]):
        kernels.gemm(a.data_ptr(), b.data_ptr(), c.data_ptr(), rows, columns, depth, dtype == torch.bfloat16)
    torch.testing.assert_close(c.double(), a.double() @ b.double().mT, rtol=1e-6, atol=1e-5 * depth**0.5)


def test_memory_must_be_registered_exactly_once(kernels, registered):
    data = torch.ones(64)
    with registered([data], []), pytest.raises(ValueError, match="overlaps"):
        kernels.register(data[10:].data_ptr(), 16, False)
    with pytest.raises(ValueError, match="not registered"):
        kernels.unregister(data.data_ptr())
    with pytest.raises(kernels.SimtError, match=r"no memory is registered|beyond the end of the block"):
        kernels.run("sum", data.data_ptr(), data.data_ptr(), 1)


def test_several_python_threads_may_launch_concurrently(kernels, registered):
    data = torch.arange(1, 65, dtype=torch.float32)
    outs = [torch.zeros(1) for _ in range(4)]
    with registered([data], outs), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda out: [kernels.run("sum", data.data_ptr(), out.data_ptr(), 1) for _ in range(10)], outs))
    assert [out.item() for out in outs] == [data.sum()] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_rounded_as_in_pytorch(dtype, kernels):
    """All 16-bit numbers, and numbers between two neighbours: just before, at and just after the middle."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    kernels.convert(narrow.data_ptr(), wide.data_ptr(), 2**16, dtype == torch.bfloat16, True)
    assert torch.equal(wide.nan_to_num(nan=1.5), narrow.view(dtype).float().nan_to_num(nan=1.5))
    assert torch.equal(wide.isnan(), narrow.view(dtype).isnan())
    bits = wide.view(torch.int32)
    half = 2**15 if dtype == torch.bfloat16 else 2**12
    for step in (0, half - 1, half, half + 1, 1):
        between = (bits + step).view(torch.float32)
        between = torch.cat([between, torch.linspace(-7e-8, 7e-8, 2**10), torch.tensor([65519.99, 65520.0, 1e38])])
        found = torch.empty(between.numel(), dtype=torch.int16)
        kernels.convert(between.data_ptr(), found.data_ptr(), between.numel(), dtype == torch.bfloat16, False)
        wanted = between.to(dtype)
        assert torch.equal(found.view(dtype).isnan(), wanted.isnan())
        assert torch.equal(found[~wanted.isnan()], wanted.view(torch.int16)[~wanted.isnan()])


@pytest.fixture
def counters(kernels):
    kernels.reset_counters()
    kernels.count(True)
    yield kernels.counters
    kernels.count(False)


def test_traffic_barriers_and_atomics_are_counted(kernels, registered, counters):
    run_kernel(kernels, registered, "sum", blocks=3)
    found = counters()
    assert (found["launches"], found["blocks"], found["barriers"]) == (1, 3, 3)
    assert (found["loaded_bytes"], found["stored_bytes"]) == (3 * 256, 3 * 4)
    assert (found["loaded_sectors"], found["stored_sectors"]) == (3 * 8, 3)
    assert found["shared_conflicts"] == found["atomics"] == found["mma"] == 0
    run_kernel(kernels, registered, "adds_atomically", blocks=3)
    assert counters()["atomics"] == 3 * 64


def test_sectors_of_strided_loads_and_bank_conflicts(kernels, registered, counters):
    run_kernel(kernels, registered, "loads_with_a_stride")
    assert (counters()["loaded_bytes"], counters()["loaded_sectors"], counters()["stored_sectors"]) == (32, 8, 1)
    kernels.reset_counters()
    run_kernel(kernels, registered, "has_bank_conflicts")
    assert counters()["shared_conflicts"] == 7


def test_mma_are_counted_and_swizzled_tiles_have_no_conflicts(kernels, registered, counters):
    a, b, c = torch.ones(128, 128).half(), torch.ones(64, 128).half(), torch.empty(128, 64)
    with registered([a, b], [c]):
        kernels.gemm(a.data_ptr(), b.data_ptr(), c.data_ptr(), 128, 64, 128, False)
    found = counters()
    assert found["mma"] == 128 * 64 * 128 // (16 * 8 * 16)
    assert found["matrix_conflicts"] == found["copy_conflicts"] == found["shared_conflicts"] == 0
    assert found["loaded_bytes"] == 2 * (128 * 128 + 64 * 128 * 2)
    assert found["stored_bytes"] == 4 * 128 * 64
