"""Other packages' own tests, run on our ops: each case passes, or is listed with the reason why not.

The tests come from the packages' source distributions (sdist.py). An adapter (liger_adapter.py, peft_adapter.py) puts
our ops behind the names that they import. liger.toml and peft.toml list the cases, in the form of peer_cases.py.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import softprompt_kernels
from tests.peers import peer_cases
from tests.peers.sdist import UnavailableError, source

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Run:
    """What became of a peer's cases."""

    rows: list[dict[str, Any]]
    cases: list[dict[str, list[Any]]]  # for each row: case -> outcome, message, number of comparisons
    unlisted: list[str]

    def of(self, run: str) -> list[tuple[dict[str, Any], str, str, str, int]]:
        """(row, case, outcome, message, comparisons) of the rows of one kind."""
        return [
            (row, case, *outcome)
            for row, cases in zip(self.rows, self.cases, strict=True)
            if row["run"] == run
            for case, outcome in cases.items()
        ]


@pytest.fixture(scope="module", params=["liger", "peft"])
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of a peer's tests, in a process of its own and in the folder of its source distribution."""
    name = request.param
    table = tomllib.loads((HERE / f"{name}.toml").read_text())
    try:
        folder = source(table["package"])
    except UnavailableError as error:
        pytest.skip(f"the tests of another package: {error}")
    report = tmp_path_factory.mktemp(name) / "report.json"
    package = Path(softprompt_kernels.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{package}",
        "HF_HUB_OFFLINE": "1",
        peer_cases.TABLE: str(HERE / f"{name}.toml"),
        peer_cases.REPORT: str(report),
    }
    plugins = ["-p", "peer_cases", "-p", f"{name}_adapter", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options = ["-q", "-c", os.devnull, "--rootdir", str(folder), "--import-mode=importlib", *plugins]
    command = [sys.executable, "-m", "pytest", *options, *table["files"]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert not found["errors"], "\n".join(found["errors"])
    return Run(table["cases"], found["rows"], found["unlisted"])


def test_every_case_is_in_the_table(peer: Run) -> None:
    assert not peer.unlisted, "add these cases to the table: " + ", ".join(peer.unlisted)


def test_every_row_of_the_table_has_cases(peer: Run) -> None:
    empty = [row["match"] for row, cases in zip(peer.rows, peer.cases, strict=True) if not cases]
    assert not empty, "these rows name no case any more: " + ", ".join(empty)


def test_cases_in_scope_pass(peer: Run) -> None:
    cases = peer.of("pass")
    assert len(cases) >= 20
    missed = [f"{case}: {outcome}\n{message}" for _, case, outcome, message, _ in cases if outcome != "passed"]
    assert not missed, "\n".join(missed)


def test_cases_that_promise_a_comparison_make_one(peer: Run) -> None:
    idle = [case for row, case, _, _, compared in peer.of("pass") if row.get("compared") and not compared]
    assert not idle, "nothing was compared in " + ", ".join(idle)


def test_listed_differences_are_there_for_their_reason(peer: Run) -> None:
    for row, case, outcome, message, _ in peer.of("differ"):
        assert outcome == "failed", f"{case} passes now: move it to those that must pass"
        assert re.search(row["error"], message), f"{case} fails for another reason: {message}"


def test_everything_out_of_scope_has_a_reason(peer: Run) -> None:
    assert all(row.get("reason") for row in peer.rows if row["run"] != "pass")
