"""The command line: what it prints, its exit codes, its JSON."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU, ROOT
from typer.testing import CliRunner

from dualop import cli
from dualop.backends.reference import Reference
from dualop.backends.registry import BACKENDS
from dualop.language.stages import STAGES
from dualop.numerics import cases

HELP = """
import sys
sys.argv = ["dualop", *sys.argv[1:]]
from dualop.cli import main
try:
    main()
finally:
    heavy = {"torch", "triton", "numpy"} & set(sys.modules)
    assert not heavy, heavy
"""


def run(*arguments):
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def process(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


class Wrong(Reference):
    name = "wrong"

    def forward(self, chain, x, operands):
        return super().forward(chain, x, operands) * 1.01


@pytest.fixture
def wrong(monkeypatch):
    monkeypatch.setitem(BACKENDS, "wrong", Wrong())
    return "wrong"


@pytest.mark.parametrize(
    "command", [[], ["bench"], ["check"], ["doctor"], ["emit"], ["show"], ["stages"], ["tune"], ["verify"]], ids=str
)
def test_help_is_quick_and_does_not_import_torch(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process("-c", HELP, *command, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    # The processor's seconds, not the clock's: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_defaults_agree():
    assert cli.DEFAULT_CHAIN == cases.DEFAULT_CHAIN


def test_as_a_module_it_lists_every_stage():
    done = process("-m", "dualop", "stages")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, stage in STAGES.items():
        line = next(line for line in lines if line.startswith(f"│ {name} "))
        assert stage.signature in line and all(alias in line for alias in stage.aliases)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--chain", "add | swishh"], "did you mean swish"),
        (["bench", "--chain", "add | swishh"], "did you mean swish"),
        (["show", "gelu("], "gelu("),
        (["show", "gelu", "--backend", "cudda"], "there are cuda, triton, reference"),
        (["check", "--backend", "cudda"], "unknown backend 'cudda'"),
        (["check", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["bench", "--shape", "12by3"], "16384x8192"),
        (["bench", "--shape", "0x8"], "16384x8192"),
        (["bench", "--shape", "8", "--operand", "channel"], "no channel"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    *before, last = result.output.splitlines()
    assert last.startswith("error: ") and said in last
    assert not any("error" in line or "Traceback" in line for line in before)


@pytest.mark.parametrize(
    "arguments",
    [["check", "--frobnicate"], ["bench", "--problem", "other"], ["bench", "--operand", "diagonal"], ["nix"]],
)
def test_unknown_options_exit_2(arguments):
    assert run(*arguments).exit_code == 2


def test_an_error_of_the_real_command_has_no_traceback():
    done = process("-m", "dualop", "show", "nothing_like_that")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_backend_asked_for_by_name_does_not_fall_back():
    done = process("-m", "dualop", "check", "--backend", "cuda", "--chain", "relu", DUALOP_INTERPRET="0")
    assert done.returncode == 2 and "DUALOP_INTERPRET=1" in done.stderr
    done = process("-m", "dualop", "check", "--chain", "relu", "--dtype", "float32", DUALOP_INTERPRET="0")
    assert done.returncode == 0 and "cuda does not run here" in done.stdout and "ok: reference" in done.stdout


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_check_switches_interpreting_on_by_itself():
    environment = {k: v for k, v in os.environ.items() if k != "DUALOP_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "dualop", "check", "--backend", "triton", "--chain", "neg", "--dtype", "float32"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton interpreted on the CPU" in done.stdout


def test_check_writes_what_it_found(tmp_path):
    file = tmp_path / "deep" / "check.json"
    result = run("check", "--backend", "reference", "--chain", "add | relu", "--seed", "5", "--json", str(file))
    assert result.exit_code == 0 and "seed 5" in result.output
    found = json.loads(file.read_text())
    assert found["ok"] is True and found["seed"] == 5
    keys = {"backend", "against", "chain", "dtype", "shape", "quantity", "error", "ok", "interpreted", "layout"}
    assert all(keys <= set(row) for row in found["rows"])
    assert {row["quantity"] for row in found["rows"]} == {"y", "grad_x", "grad_add"}
    assert {row["dtype"] for row in found["rows"]} == set(cases.DTYPES)
    assert {row["against"] for row in found["rows"]} == {"float64"}
    small = [case for case in cases.CASES if not case.gpu or HAS_GPU]
    assert len({(row["layout"], row["dtype"]) for row in found["rows"]}) == sum(
        case.has(dtype) for case in small for dtype in cases.DTYPES
    )


def test_check_exits_1_on_a_mismatch(tmp_path, wrong):
    file = tmp_path / "check.json"
    arguments = ["check", "--chain", "add | relu", "--dtype", "float32", "--json", str(file)]
    result = run(*arguments, "--backend", "wrong,reference")
    assert result.exit_code == 1 and "MISMATCH" in result.output
    found = json.loads(file.read_text())
    assert found["ok"] is False
    bad = [row for row in found["rows"] if not row["ok"]]
    assert {(row["backend"], row["against"], row["quantity"]) for row in bad} == {
        ("wrong", "float64", "y"),
        ("wrong", "reference", "y"),
    }
    assert all(row["error"] > row["allowed"] and row["note"] for row in bad)


def test_without_a_chain_every_stage_is_checked():
    texts = [text for text, _ in cases.checked_chains()]
    assert texts[0] == cases.DEFAULT_CHAIN and {stage.example for stage in STAGES.values()} <= set(texts)


def test_show_prints_the_source():
    assert "__global__" in run("show", "add | gelu").stdout
    assert "@triton.jit" in run("show", "add | gelu", "--backend", "triton").stdout
    assert "gelu" in run("show", "add | gelu", "--backend", "reference").stdout


def test_doctor_says_what_is_there(tmp_path):
    file = tmp_path / "doctor.json"
    result = run("doctor", "--json", str(file))
    assert result.exit_code == 0 and torch.__version__ in result.output
    assert {"torch", "triton"} <= {row["item"] for row in json.loads(file.read_text())["rows"]}


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    arguments = ["check", "--backend", "reference", "--chain", "relu", "--dtype", "float32"]
    assert run(*arguments, "--json", str(blocked / "x.json")).exit_code == 2
