"""Options of the suites, and the report at their end.

python -m pytest -c benchmarks/pytest.ini benchmarks --benchmark-json runs/bench/bench.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import case, machine, report
from benchmarks.suites import scaling_cases as scaling

HERE = Path(__file__).parent
LEFT_OUT = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("softprompt")
    group.addoption("--quick", action="store_true", help="tiny sizes, one round: do the suites run?")
    group.addoption("--compile", action="store_true", help="measure torch.compile too (it compiles for minutes)")
    group.addoption("--plots", type=Path, default=HERE.parent / "runs" / "bench", help="folder for plots")
    group.addoption("--model", type=Path, help="folder of the model of the suite `step`; skipped without one")
    group.addoption(
        "--context", type=Path, default=HERE.parent / "demo" / "handbook.txt", help="what its teacher reads"
    )
    group.addoption("--queries", type=Path, default=HERE.parent / "demo" / "queries.jsonl", help="what it is asked")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = set()
    if written := config.getoption("--benchmark-json"):
        Path(written).parent.mkdir(parents=True, exist_ok=True)
        Path(written).unlink(missing_ok=True)  # else the report of a run without benchmarks would be that of another


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> case.Settings:
    """What the options say."""
    if pytestconfig.getoption("--quick"):
        torch.set_num_threads(1)
    left_out = pytestconfig.stash[LEFT_OUT]
    wanted = pytestconfig.getoption("--compile")
    missing = case.compiler_missing() if wanted else "torch.compile is measured with --compile only"
    if missing:
        left_out.add(missing)
    return case.Settings(pytestconfig.getoption("--quick"), wanted and missing is None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """What the report needs beside the records, and the plot."""
    records = [benchmark["extra_info"] for benchmark in output_json["benchmarks"]]
    if grown := [record for record in records if record.get("suite") == "scaling"]:
        scaling.plot(grown, config.getoption("--plots") / "scaling.png")
    output_json["softprompt"] = {
        **machine.facts(),
        "quick": config.getoption("--quick"),
        "left_out": sorted(config.stash[LEFT_OUT]),
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table."""
    written = config.getoption("--benchmark-json")
    terminalreporter.ensure_newline()
    for skipped in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"Left out: {skipped.nodeid}: {skipped.longrepr[2]}")
    if written is None or not Path(written).exists():
        return
    report.show(Path(written))
