"""`softprompt bench`: the table, the files, the comparison, and what is refused before any measuring."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")
pytest.importorskip("pytest_benchmark")

from softprompt_kernels.bench import measure as measuring
from softprompt_kernels.bench import record
from softprompt_kernels.bench.measure import Measured, Row
from softprompt_kernels.bench.plan import make_plan
from softprompt_kernels.bench.timing import Timed
from softprompt_kernels.kernels.cpu import native

ROOT = Path(__file__).parents[3]
SMALL = ("bench", "--op", "kl_div", "--shape", "N16 V2048", "--backend", "cpu", "--peer", "none", "--no-memory")


@pytest.fixture(autouse=True)
def needs_the_cpu_backend() -> None:
    if reason := native.missing():
        pytest.skip(f"the cpu backend: {reason}")


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any, **more: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "measure", measure)


def test_table_json_and_plots(run, tmp_path: Path) -> None:
    arguments = ["--shape", "N8 V256", "--pass", "forward+backward", "--rounds", "2"]
    result = run(*SMALL, *arguments, "--json", tmp_path / "a.json", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for part in ("kl_div N16 V2048", "kl_div N8 V256", "forward+backward, float32", "GB/s"):
        assert part in shown
    written = json.loads((tmp_path / "a.json").read_text())
    assert [len(one["stats"]["data"]) for one in written["benchmarks"]] == [2, 2]
    assert "No plot: no size has two values while the others stay" in shown


def test_plots_of_a_size_that_grows(run, tmp_path: Path) -> None:
    result = run(*SMALL, "--shape", "N8 V2048", "--rounds", "1", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["kl_div-forward-backward-float32-N.png", "kl_div-forward-float32-N.png"]
    assert all((tmp_path / "plots" / name).stat().st_size > 10_000 for name in names)


def test_a_slowed_kernel_gives_exit_code_1(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, new, arguments = tmp_path / "base.json", tmp_path / "new.json", ("--pass", "forward", "--rounds", "20")
    assert run(*SMALL, *arguments, "--json", base).exit_code == 0
    prepare = measuring.prepare

    def slowed(*given: Any) -> Any:
        call = prepare(*given)

        def twice() -> Any:
            begin = time.perf_counter()
            results = call()
            end = 2 * time.perf_counter() - begin
            while time.perf_counter() < end:
                pass
            return results

        return twice

    monkeypatch.setattr(measuring, "prepare", slowed)
    result = run(*SMALL, *arguments, "--json", new, "--compare", base)
    assert result.exit_code == 1, result.output
    assert "1 slower." in result.stdout
    monkeypatch.undo()
    back = run("bench", "--run", base, "--compare", new)
    assert back.exit_code == 0, back.output
    assert "1 faster." in back.stdout


@pytest.mark.usefixtures("no_measuring")
def test_files_are_checked_before_measuring(run, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"benchmarks": [')
    (tmp_path / "file").write_text("")
    for option, path, said in [
        ("--json", tmp_path / "no" / "a.json", "is not a folder"),
        ("--json", "/dev/null", "is a device or a pipe; accepted is a file"),
        ("--json", tmp_path, "which is a folder; accepted is a file"),
        ("--plots", tmp_path / "file", "is not a folder"),
        ("--plots", tmp_path / "no" / "plots", "is not a folder"),
        ("--compare", tmp_path / "broken.json", "is truncated or no JSON"),
        ("--compare", tmp_path / "none.json", "there is no file"),
        ("--run", tmp_path / "none.json", "there is no file"),
    ]:
        result = run("bench", option, path)
        assert result.exit_code == 2, option
        assert said in " ".join(result.stderr.split()), result.stderr


@pytest.mark.usefixtures("no_measuring")
def test_unknown_names_and_what_does_not_fit_are_refused(run) -> None:
    for arguments, said in [
        (["--suite", "gpt5"], "--suite: got 'gpt5', accepted is quick,"),
        (["--op", "softmax"], "--op: got 'softmax', accepted is prompt_attention,"),
        (["--shape", "N5"], "--shape: needs exactly one --op"),
        (["--threshold", "0.2"], "--threshold: belongs to a comparison, and there is no --compare"),
        (["--run", "a.json", "--suite", "quick"], "--run: shows an earlier run as it is, and takes no --suite"),
        (["--run", "a.json", "--backend", "cpu", "--no-memory"], "takes no --backend, --no-memory"),
        (["--run", "a.json", "--dtype", "float32", "--rounds", "3"], "takes no --dtype, --rounds"),
        (["--threshold", "nan"], "Invalid value for '--threshold'"),
    ]:
        result = run("bench", *arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split()), result.stderr


@pytest.mark.usefixtures("no_measuring")
def test_a_run_that_cannot_be_compared_is_refused_before_measuring(run, tmp_path: Path) -> None:
    """The earlier run is edited: of another machine, of another suite, or of another op."""
    base, edited = tmp_path / "base.json", tmp_path / "edited.json"
    base.write_text(json.dumps(small_run()))
    for head, row, said in [
        ({"machine": {"processor": "another"}}, {}, "of different machines or installations (processor"),
        ({"title": "quick"}, {}, "the runs are of different suites: 'quick' and 'own'"),
        ({}, {"dtype": "bfloat16"}, "the runs have no row in common"),
    ]:
        document = json.loads(base.read_text())
        document["softprompt"] |= {
            name: document["softprompt"][name] | value if name == "machine" else value for name, value in head.items()
        }
        document["benchmarks"][0]["extra_info"] |= row
        edited.write_text(json.dumps(document))
        result = run(*SMALL, "--compare", edited)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split()), result.stderr


def small_run() -> dict[str, Any]:
    """The file of a run of one row on this machine."""
    plan = make_plan(ops=["kl_div"], shapes=["N16 V2048"], backends=["cpu"], peers=["none"])
    timed = Timed(1, [1.0] * 16, [1.0] * 16)
    row = Row("kl_div", "N16 V2048", "float32", "forward", "cpu", timed, "pass", "memory", 1.0, 1.0, 0.0, "N16 V2048")
    with tempfile.TemporaryDirectory() as folder:
        record.write("--json", record.run_of(plan, Measured([row], [], 0.0)), Path(folder) / "run.json")
        return json.loads((Path(folder) / "run.json").read_text())


@pytest.mark.parametrize("shape", ["N2147483648 V262144", "N2147483648 V2147483648"])
def test_a_shape_that_no_memory_holds_is_said(run, shape: str) -> None:
    result = run("bench", "--op", "kl_div", "--shape", shape, "--peer", "none", "--no-memory")
    assert result.exit_code == 2
    assert "out of memory; a smaller --suite or --shape" in " ".join(result.stderr.split())


def test_plots_do_not_depend_on_the_display_of_the_shell(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(small_run()))
    program = "from softprompt_kernels.cli.app import main; main(['bench', '--run', 'run.json', '--plots', 'plots'])"
    environment = {**os.environ, "MPLBACKEND": "module://not_there", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_to_measure_is_said(run) -> None:
    result = run("bench", "--op", "kl_div", "--shape", "N5 V40", "--backend", "triton", "--peer", "flash-attn")
    assert result.exit_code == 2
    assert "nothing can be measured here: triton: " in " ".join(result.stderr.split())


@pytest.mark.usefixtures("no_measuring")
def test_the_list_names_suites_backends_and_peers(run) -> None:
    result = run("bench", "--list")
    assert result.exit_code == 0
    for part in ("suite qwen3", "prompt_attention B8 H16/8 M256 P128 D128", "cpu, composed", "trl: TRL's chunked"):
        assert part in result.stdout


def test_a_missing_package_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("bench")
    assert result.exit_code == 2
    assert "pip install psutil pytest-benchmark" in " ".join(result.stderr.split())


def test_the_suite_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "benchmark.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "test_suite.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-max-time=0.01", tmp_path]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_keeps_the_cases_that_are_finished(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    prepare_case, cases = measuring._prepare, []

    def stopped_at_the_next(plan: Any, case: Any) -> Any:
        cases.append(case.shape)
        if len(cases) > finished:
            raise KeyboardInterrupt
        return prepare_case(plan, case)

    monkeypatch.setattr(measuring, "_prepare", stopped_at_the_next)
    arguments = ["--shape", "N8 V256", "--pass", "forward", "--rounds", "1", "--json", tmp_path / "a.json"]
    result = run(*SMALL, *arguments)
    assert result.exit_code == 130 and "Interrupted" in result.stderr
    assert ("kl_div N16 V2048" in result.stdout) == bool(finished)
    assert (tmp_path / "a.json").exists() == bool(finished)
    if finished:
        assert [row.shape for row in record.read("--run", tmp_path / "a.json").measured.rows] == ["N16 V2048"]
