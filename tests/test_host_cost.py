"""The host's cost of a call, alone and in compiled graphs: every contestant has its rows, and a sleep shows."""

from __future__ import annotations

import json
import time

import pytest
import torch
from typer.testing import CliRunner

import dualop
from dualop.bench import compiled, host
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
    found = host.time_of(lambda: time.sleep(2e-3), torch.device("cpu"))
    assert 2e3 <= found < 2e4


def test_the_command(tmp_path) -> None:
    path = tmp_path / "host.json"
    result = CliRunner().invoke(app, ["bench", "--host", "--backend", "reference", "--no-compile", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "torch.sigmoid" in result.output and "of eager" in result.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["direction"] for row in rows if row["name"] == "reference"] == [host.FORWARD, host.TRAINING]


def test_what_enters_python_is_noted() -> None:
    x, op = torch.ones(3), dualop.chain("tanh")
    with compiled.entered() as seen:
        op(x, backend="reference")
        op(x.requires_grad_(), backend="reference").sum().backward()
    op(x, backend="reference")
    assert seen == ["reference"] * 3


@pytest.mark.slow
def test_blocks_in_compiled_graphs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compiled, "STEPS", 1)
    monkeypatch.setattr(compiled, "ROUNDS", 1)
    compiled.main(["--backend", "reference", "--json", str(tmp_path / "compiled.json")])
    assert "two channels_last convolutions" in capsys.readouterr().out
    found = json.loads((tmp_path / "compiled.json").read_text())
    assert [row["name"] for row in found["steps"]] == [
        *("torch.compile", "reference", "reference, LinearChain"),
        *("torch.compile", "reference"),
    ]
    assert [row["python"] for row in found["steps"]] == [0, 2, 2, 0, 4], "the reference backend is not replayed"
    assert all(row["step_us"] > 0 for row in found["steps"]) and len(found["calls"]["reference"]) == 7
