"""The counters of Triton kernels and of PyTorch's operations, on work whose counts are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softprompt_kernels.kernels.triton import runtime

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)


if not runtime.missing():
    import triton
    import triton.language as tl

    @triton.jit
    def gemm(a, b, bias, out, rows, columns, depth, BLOCK: tl.constexpr):
        """out = a b + bias."""
        m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, depth, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside_a = (m[:, None] < rows) & (k[None, :] < depth)
            inside_b = (k[:, None] < depth) & (n[None, :] < columns)
            a_tile = tl.load(a + m[:, None] * depth + k[None, :], mask=inside_a, other=0)
            b_tile = tl.load(b + k[:, None] * columns + n[None, :], mask=inside_b, other=0)
            total = tl.dot(a_tile, b_tile, total)
        # One number for each column, asked for by every row of the tile.
        total += tl.load(bias + n[None, :] + 0 * m[:, None], mask=n[None, :] < columns, other=0)
        inside = (m[:, None] < rows) & (n[None, :] < columns)
        tl.store(out + m[:, None] * columns + n[None, :], total, mask=inside)

    @triton.jit
    def total_exp(values, out, count, BLOCK: tl.constexpr):
        """out += Σ exp(values)."""
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        e = tl.exp2(tl.load(values + n, mask=n < count, other=float("-inf")))
        tl.atomic_add(out, tl.sum(e))


@pytest.mark.interpreter
def test_loads_and_stores_count_by_lane_program_and_wave() -> None:
    from benchmarks.counted.triton_traffic import Traffic

    a, b, bias = torch.randn(40, 24), torch.randn(24, 56), torch.randn(56)
    out = torch.empty(40, 56)
    with Traffic(wave=3) as traffic:
        gemm[(3, 4)](a, b, bias, out, 40, 56, 24, BLOCK=16)
    torch.testing.assert_close(out, a @ b + bias)
    (launch,) = traffic.launches
    assert (launch.kernel, launch.programs) == ("gemm", 12)
    assert launch.flop == 12 * 2 * (2 * 16**3)
    found = launch.tensors
    assert found["a"].unique_read == 4 * 40 * 24
    assert found["a"].issued_read == 4 * found["a"].unique_read  # for each of 4 tiles of columns
    assert found["b"].issued_read == 3 * 4 * 24 * 56
    # A wave is a column of 3 tiles. It reads its part of `b` once, and all of `a`, which the wave before it read too.
    assert found["b"].missed_read == 4 * 24 * 56
    assert found["a"].missed_read == 4 * 40 * 24
    assert found["bias"].issued_read == 3 * 4 * 56  # lanes that share an address count once
    assert found["out"].issued_written == found["out"].unique_written == 4 * 40 * 56
    assert traffic.total("missed", accept=lambda name: name == "out") == 4 * 40 * 56


@pytest.mark.interpreter
def test_wave_fetches_again_what_the_wave_before_did_not_read() -> None:
    from benchmarks.counted.triton_traffic import Traffic

    a, b, bias, out = torch.randn(32, 16), torch.randn(16, 32), torch.randn(32), torch.empty(32, 32)
    with Traffic(wave=1) as traffic:
        gemm[(2, 2)](a, b, bias, out, 32, 32, 16, BLOCK=16)
    figures = traffic.launches[0].tensors
    # In the order of the programs, the row of tiles alternates and the column changes once.
    assert figures["a"].missed_read == 2 * 4 * 32 * 16
    assert figures["b"].missed_read == 4 * 16 * 32


@pytest.mark.interpreter
def test_exponentials_and_atomics_are_counted() -> None:
    from benchmarks.counted.triton_traffic import Traffic

    values, out = torch.randn(100), torch.zeros(1)
    with Traffic() as traffic:
        total_exp[(4,)](values, out, 100, BLOCK=32)
    assert traffic.total("exponentials") == 4 * 32  # masked lanes count too
    assert traffic.total("atomics") == 4
    figures = traffic.launches[0].tensors
    assert figures["values"].issued_read == 4 * 100
    assert (figures["out"].issued_read, figures["out"].issued_written, figures["out"].unique_written) == (16, 16, 4)


@pytest.mark.interpreter
def test_tensors_that_overlap_are_one_region() -> None:
    from benchmarks.counted.triton_traffic import Traffic

    values = torch.randn(64, 64)
    with Traffic() as traffic:
        gemm[(4, 4)](torch.randn(64, 16), torch.randn(16, 64), values[0], values, 64, 64, 16, BLOCK=16)
    assert "bias=out" in traffic.launches[0].tensors or "out=bias" in traffic.launches[0].tensors


@pytest.mark.interpreter
def test_interpreter_is_restored_after_an_exception() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from benchmarks.counted.triton_traffic import Traffic

    before = InterpreterBuilder.create_masked_load
    with pytest.raises(ZeroDivisionError), Traffic():
        raise ZeroDivisionError
    assert InterpreterBuilder.create_masked_load is before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_pytorch_count_what_they_read_write_and_multiply(device: str) -> None:
    from benchmarks.counted.aten_traffic import AtenTraffic

    a, b = torch.zeros(8, 4, device=device), torch.zeros(4, 16, device=device)
    out = torch.empty(8, 16, device=device)
    with AtenTraffic() as traffic:
        torch.mm(a, b, out=out)
        a.t().expand(4, 8).view(4, 8)  # views cost nothing
    assert (traffic.operations, traffic.flop) == (1, 2 * 8 * 4 * 16)
    assert (traffic.read, traffic.written) == (4 * (8 * 4 + 4 * 16), 4 * 8 * 16)
    with AtenTraffic() as traffic:
        torch.addmm(out, a, b, out=out)  # adds to what it writes
    assert traffic.read == 4 * (8 * 16 + 8 * 4 + 4 * 16)
    assert traffic.flop == 2 * 8 * 4 * 16
    with AtenTraffic() as traffic:
        out.add_(1)
        out.zero_()
        out[:2].copy_(out[2:4])
    assert traffic.read == 4 * (8 * 16 + 2 * 16)
    assert traffic.written == 4 * (8 * 16 + 8 * 16 + 2 * 16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_memory_is_that_of_storages_alive_together(device: str) -> None:
    from benchmarks.counted.aten_traffic import AtenTraffic

    given = torch.zeros(1000, device=device)
    with AtenTraffic() as traffic:
        first = given + 1
        second = first * 2
        del first
        third = second.exp()
        del second
        fourth = third[:10]
        del third  # a view keeps its storage
    assert traffic.peak == 2 * 4000
    assert traffic.kept == 4000
    del fourth
    assert traffic.kept == 0


def test_skipped_kernels_are_recorded_and_not_run() -> None:
    if runtime.missing():
        pytest.skip(f"the triton backend: {runtime.missing()}")
    from benchmarks.counted.aten_traffic import skip_launches

    values = torch.zeros(100, device="meta")
    with skip_launches() as skipped:
        total_exp[(4,)](values, torch.zeros(1, device="meta"), 100, BLOCK=32)
    assert skipped == ["total_exp"]


def test_attention_of_pytorch_counts_its_products_and_exponentials() -> None:
    from benchmarks.counted.aten_traffic import AtenTraffic

    query, key = torch.randn(2, 4, 8, 16, requires_grad=True), torch.randn(2, 4, 24, 16, requires_grad=True)
    products = 2 * 4 * 8 * 24 * (2 * 16 + 2 * 16)
    with AtenTraffic() as traffic:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert (traffic.flop, traffic.exponentials) == (products, 2 * 4 * 8 * 24)
    with AtenTraffic() as traffic:
        torch.autograd.grad(out, (query, key), torch.ones_like(out))
    assert (traffic.flop, traffic.exponentials) == (products * 5 // 2, 2 * 4 * 8 * 24)


def test_bound_is_that_of_the_scarcest_resource() -> None:
    from benchmarks.counted.roofline import GPUS, bound

    assert bound("H100", "bf16", bytes_moved=3.35e9, flop=1.0).seconds == pytest.approx(1e-3)
    assert bound("H200", "bf16", bytes_moved=4.8e9, flop=1.0).seconds == pytest.approx(1e-3)
    assert bound("MI300X", "bf16", bytes_moved=1.0, flop=1307.4e9).seconds == pytest.approx(1e-3)
    assert bound("H100", "bf16", bytes_moved=3.35e9, flop=989e9 * 2).by == "GEMM"
    assert bound("A100", "fp32", bytes_moved=1.0, flop=19.5e9).seconds == pytest.approx(1e-3)
    assert bound("B200", "bf16", bytes_moved=1.0, flop=1.0, exponentials=1e12).by == "exponentials"
    for chip, gpu in GPUS.items():  # 16 exponentials a clock, where there are 128 or 256 FLOP in fp32
        assert gpu.exponentials == pytest.approx(gpu.flop["fp32"] / (8 if chip == "A100" else 16), rel=0.01)
    assert list(GPUS) == ["A100", "H100", "H200", "B200", "MI300X"]


@pytest.mark.interpreter
def test_our_counts_meet_all_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.counted import peers
    from benchmarks.counted.attention import AttentionCase, count_attention
    from benchmarks.counted.losses import HeadCase, LogitsCase, count_head, count_logits
    from benchmarks.counted.requirements import check_requirements

    monkeypatch.setattr(peers, "FROM_HIDDEN", {peers.LIGER_HIDDEN: peers.liger_hidden})  # the others have no limit
    tiny = {"heads": 2, "kv_heads": 1, "size": 16}
    counts = [count for batch in (2, 4) for count in count_attention(AttentionCase(batch=batch, **tiny))]
    counts += [count for name in ("forward", "jsd") for count in count_logits(LogitsCase(rows=4, vocab=600), name)]
    counts += count_head(HeadCase(counted_rows=1))
    records = [count.record() for count in counts]
    required = check_requirements(records)
    assert len(required) >= 15
    assert not [one for one in required if not one.holds]
    # Whoever copies the prompt to each sequence moves more than the op, in the forward and for each implementation.
    moved = {
        record["implementation"]: record["moved"]
        for record in records
        if record["suite"] == "prompt_attention forward" and "left_out" not in record["more"]
    }
    assert len(moved) >= 4
    assert all(bytes_ > moved["prompt_attention"] for name, bytes_ in moved.items() if name != "prompt_attention")


@pytest.mark.interpreter
def test_products_of_the_heads_size_are_counted_for_each_implementation() -> None:
    from benchmarks.counted import peers
    from benchmarks.counted.losses import HeadCase, count_head, count_moments, count_teacher

    case = HeadCase(tokens=64, size=32, vocab=600, counted_rows=2)
    counts = [*count_head(case), *count_moments(case), *count_teacher(case)]
    products = {
        count.implementation: count.flop / (2 * 64 * 32 * 600) for count in counts if "left_out" not in count.more
    }
    # A 16-bit head on a GPU is multiplied in two parts when the moments are used or made.
    expected = {
        "linear_kl_div": 3,
        "linear_kl_div_from_moments": 3,
        "teacher_moments": 3,
        "F.kl_div of all logits": 3,
        "F.kl_div, cached probabilities": 2,
        "softmax of all logits, times the head": 2,
        peers.LIGER_HIDDEN: 3,
        peers.LIGER_PROBABILITIES: 2,
        peers.FLA_HIDDEN: 3,
        peers.TRL_HIDDEN: 5,  # it makes the logits of both twice
    }
    assert {name: expected[name] for name in products} == products
    assert all(count.moved >= count.floor for count in counts if "left_out" not in count.more)
    (reason,) = {
        count.more["left_out"] for count in count_head(case, "reverse") if count.implementation == peers.FLA_HIDDEN
    }
    assert reason.endswith("the forward KL alone") or "not installed" in reason


@pytest.mark.interpreter
def test_command_prints_a_table_for_each_problem(tmp_path: Path) -> None:
    written = tmp_path / "new" / "counters.json"
    done = counted("--op", "kl_div", "--chip", "H200", "MI300X", "--json", str(written))
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("counted, not measured", "F.kl_div of log-softmaxes", "floor", "H200 µs", "MI300X µs", "hold"):
        assert text in done.stdout
    assert "H100" not in done.stdout
    assert "Left out of kl_div forward, kl_div reverse, kl_div jsd: torch.compile of F.kl_div: it " in done.stdout
    records = json.loads(written.read_text())["records"]
    assert {record["suite"] for record in records} == {"kl_div forward", "kl_div reverse", "kl_div jsd"}
    assert {record["role"] for record in records} == {"ours", "peer", "PyTorch"}
    assert all(record["bounds"]["H200"]["seconds"] > 0 for record in records if record["role"] == "ours")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--op", "there is no op kl; accepted are prompt_attention, kl_div,"),
        ("--chip", "there is no chip kl; accepted"),
    ],
)
def test_an_unknown_op_or_chip_is_named(option: str, sentence: str, capsys: pytest.CaptureFixture) -> None:
    from benchmarks.counted.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main([option, "kl"])
    assert sentence in capsys.readouterr().err


def counted(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.counted", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
