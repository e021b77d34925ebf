"""The quick form of `make bench`: every suite runs, all implementations agree, and the report is complete."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("psutil")
pytest.importorskip("pytest_benchmark")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """Runs the suites once; returns the printed report, the JSON that was written, and the folder of the plots."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "context.txt").write_text("the cat sat on the mat and the dog ran to the red house " * 2)
    queries = ["where is the dog?", "what is red?", "who sat?"]
    (folder / "queries.jsonl").write_text("".join(json.dumps({"input": query}) + "\n" for query in queries))
    given = {
        "model": tiny_model_folder,
        "context": folder / "context.txt",
        "queries": folder / "queries.jsonl",
        "plots": folder,
        "benchmark-json": folder / "new" / "bench.json",
    }
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", "benchmarks", "--quick", *options]
    # Not as a worker of this pytest run: pytest-benchmark measures nothing in workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "new" / "bench.json").read_text()), folder


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)


def records(written: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    found = [benchmark["extra_info"] for benchmark in written["benchmarks"]]
    return [record for record in found if record["suite"] == suite]


def test_every_suite_measures_ours_and_baselines(run: tuple[str, dict[str, Any], Path]) -> None:
    _, written, _ = run
    assert len(records(written, "attention")) >= 20
    assert {record["case"].split()[0] for record in records(written, "kl")} == {"live", "moments", "logits"}
    assert len(records(written, "step")) == 1
    assert len(records(written, "matching")) == 3
    for suite in ("attention", "kl", "matching", "step"):
        for record in records(written, suite):
            entries = record["entries"]
            assert [entry["role"] for entry in entries].count("ours") == 1
            assert any(entry["role"] == "baseline" for entry in entries)
            assert all(entry["min"] <= entry["median"] <= entry["max"] for entry in entries)
            assert all(entry["cold"] > 0 for entry in entries)
            assert record["reference_gflops"] > 0
            assert next(entry for entry in entries if entry["role"] == "ours")["peak_bytes"] is not None


def test_baselines_are_checked_before_they_are_timed(run: tuple[str, dict[str, Any], Path]) -> None:
    for record in records(run[1], "attention") + records(run[1], "kl"):
        for entry in record["entries"]:
            assert (entry["difference"] is not None) == (entry["role"] == "baseline")


def test_report_shows_machine_implementations_notes_and_plot(run: tuple[str, dict[str, Any], Path]) -> None:
    shown, _, folder = run
    assert "1 thread, torch" in shown
    assert "GFLOP/s" in shown
    assert "concat + SDPA, bool mask" in shown
    assert "attention by P" in shown
    assert "the figures mean nothing" in shown
    for note in ("first losses: cached moments ", "profile of one of our steps", "before training, not in the step"):
        assert f"  {note}" in shown
    assert (folder / "scaling.png").stat().st_size > 10_000


@pytest.mark.usefixtures("benchmarks")
def test_wrong_result_is_refused() -> None:
    import torch

    from softprompt_kernels.bench.rounds import BASELINE, OURS, Comparison, Entry

    ours = Entry("ours", OURS, lambda: (torch.ones(3),))
    for wrong in (torch.full((3,), 1.01), torch.tensor([1.0, 1.0, float("nan")])):
        other = Entry("other", BASELINE, lambda wrong=wrong: (wrong,))
        with pytest.raises(AssertionError, match="other"):
            Comparison([ours, other], 1e-3).check()
    assert Comparison([ours, Entry("other", BASELINE, ours.run)], 1e-3).check() == {"other": 0.0}


@pytest.mark.usefixtures("benchmarks")
def test_useful_flop_leave_out_masked_pairs() -> None:
    from benchmarks.suites.attention_cases import AttentionCase

    forward = AttentionCase(1, 1, 1, queries=3, prompt=2, size=1, backward=False)
    assert forward.flop == 4 * (3 * 2 + 1 + 2 + 3)
    assert AttentionCase(2, 4, 2, queries=3, prompt=2, size=8).flop == 14 * 8 * 2 * 4 * 12


@pytest.mark.usefixtures("benchmarks")
def test_time_that_grows_faster_than_the_work_is_flagged() -> None:
    from benchmarks.suites import scaling_cases as scaling

    assert scaling.excess([1, 2, 4], [1, 2, 4]) == [1, 1]
    assert scaling.excess([1, 2, 4], [2, 4, 10]) == [1, 1.25]
    record = {"case": "op by N", "letter": "N", "sizes": [1, 2, 4], "work": [1, 2, 4], "medians": [2, 4, 11]}
    assert "SUPERLINEAR at N 4" in scaling.summary(record)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("seconds", [0.001, 0.03])
def test_short_implementations_run_twice_in_their_turn_and_the_second_counts(seconds: float) -> None:
    from softprompt_kernels.bench import rounds as comparison

    ran: list[str] = []

    def implementation(name: str) -> Any:
        def run() -> tuple[torch.Tensor]:
            time.sleep(seconds if ran and ran[-1] == name else seconds + 0.01)
            ran.append(name)
            return (torch.zeros(1),)

        return run

    class Benchmark:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, function: Any, args: Any, rounds: int, iterations: int) -> None:
            for _ in range(rounds):
                function(*args)

    entries = [
        comparison.Entry(name, role, implementation(name))
        for name, role in (("a", comparison.OURS), ("b", comparison.BASELINE))
    ]
    record = comparison.check_and_time(
        Benchmark(), comparison.Comparison(entries, None), seconds=0.2, max_rounds=4, quick=False
    )
    for entry in record["entries"][:2]:
        assert len(entry["seconds"]) == record["rounds"] >= 3
        if seconds < comparison.RUN_TWICE_BELOW:
            assert entry["median"] < entry["cold"]
        else:
            assert entry["cold"] is None


@pytest.mark.usefixtures("benchmarks")
def test_rules_are_judged_from_the_medians() -> None:
    from benchmarks.harness.requirements import verdicts

    def entry(name: str, role: str, seconds: float, **more: Any) -> dict[str, Any]:
        return {"name": name, "role": role, "median": seconds, "flop": None, **more}

    record = {
        "suite": "attention",
        "case": "one",
        "flop": 1e9,
        "reference_gflops": 4.0,
        "result_bytes": 2**20,
        "other_load": 0.2,
        "entries": [
            entry("ours", "ours", 0.5, peak_bytes=3 * 2**20),
            entry("composed", "baseline", 0.4),
            entry("concat + SDPA, bool mask", "baseline", 1.0),
            entry("ours, fp32", "paired variant", 0.25, flop=1e9),
        ],
        "rules": [
            ("speedup over the fastest baseline", 1.0),
            ("speedup over concat + SDPA", 1.7),
            ("rate, as a share of the reference GEMM's", 0.5),
            ("time over the paired variant's", 1.9),
            ("peak MiB beyond inputs and gradient", 2.0),
        ],
    }
    assert all(verdict.busy for verdict in verdicts([record]))
    found = {verdict.kind: (round(verdict.figure, 6), verdict.holds) for verdict in verdicts([record])}
    assert found == {
        "speedup over the fastest baseline": (0.8, False),
        "speedup over concat + SDPA": (2.0, True),
        "rate, as a share of the reference GEMM's": (0.5, True),
        "time over the paired variant's": (2.0, False),
        "peak MiB beyond inputs and gradient": (2.0, True),
    }


@pytest.mark.usefixtures("benchmarks")
def test_attention_floor_of_a_step_counts_visible_pairs_and_needed_gradients() -> None:
    import torch

    from benchmarks.step.floor import attention_flop
    from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs

    own, prompt = torch.zeros(2, 1, 3, 4), torch.zeros(1, 1, 5, 4)
    none: tuple[None, ...] = (None,) * 5
    problem = AttentionProblem(own, own, own, prompt, prompt, *none, True, None, None, 1.0)
    pairs, prompt_pairs = 2 * (6 + 15), 2 * 15
    assert attention_flop(problem, None) == 4 * 4 * pairs
    assert attention_flop(problem, Needs(True, True, True, True, True, False)) == 10 * 4 * pairs
    # Gradients of the prompt alone: the scores, their gradient, and two gradients, over the pairs with a prompt key.
    assert attention_flop(problem, Needs(False, False, False, True, True, False)) == 8 * 4 * prompt_pairs
