"""Two runs: what is flagged, what is not, and which runs cannot be compared."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from softprompt_kernels.bench.compare import FASTER, SLOWER, compare
from softprompt_kernels.bench.measure import Measured
from softprompt_kernels.bench.record import Run, read, write
from softprompt_kernels.errors import SoftPromptError

RUNS = 10


@pytest.fixture(scope="module")
def runs(run_here: Callable[..., Run]) -> list[Run]:
    """Runs of the same code, one after another."""
    return [run_here() for _ in range(RUNS)]


def test_ten_runs_of_the_same_code_are_not_flagged(runs: list[Run]) -> None:
    found = [one for new in runs[1:] for one in compare(runs[0], new, 0.1).differences]
    assert len(found) == 2 * (RUNS - 1)
    assert not [one for one in found if one.verdict in (SLOWER, FASTER)]


@pytest.mark.usefixtures("slow_cpu")
def test_a_kernel_that_was_slowed_by_a_fifth_is_flagged(runs: list[Run], run_here: Callable[..., Run]) -> None:
    for _ in range(3):  # beside other work a run may be too noisy to tell
        slow = run_here()
        found = compare(runs[-1], slow, 0.1)
        if all(one.verdict == SLOWER for one in found.differences):
            break
    assert [one.verdict for one in found.differences] == [SLOWER, SLOWER]
    assert len(found.slower) == 2
    assert all(1.1 < one.ratio.low < one.ratio.middle < 1.4 for one in found.differences)
    assert [one.verdict for one in compare(slow, runs[-1], 0.1).differences] == [FASTER, FASTER]


def test_a_run_is_read_back_as_it_was_written(runs: list[Run], tmp_path: Path) -> None:
    write("--json", runs[0], tmp_path / "run.json")
    assert read("--run", tmp_path / "run.json") == runs[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_pytest_benchmark_compares_two_files(runs: list[Run], tmp_path: Path) -> None:
    for number in (1, 2):
        write("--json", runs[number], tmp_path / f"{number}.json")
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", str(tmp_path), "compare"]
    files = [str(tmp_path / "1.json"), str(tmp_path / "2.json")]
    done = subprocess.run(
        [*command, *files, "--columns=median,rounds", "--group-by=fullname"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "prompt_attention B2 H4/2 M32 P16 D32 float32 forward+backward[cpu]" in done.stdout
    assert done.stdout.count("Rounds") == 2


@pytest.mark.parametrize(("fact", "value"), [("processor", "another"), ("threads", 64), ("torch", "1.0"), ("gpu", "x")])
def test_runs_of_different_machines_are_refused(runs: list[Run], fact: str, value: object) -> None:
    other = replace(runs[0], machine=runs[0].machine | {fact: value})
    with pytest.raises(SoftPromptError, match=rf"different machines or installations \({fact} .*; measure both on the"):
        compare(runs[0], other, 0.1)


def test_runs_of_different_suites_are_refused(runs: list[Run]) -> None:
    with pytest.raises(SoftPromptError, match="different suites: 'own' and 'quick'"):
        compare(runs[0], replace(runs[0], title="quick"), 0.1)


def test_rows_of_one_run_alone_are_said(runs: list[Run]) -> None:
    one, two = (replace(run, measured=replace(run.measured, rows=run.measured.rows[:1])) for run in (runs[0], runs[1]))
    found = compare(runs[0], two, 0.1)
    assert len(found.differences) == 1
    assert [row.op for row in found.only_base] == ["kl_div"]
    assert [row.op for row in compare(two, runs[0], 0.1).only_new] == ["kl_div"]
    other = replace(one, measured=replace(one.measured, rows=runs[0].measured.rows[1:]))
    with pytest.raises(SoftPromptError, match="no row in common"):
        compare(two, other, 0.1)


def test_a_slower_peer_is_shown_and_does_not_count(runs: list[Run]) -> None:
    row = runs[0].measured.rows[0]
    slow = replace(row.timed, seconds=[2 * seconds for seconds in row.timed.seconds])

    def with_name(name: str, timed: object) -> Run:
        return replace(runs[0], measured=Measured([replace(row, implementation=name, timed=timed)], [], 0.0))

    peer = compare(with_name("eager", row.timed), with_name("eager", slow), 0.1)
    assert [one.verdict for one in peer.differences] == [SLOWER]
    assert not peer.slower
    assert compare(with_name("cpu", row.timed), with_name("cpu", slow), 0.1).slower


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "is truncated or no JSON"),
        ('{"benchmarks": [', "is truncated or no JSON"),
        ("[1]", "is JSON, but no run of this command; a run is written by softprompt bench --json"),
        ('{"benchmarks": [], "version": "5"}', "no run of this command"),
        ('{"softprompt": {"format": 0}}', "has format 0, accepted is 1; measure it again"),
        ('{"softprompt": {"format": 1}}', "lacks a field of a run"),
        ('{"softprompt": {"format": 1, "left_out": [1]}, "benchmarks": []}', "lacks a field of a run"),
    ],
)
def test_a_file_that_is_no_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(SoftPromptError) as refused:
        read("--compare", tmp_path / "base.json")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("softprompt", "machine"), "fast"),
        (("softprompt", "other_load"), "much"),
        (("benchmarks", 0), "row"),
        (("benchmarks", 0, "stats", "data", 0), 0.0),
        (("benchmarks", 0, "stats", "data", 0), "1.0"),
        (("benchmarks", 0, "stats", "data"), []),
        (("benchmarks", 0, "extra_info", "reference_seconds", 0), float("nan")),
        (("benchmarks", 0, "extra_info", "work"), 0),
        (("benchmarks", 0, "extra_info", "shape"), "N5"),
        (("benchmarks", 0, "extra_info", "op"), "softmax"),
        (("benchmarks", 0, "extra_info", "pass_"), "sideways"),
        (("benchmarks", 0, "extra_info", "dtype"), "int8"),
        (("benchmarks", 0, "extra_info", "more"), 1),
    ],
)
def test_a_run_with_a_wrong_field_is_refused(
    runs: list[Run], place: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    write("--json", runs[0], tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    *parents, last = place
    inner = document
    for name in parents:
        inner = inner[name]
    inner[last] = value
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(SoftPromptError, match=r"--run: .* lacks a field of a run, or has a wrong one"):
        read("--run", tmp_path / "run.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="--compare: there is no file"):
        read("--compare", tmp_path / "base.json")
    with pytest.raises(SoftPromptError, match="--compare: cannot read"):
        read("--compare", tmp_path)
