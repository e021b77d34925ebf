"""What a run measures, what it leaves out and why, and that results are checked before they are timed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.bench import footprint
from softprompt_kernels.bench import measure as measuring
from softprompt_kernels.bench.clock import RunClock
from softprompt_kernels.bench.implementations import left_out
from softprompt_kernels.bench.measure import measure
from softprompt_kernels.bench.peers.registry import PEERS
from softprompt_kernels.bench.plan import make_plan
from softprompt_kernels.bench.record import Run
from softprompt_kernels.bench.reference import GEMM, MEMORY, bound_of, reference_of
from softprompt_kernels.bench.table import console, tables
from softprompt_kernels.bench.timing import time_in_turns
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.testing.cases import BACKWARD, BOTH, FORWARD, OPS, case, distance

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHAPES = {"prompt_attention": "B2 H4/2 M8 P4 D16", "kl_div": "N8 V64"}
EAGER_PEERS = [name for name, peer in PEERS.items() if not peer.compiled]


@pytest.mark.parametrize("op", OPS)
def test_peers_that_run_here_agree_with_float64(op: str) -> None:
    one = case(op, SHAPES.get(op, "N8 d16 V64"))
    inputs = one.inputs()
    ran = []
    for name in EAGER_PEERS:
        for pass_ in one.passes:
            if PEERS[name].left_out(one, pass_, torch.float32, CPU) is None:
                found = PEERS[name].prepare(one, inputs, pass_)()
                for result, expected in zip(found, one.reference(inputs, pass_), strict=True):
                    assert distance(result, expected) < one.tolerance(torch.float32), (name, pass_)
                ran.append(name)
    assert "eager" in ran


def test_peers_that_do_not_run_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, head, labels = (
        case("prompt_attention", "B2 H4/2 M8 P4 D16"),
        case("linear_kl_div", "N8 d16 V64"),
        case("linear_cross_entropy", "N8 d16 V64"),
    )

    def reason(name: str, one: Any, pass_: str = FORWARD) -> str | None:
        return left_out(one, name, pass_, torch.float32, CPU, named=True)

    assert reason("liger", attention) == "it has no prompt_attention"
    assert reason("flex", attention, BOTH) == "FlexAttention has no backward on a CPU"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert reason("flash-attn", attention) == "it needs a GPU"
    assert reason("fla", head) == "its kernels are written in Triton, which needs a GPU"
    assert reason("liger", labels) == "its kernels are written in Triton, which needs a GPU"
    assert reason("liger", head) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert reason("fla", head) == ("fla is not installed: pip install --no-deps flash-linear-attention fla-core einops")


def test_rows_hold_times_floor_and_error(run_here: Callable[..., Run]) -> None:
    run = run_here(backends=["cpu", "composed"], peers=["eager"], passes=[FORWARD, BOTH])
    rows = run.measured.rows
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        assert len(row.timed.seconds) == len(row.timed.reference_seconds) == 16
        assert 0 < row.error < 1e-4
        assert row.floor_seconds is not None and row.floor_seconds > 0
    assert {row.ours for row in rows if row.implementation == "eager"} == {False}
    with console().capture() as captured:
        console_ = captured._console
        console_.print(tables(run.measured))
    shown = captured.get()
    for part in ("prompt_attention B2 H4/2 M32 P16 D32", "forward+backward, float32", "GFLOP/s", "GB/s", "% of floor"):
        assert part in shown


def test_what_is_left_out_is_listed_with_its_reason(run_here: Callable[..., Run]) -> None:
    run = run_here(ops=["kl_div"], backends=["cpu", "triton"], peers=["eager", "flash-attn", "liger"])
    assert {row.implementation for row in run.measured.rows} == {"cpu", "eager"}
    with console().capture() as captured:
        captured._console.print(tables(run.measured))
    shown = " ".join(captured.get().split())
    assert "flash-attn has no kl_div" in shown
    assert "triton: student_logits is on cpu, and it serves cuda" in shown
    assert "liger: " in shown


def test_a_peer_with_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = measuring.prepare

    def wrong(one: Any, name: str, inputs: Any, pass_: str) -> Callable[[], Any]:
        call = prepare(one, name, inputs, pass_)
        return (lambda: tuple(1.01 * result for result in call())) if name == wrong_name else call

    monkeypatch.setattr(measuring, "prepare", wrong)
    plan = make_plan(ops=["kl_div"], shapes=["N8 V64"], backends=["cpu"], peers=["eager"], passes=[FORWARD])
    wrong_name = "eager"
    found = measure(plan, rounds=1, memory=False)
    assert [row.implementation for row in found.rows] == ["cpu"]
    assert "its results differ from float64 by 1.0e-02, accepted is 1e-03" in found.left_out[0].reason
    wrong_name = "cpu"
    with pytest.raises(RuntimeError, match="backend cpu, kl_div N8 V64, forward: its results differ"):
        measure(plan, rounds=1, memory=False)


def test_a_peer_that_fails_is_left_out_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: Any) -> Any:
        raise NotImplementedError("no such kernel\nsecond line")

    monkeypatch.setitem(PEERS["eager"].forwards, "kl_div", fail)
    plan = make_plan(ops=["kl_div"], shapes=["N8 V64"], backends=["cpu"], peers=["eager"], passes=[FORWARD])
    assert measure(plan, rounds=1, memory=False).left_out[0].reason == "NotImplementedError: no such kernel"


def test_a_peer_that_fails_at_the_full_size_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = measuring.prepare

    def fail(one: Any, name: str, inputs: Any, pass_: str) -> Callable[[], Any]:
        if name == "eager" and one.tokens > 8:
            raise RuntimeError("can't allocate memory")
        return prepare(one, name, inputs, pass_)

    monkeypatch.setattr(measuring, "prepare", fail)
    monkeypatch.setattr(measuring, "CHECK_FLOP", 50.0 * 8 * 64)
    plan = make_plan(ops=["kl_div"], shapes=["N16 V64"], backends=["cpu"], peers=["eager"], passes=[FORWARD])
    found = measure(plan, rounds=1, memory=False)
    assert [row.implementation for row in found.rows] == ["cpu"]
    assert [one.reason for one in found.left_out] == ["RuntimeError: can't allocate memory"]


@pytest.mark.simt
@pytest.mark.parametrize("size", [64, 80])
def test_a_backend_is_asked_for_the_head_size_of_the_case_by_simt(size: int) -> None:
    """simt serves the head sizes of the CUDA kernels: 64, 96 and 128."""
    one = case("prompt_attention", f"B1 H2/1 M8 P4 D{size}")
    refused = left_out(one, "simt", FORWARD, torch.float16, CPU, named=True)
    assert refused is None if size == 64 else f"are {size} and {size}" in str(refused)


def test_memory_is_that_of_the_results_and_of_what_the_code_makes() -> None:
    size = 64 * 16384 * 4
    one = case("kl_div", "N64 V16384")
    found = footprint.measure_footprint(one, "eager", [FORWARD, BOTH], torch.float32, CPU)
    assert found[FORWARD].retained < 0.3 * size < 2 * size < found[FORWARD].peak + 0.3 * size
    assert 0.8 * size < found[BOTH].retained < 1.5 * size
    assert found[BOTH].peak > 3 * size


def test_memory_is_measured_of_the_package_that_runs(tmp_path: Path) -> None:
    """A checkout that is the working folder is not imported in its place."""
    for name in ("softprompt_kernels", "softprompt_kernels/ops"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "script.py"
    script.write_text(
        "from softprompt_kernels.bench.memory import in_fresh_process\n"
        "if __name__ == '__main__':\n"
        "    print(in_fresh_process(eval, '__import__(\"softprompt_kernels.ops\").__file__'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(ROOT / "softprompt_kernels" / "__init__.py"), done.stderr


def test_the_clock_stands_still_while_others_have_the_cpu() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("only Linux has /proc")
    spinning = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", spinning]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        with RunClock() as now:
            wall, begin = time.perf_counter(), now()
            while time.perf_counter() - wall < 1.0:
                pass
            counted = now() - begin
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert 0.02 < counted < 0.8
    with RunClock() as now:
        begin = now()
        time.sleep(0.05)
        assert now() - begin > 0.04  # other waits count


def test_every_entry_has_a_reference_before_and_after_it() -> None:
    ran: list[str] = []
    calls = [lambda: ran.append("a"), lambda: ran.append("b")]
    found = time_in_turns(calls, lambda: ran.append("r"), seconds=1.0, device=CPU, rounds=2)
    order = "".join(ran)
    blocks = [order[0], *(two for one, two in pairwise(order) if one != two)]
    assert "".join(blocks).endswith("rarbr" + "arbr" + "brar")
    assert [len(one.seconds) for one in found] == [2, 2]


def test_the_reference_is_a_gemm_or_a_pass_over_memory() -> None:
    head, logits = case("linear_kl_div", "N64 d32 V9000"), case("kl_div", "N64 V16384")
    assert bound_of(head, BOTH, torch.float32, CPU) == GEMM
    assert reference_of(head, BOTH, torch.float32, CPU).name == "mm 64×32×8192"
    assert bound_of(logits, BOTH, torch.float32, CPU) == MEMORY
    assert reference_of(logits, BOTH, torch.float32, CPU).work == pytest.approx(logits.bytes(BOTH), rel=0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suite_name": "gpt5"}, "--suite: got 'gpt5', accepted is quick, smollm2, qwen3, llama3, gemma3, scaling"),
        ({"ops": ["softmax"]}, "--op: got 'softmax', accepted is prompt_attention, kl_div"),
        ({"backends": ["tpu"]}, "--backend: got 'tpu', accepted is cpu, composed, triton, cuda, simt, reference"),
        ({"peers": ["apex"]}, "--peer: got 'apex', accepted is eager, sdpa, compile"),
        ({"peers": ["none", "eager"]}, "--peer: got 'none' and a peer"),
        ({"passes": ["sideways"]}, "--pass: got 'sideways', accepted is forward, backward, forward+backward"),
        ({"ops": ["teacher_moments"], "passes": [BACKWARD]}, "--pass: backward is no pass of teacher_moments"),
        ({"dtype": "int8"}, "--dtype: got 'int8', accepted is float32, bfloat16, float16"),
        ({"device": "tpu"}, "--device: got 'tpu', accepted is auto, cpu, cuda"),
        ({"shapes": ["N5 V40"]}, "--shape: needs exactly one --op, and no --suite"),
        ({"ops": ["kl_div"], "shapes": ["N5 V40"], "suite_name": "quick"}, "--shape: needs exactly one --op"),
        ({"ops": ["kl_div"], "shapes": ["N5"]}, "--shape: shape 'N5': V is missing"),
    ],
)
def test_names_are_checked_before_any_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SoftPromptError) as refused:
        make_plan(**given)
    assert said in str(refused.value)
