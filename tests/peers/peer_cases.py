"""A pytest plugin for the process that runs another package's tests: it keeps to a table and reports what happened.

The table (liger.toml, peft.toml) names the files, and has rows that say what to do with their cases. A row takes the
cases whose id its regular expression `match` is found in; the first row that fits counts.

| run | means |
|---|---|
| "pass" | runs here and must pass; the peer's own marks that skip it without a GPU are taken off |
| "differ" | runs here and must fail, for `reason` and with `error`, a regular expression on the message |
| "no" | out of scope for `reason`: is not run |

With `compared = true`, a case of a row must also have added to "compared" in its properties, which an adapter does.

The report is a JSON file: the cases that no row takes, and for each row its cases with outcome, message, comparisons.
"""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

TABLE, REPORT = "PEER_TABLE", "PEER_REPORT"


class Cases:
    """The cases of the table's rows."""

    def __init__(self) -> None:
        self.rows = tomllib.loads(Path(os.environ[TABLE]).read_text())["cases"]
        self.taken: list[dict[str, list[Any]]] = [{} for _ in self.rows]
        self.unlisted: list[str] = []
        self.collection_errors: list[str] = []
        self.row_of: dict[str, int] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left_out = [], []
        for item in items:
            fits = (index for index, row in enumerate(self.rows) if re.search(row["match"], item.nodeid))
            index = next(fits, None)
            if index is None:
                self.unlisted.append(item.nodeid)
                left_out.append(item)
                continue
            self.row_of[item.nodeid] = index
            self.taken[index][item.nodeid] = ["not run", "", 0]
            if self.rows[index]["run"] == "no":
                left_out.append(item)
            else:
                item.own_markers = [mark for mark in item.own_markers if mark.name not in ("skip", "skipif")]
                kept.append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(f"{report.nodeid}: {report.longreprtext[-2000:]}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.taken[self.row_of[report.nodeid]][report.nodeid]
        if report.when == "call" or not report.passed:
            message = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
            outcome = "failed" if entry[0] == "failed" else report.outcome
            entry[:] = [outcome, message, dict(report.user_properties).get("compared", 0)]

    def pytest_sessionfinish(self) -> None:
        written = {"unlisted": self.unlisted, "errors": self.collection_errors, "rows": self.taken}
        Path(os.environ[REPORT]).write_text(json.dumps(written))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Cases(), "peer-cases")
