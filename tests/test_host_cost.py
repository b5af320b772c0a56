"""The host's cost of a call: every contestant and direction has a row, and a call that sleeps shows."""

from __future__ import annotations

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from dualop.bench import host
from dualop.cli.app import app


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LOOP_S", 1e-4)
    monkeypatch.setattr(host, "LOOPS", 2)


def test_rows_and_ratios() -> None:
    rows = host.run(["reference"], torch.device("cpu"), compiled=False)
    names = ["torch.empty_like", "torch.sigmoid", "eager", "reference", "eager", "reference", host.NOTHING]
    assert [row.name for row in rows] == names
    assert [row.direction for row in rows] == [host.FORWARD] * 4 + [host.TRAINING] * 3
    sigmoid, eager = rows[1].time_us, rows[4].time_us
    for row in rows:
        base = sigmoid if row.direction == host.FORWARD else eager
        assert row.time_us > 0 and row.ratio == pytest.approx(row.time_us / base, abs=0.01, rel=0.1)


def test_time_of_a_call() -> None:
    found = host._time(lambda: time.sleep(2e-3), torch.device("cpu"))
    assert 2e3 <= found < 2e4


def test_the_command(tmp_path) -> None:
    path = tmp_path / "host.json"
    result = CliRunner().invoke(app, ["bench", "--host", "--backend", "reference", "--no-compile", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "torch.sigmoid" in result.output and "of eager" in result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["direction"] for row in rows if row["name"] == "reference"] == [host.FORWARD, host.TRAINING]
