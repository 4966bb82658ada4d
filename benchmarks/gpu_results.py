"""A plugin of pytest that writes what is known of each test at once, a line of JSON each:

    python -m pytest -p gpu_results --results tests.jsonl

so that being cut off loses only the rest, also where tests run in several processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MOST_CHARACTERS = 4000  # of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="file of a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("results")
    if path is not None and not hasattr(config, "workerinput"):  # the workers' parent is told all
        config.pluginmanager.register(_Results(path))


class _Results:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        row: dict[str, object] = {"test": report.nodeid, "outcome": report.outcome}
        row["seconds"] = round(seconds, 3)
        if report.outcome != "passed":
            row["text"] = report.longreprtext[-MOST_CHARACTERS:]
        self._file.write(json.dumps(row) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self._write(report, 0.0)
