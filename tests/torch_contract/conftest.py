"""Each row a test on each backend; `--table FILE` writes what came of them as a page of Markdown.

Every test of a row carries the row's and the backend's name as properties of its report, which pytest-xdist brings to
the process that writes the table.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, INTERPRETED

from dualop.backends import registry
from dualop.bench.table import device_info
from torch_contract.rows import DISTRIBUTED, ROWS, Row
from torch_contract.table import Outcome, page

ON_GPU = HAS_GPU and not INTERPRETED
SLOW_ON = "triton"  # what takes seconds runs on one backend without a GPU; this one has nothing to build


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write the table of the contract to FILE; slow rows then run on every backend"
    parser.addoption("--table", metavar="FILE", type=Path, help=text)


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("table", None)
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(file, config.rootpath), "contract-table")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"row", "backend"} <= set(metafunc.fixturenames):
        everything = ON_GPU or metafunc.config.getoption("table", None) is not None
        params = [
            pytest.param(row, backend, marks=_marks(row), id=f"{row.name}-{backend}")
            for row in ROWS
            for backend in registry.BACKENDS
            if everything or backend == SLOW_ON or not row.slow
        ]
        metafunc.parametrize(("row", "backend"), params)


def _marks(row: Row) -> list[pytest.MarkDecorator]:
    gpu, slow = ON_GPU or row.gpus > 0, row.slow or row.group == DISTRIBUTED
    return [pytest.mark.gpu] * gpu + [pytest.mark.slow] * slow


def pytest_itemcollected(item: pytest.Item) -> None:
    params = getattr(getattr(item, "callspec", None), "params", {})
    if {"row", "backend"} <= set(params):
        item.user_properties += [("row", params["row"].name), ("backend", params["backend"])]


class Recorder:
    """Collects the reports of the rows, from this process or from the workers of pytest-xdist, and writes the page."""

    def __init__(self, file: Path, root: Path) -> None:
        self.file = file
        self.root = root
        self.outcomes: dict[tuple[str, str], Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        names: dict[str, Any] = dict(report.user_properties)
        if "row" in names and (report.when == "call" or not report.passed):
            self.outcomes[names["row"], names["backend"]] = self._outcome(names["row"], report)

    def _outcome(self, name: str, report: pytest.TestReport) -> Outcome:
        if report.passed:
            return Outcome(True)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            return Outcome(False, (crash.message if crash else str(report.longrepr))[:1000])
        (missing,) = [row.missing(torch.device("cuda" if ON_GPU else "cpu")) for row in ROWS if row.name == name]
        return Outcome(None, missing or str(report.longrepr[-1]).removeprefix("Skipped: "))  # type: ignore[index]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        file = self.file.resolve()
        shown = file.relative_to(self.root) if file.is_relative_to(self.root) else self.file
        command = shlex.join(["python", "-m", "pytest", "tests/torch_contract", "--table", str(shown)])
        machine = device_info(torch.device("cuda" if ON_GPU else "cpu"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(ROWS, list(registry.BACKENDS), self.outcomes, command, machine), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"the table of the contract: {self.file}")
