"""The rows of the contract, each a test on each backend. On a machine with a GPU they run there, marked gpu."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dualop.build import locks
from torch_contract import processes
from torch_contract.case import Skip
from torch_contract.rows import Row


@pytest.fixture(autouse=True)
def _started_once(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The two processes start once for all workers of xdist: the first that wants them writes down what they found."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    file, results = tmp_path_factory.getbasetemp().parent / "two_processes.json", processes.results

    def shared(backends: tuple[str, ...], device_type: str) -> dict[tuple[str, str], tuple[str, float]]:
        with locks.file(file.with_suffix(".lock")):
            if not file.exists():
                found = [[*key, *value] for key, value in results(backends, device_type).items()]
                file.write_text(json.dumps(found))
            return {(row, backend): (text, s) for row, backend, text, s in json.loads(file.read_text())}

    monkeypatch.setattr(processes, "results", shared)


@pytest.mark.filterwarnings("ignore")
def test_row(row: Row, backend: str, device: torch.device) -> None:
    if missing := row.missing(device):
        pytest.skip(missing)
    try:
        row.try_on(backend, device)
    except Skip as skip:
        pytest.skip(str(skip))
