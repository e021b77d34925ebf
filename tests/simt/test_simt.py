"""csrc/simt: that right kernels give right results under every schedule, and that each wrong one is caught."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / "faults.cu"
FAULTS = {
    "reads_beyond_the_end": "reads 4 bytes, 0 beyond the end of a buffer of 256 bytes",
    "reads_before_the_beginning": "reads 4 bytes",
    "writes_to_an_input": "writes a buffer that may only be read",
    "reads_16_bytes_from_an_odd_place": "an access of 16 bytes at 0x[0-9a-f]+, which is not a multiple",
    "reads_beyond_shared_memory": "reads 4 bytes, 0 beyond the end of the block's 256 bytes of shared memory",
    "reads_what_nobody_wrote": "reads shared memory that nobody has written to",
    "needs_more_shared_memory": "uses 2560 bytes of shared memory and was given 256",
    "forgets_a_barrier": "race in shared memory|reads shared memory that nobody has written to",
    "overwrites_what_others_may_still_read": "race in shared memory",
    "forgets_a_barrier_of_the_warp": "race in shared memory: reads what thread [0-9]+ wrote",
    "leaves_lanes_behind": "an operation of the warp waits for lane 7, which has ended",
    "waits_at_two_places": "an operation of the warp waits for lane 3, which waits at a barrier of the block",
    "is_not_in_its_own_mask": "lane (1[6-9]|2[0-9]|3[01]) is not in its own mask 0xffff",
    "reads_a_copy_before_it_lands": "reads shared memory while an asynchronous copy to it is on its way",
    "waits_for_too_few_copies": "reads shared memory while an asynchronous copy to it is on its way",
    "never_commits_a_copy": "reads shared memory while an asynchronous copy to it is on its way",
    "leaves_with_a_copy_on_its_way": "the thread ends while a copy to shared memory is on its way",
    "shares_a_copy_without_a_barrier": "race in shared memory|asynchronous copy to it is on its way|nobody has written",
    "copies_to_an_odd_place": "an asynchronous copy of 16 bytes from .* to .*, which are not both multiples of 16",
    "loads_matrices_from_an_odd_place": "ldmatrix of 0x[0-9a-f]+, which is not a multiple of 16",
    "overflows_its_stack": "the thread's stack overflows",
    "reads_again_after_a_barrier_of_the_warp": "race in shared memory: (reads|writes) what thread [01] (read|wrote)",
    "waits_at_two_barriers": "thread 0 waits at another barrier, .*faults.cu:[0-9]+",
    "multiplies_at_two_places": "lane [0-9]+ is at the same operation in another place, .*faults.cu:[0-9]+",
}
FAULTS_OF_TWO_BLOCKS = {
    "writes_where_another_block_does": "race in global memory: writes what thread [0-9]+ of another block wrote",
    "reads_what_another_block_writes": "race in global memory: (reads|writes) what thread [0-9]+ of another block",
    "adds_atomically_and_reads": "race in global memory",
    "adds_once_and_reads": "race in global memory: (reads|updates) what",
}
RIGHT = ("sum", "has_a_barrier_of_the_warp", "copies_as_it_should", "adds_atomically", "reads_and_updates_in_turn")


@pytest.fixture(params=range(3))
def seed(request, toys):
    toys.seed(request.param)
    return request.param


def run(toys, known, name, blocks=1):
    data = torch.arange(1, 65, dtype=torch.float32)
    out = torch.zeros(128)
    with known([data], [out]):
        toys.toy(name, data.data_ptr(), out.data_ptr(), blocks)
    return data, out


def lines_of(name):
    """The lines of a toy in its source, from the one that names it."""
    source = SOURCE.read_text().splitlines()
    first = next(i for i, line in enumerate(source) if line.startswith("__global__") and f" {name}(" in line)
    last = next(i for i in range(first, len(source)) if source[i].endswith("}") and not source[i].startswith(" "))
    return range(first + 1, last + 2)


@pytest.mark.parametrize(("name", "said"), [*FAULTS.items(), *FAULTS_OF_TWO_BLOCKS.items()])
def test_what_is_wrong_is_said_with_its_thread_and_line(name, said, seed, toys, known):
    with pytest.raises(toys.SimtFault, match=said) as caught:
        run(toys, known, name, blocks=2 if name in FAULTS_OF_TWO_BLOCKS else 1)
    found = re.search(
        r"; block \((\d), 0, 0\), thread \((\d+), 0, 0\) of .*(\w+)\(.*\), in .*\.cu:(\d+)$", str(caught.value)
    )
    if name == "overflows_its_stack":
        assert "deep" in str(caught.value) or "faults.cu" in str(caught.value)
        return
    assert name in str(caught.value), caught.value
    assert found is not None and int(found[2]) < 64, caught.value
    if name != "needs_more_shared_memory":
        assert int(found[4]) in lines_of(name), caught.value


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name, seed, toys, known):
    data, out = run(toys, known, name, blocks=1 if name != "adds_atomically" else 3)
    expected = {
        "sum": [data.sum()],
        "has_a_barrier_of_the_warp": data.view(32, 2).flip(1).flatten(),
        "copies_as_it_should": torch.cat([data[:32], torch.zeros(32)]),
        "adds_atomically": [3 * data.sum()],
        "reads_and_updates_in_turn": data + data.view(2, 32).roll(-1, 1).flatten(),
    }[name]
    assert out[: len(expected)].tolist() == list(expected)


def test_a_launch_after_a_fault_starts_afresh(toys, known):
    for _ in range(2):
        with pytest.raises(toys.SimtFault):
            run(toys, known, "forgets_a_barrier")
        data, out = run(toys, known, "sum")
        assert out[0] == data.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(64, 64, 64), (100, 72, 256), (1, 130, 192)])
def test_products_of_tiles_with_copies_on_their_way(dtype, rows, columns, depth, seed, toys, known):
    torch.manual_seed(seed)
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    c = torch.full((rows, columns), torch.nan)
    with known([a, b], [c]):
        toys.gemm(a.data_ptr(), b.data_ptr(), c.data_ptr(), rows, columns, depth, dtype == torch.bfloat16)
    torch.testing.assert_close(c.double(), a.double() @ b.double().mT, rtol=1e-6, atol=1e-5 * depth**0.5)


def test_memory_must_be_known_and_known_once(toys, known):
    data = torch.ones(64)
    with known([data], []), pytest.raises(ValueError, match="overlaps"):
        toys.register(data[10:].data_ptr(), 16, False)
    with pytest.raises(ValueError, match="not registered"):
        toys.unregister(data.data_ptr())
    with pytest.raises(toys.SimtFault, match=r"no memory is registered|beyond the end of the block"):
        toys.toy("sum", data.data_ptr(), data.data_ptr(), 1)


def test_threads_of_python_may_launch_at_once(toys, known):
    data = torch.arange(1, 65, dtype=torch.float32)
    outs = [torch.zeros(1) for _ in range(4)]
    with known([data], outs), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda out: [toys.toy("sum", data.data_ptr(), out.data_ptr(), 1) for _ in range(10)], outs))
    assert [out.item() for out in outs] == [data.sum()] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_rounded_as_pytorch_rounds_them(dtype, toys):
    """All of them, and what lies between two neighbours: just before, at and just behind the middle."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    toys.convert(narrow.data_ptr(), wide.data_ptr(), 2**16, dtype == torch.bfloat16, True)
    assert torch.equal(wide.nan_to_num(nan=1.5), narrow.view(dtype).float().nan_to_num(nan=1.5))
    assert torch.equal(wide.isnan(), narrow.view(dtype).isnan())
    bits = wide.view(torch.int32)
    half = 2**15 if dtype == torch.bfloat16 else 2**12
    for step in (0, half - 1, half, half + 1, 1):
        between = (bits + step).view(torch.float32)
        between = torch.cat([between, torch.linspace(-7e-8, 7e-8, 2**10), torch.tensor([65519.99, 65520.0, 1e38])])
        found = torch.empty(between.numel(), dtype=torch.int16)
        toys.convert(between.data_ptr(), found.data_ptr(), between.numel(), dtype == torch.bfloat16, False)
        wanted = between.to(dtype)
        assert torch.equal(found.view(dtype).isnan(), wanted.isnan())
        assert torch.equal(found[~wanted.isnan()], wanted.view(torch.int16)[~wanted.isnan()])


@pytest.fixture
def counted(toys):
    toys.reset_counters()
    toys.count(True)
    yield toys.counters
    toys.count(False)


def test_traffic_and_waits_are_counted(toys, known, counted):
    run(toys, known, "sum", blocks=3)
    found = counted()
    assert (found["launches"], found["blocks"], found["barriers"]) == (1, 3, 3)
    assert (found["loaded_bytes"], found["stored_bytes"]) == (3 * 256, 3 * 4)
    assert (found["loaded_sectors"], found["stored_sectors"]) == (3 * 8, 3)
    assert found["shared_conflicts"] == found["atomics"] == found["products"] == 0
    run(toys, known, "adds_atomically", blocks=3)
    assert counted()["atomics"] == 3 * 64


def test_sectors_of_strided_loads_and_conflicts_of_banks(toys, known, counted):
    run(toys, known, "strides")
    assert (counted()["loaded_bytes"], counted()["loaded_sectors"], counted()["stored_sectors"]) == (32, 8, 1)
    toys.reset_counters()
    run(toys, known, "conflicts")
    assert counted()["shared_conflicts"] == 7


def test_products_are_counted_and_swizzled_tiles_have_no_conflicts(toys, known, counted):
    a, b, c = torch.ones(128, 128).half(), torch.ones(64, 128).half(), torch.empty(128, 64)
    with known([a, b], [c]):
        toys.gemm(a.data_ptr(), b.data_ptr(), c.data_ptr(), 128, 64, 128, False)
    found = counted()
    assert found["products"] == 128 * 64 * 128 // (16 * 8 * 16)
    assert found["matrix_conflicts"] == found["copy_conflicts"] == found["shared_conflicts"] == 0
    assert found["loaded_bytes"] == 2 * (128 * 128 + 64 * 128 * 2)
    assert found["stored_bytes"] == 4 * 128 * 64
