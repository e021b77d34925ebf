"""Options of the suites, and the report at the end of a run.

python -m pytest -c benchmarks/pytest.ini benchmarks --benchmark-json runs/bench/bench.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import case, report
from benchmarks.suites import scaling_cases as scaling
from softprompt_kernels.bench import machine
from softprompt_kernels.bench.peers import compiled

HERE = Path(__file__).parent
LEFT_OUT = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("softprompt")
    group.addoption("--quick", action="store_true", help="tiny sizes and one round: only checks that the suites run")
    group.addoption("--compile", action="store_true", help="also measure torch.compile (compiling takes minutes)")
    group.addoption("--plots", type=Path, default=HERE.parent / "runs" / "bench", help="folder for plots")
    group.addoption("--model", type=Path, help="folder of the model for the suite `step`, which is skipped without it")
    group.addoption(
        "--context", type=Path, default=HERE.parent / "demo" / "handbook.txt", help="text that the teacher reads"
    )
    group.addoption(
        "--queries", type=Path, default=HERE.parent / "demo" / "queries.jsonl", help="queries that the teacher answers"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = set()
    if written := config.getoption("--benchmark-json"):
        Path(written).parent.mkdir(parents=True, exist_ok=True)
        # A run without benchmarks writes no file. Without this line it would report the file of an earlier run.
        Path(written).unlink(missing_ok=True)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> case.Settings:
    """The settings that the options ask for."""
    if pytestconfig.getoption("--quick"):
        torch.set_num_threads(1)
    left_out = pytestconfig.stash[LEFT_OUT]
    wanted = pytestconfig.getoption("--compile")
    missing = compiled.compiler_missing() if wanted else "torch.compile is measured only with --compile"
    if missing:
        left_out.add(missing)
    return case.Settings(pytestconfig.getoption("--quick"), wanted and missing is None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Adds to the JSON file what the report needs beyond the records, and draws the scaling plot."""
    records = [benchmark["extra_info"] for benchmark in output_json["benchmarks"]]
    if scaling_records := [record for record in records if record.get("suite") == "scaling"]:
        scaling.plot(scaling_records, config.getoption("--plots") / "scaling.png")
    output_json["softprompt"] = {
        **machine.facts(),
        "quick": config.getoption("--quick"),
        "left_out": sorted(config.stash[LEFT_OUT]),
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the report."""
    written = config.getoption("--benchmark-json")
    terminalreporter.ensure_newline()
    for skipped in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"Left out: {skipped.nodeid}: {skipped.longrepr[2]}")
    if written is None or not Path(written).exists():
        return
    report.show(Path(written))
