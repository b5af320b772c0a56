"""`make sanitize`: what it reads from compute-sanitizer's output, what it calls, and how it ends. No GPU is needed."""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sanitize
import sanitize_calls
import torch
from test_consistency import CASES, close, make, truth

import dualop
from dualop.backends.registry import BACKENDS
from dualop.launch.layout import layout_of
from dualop.linear import BACKEND as PRODUCTS_BACKEND

CPU = torch.device("cpu")
KERNELS = sanitize.BACKENDS

# As NVIDIA's documentation of compute-sanitizer shows them, with the calls in between.
CLEAN = """\
========= COMPUTE-SANITIZER
call: features: forward
call: features: grad x, add
2 calls were made
========= ERROR SUMMARY: 0 errors
"""
CLEAN_RACES = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
MEMCHECK = """\
========= COMPUTE-SANITIZER
call: features: forward
call: x sliced: grad x
========= Invalid __global__ read of size 4 bytes
=========     at void dualop::backward_kernel<dualop::Problem<float>, (int)2>(dualop::Arguments)+0x1f0
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f5d2c800200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5d2c800000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========     Host Frame: [0x2f2301] in libcuda.so.1
=========
========= Invalid __global__ read of size 4 bytes
=========     at void dualop::backward_kernel<dualop::Problem<float>, (int)2>(dualop::Arguments)+0x1f0
=========     by thread (4,0,0) in block (1,0,0)
=========     Address 0x7f5d2c800204 is out of bounds
=========
call: x sliced: grad add
2 calls were made
========= ERROR SUMMARY: 103 errors
========= ERROR SUMMARY: 3 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
call: many rows, partial sums: grad add
========= Error: Race reported between Write access at sum_kernel(float *, int)+0x460 in /c/kernel.cu:41
=========     and Read access at sum_kernel(float *, int)+0x7a0 in /c/kernel.cu:51 [508 hazards]
=========
========= Warning: Race reported between Read access at 0x90 in other_kernel [16 hazards]
========= and Write access at 0x110 in other_kernel [16 hazards]
1 calls were made
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
call: x with gaps: forward
========= Uninitialized __global__ memory read of size 2 bytes
=========     at forward_kernel+0x130 in chain.py:33
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
1 calls were made
========= ERROR SUMMARY: 1 error
"""
SYNCCHECK = """\
========= COMPUTE-SANITIZER
call: loop, per row, loops: grad x
========= Barrier error detected. Divergent thread(s) in block.
=========     at backward_kernel(Arguments)+0x15520
=========     by thread (128,0,0) in block (0,0,0)
1 calls were made
========= ERROR SUMMARY: 1 error
"""
CRASHED = """\
========= COMPUTE-SANITIZER
call: features: forward
Traceback (most recent call last):
RuntimeError: CUDA error: unspecified launch failure
========= Target application returned an error
========= ERROR SUMMARY: 0 errors
"""
NOTHING = "========= COMPUTE-SANITIZER\n========= Error: No attachable process found. compute-sanitizer timed-out.\n"


@pytest.mark.parametrize(("tool", "text"), [("memcheck", CLEAN), ("racecheck", CLEAN_RACES)])
def test_a_clean_run_is_clean(tool, text):
    report = sanitize.parsed(tool, "cuda", text, 0)
    assert report.clean and (report.errors, report.calls, report.findings, report.failure) == (0, 2, (), "")


@pytest.mark.parametrize(
    ("tool", "text", "errors", "findings"),
    [
        (
            "memcheck",
            MEMCHECK,
            103,
            [
                "Invalid __global__ read of size 4 bytes in void dualop::backward_kernel<dualop::Problem<float>, "
                "(int)2>(dualop::Arguments): 2 times, first in `x sliced: grad x`"
            ],
        ),
        (
            "racecheck",
            RACECHECK,
            2,
            [
                "Error: Race reported between Write access in sum_kernel(float *, int): 1 times, first in "
                "`many rows, partial sums: grad add`",
                "Warning: Race reported between Read access in other_kernel: 1 times, first in "
                "`many rows, partial sums: grad add`",
            ],
        ),
        (
            "initcheck",
            INITCHECK,
            1,
            ["Uninitialized __global__ memory read of size 2 bytes in forward_kernel: 1 times, first in "
             "`x with gaps: forward`"],
        ),
        (
            "synccheck",
            SYNCCHECK,
            1,
            ["Barrier error detected. Divergent thread(s) in block. in backward_kernel(Arguments): 1 times, first in "
             "`loop, per row, loops: grad x`"],
        ),
    ],
    ids=sanitize.TOOLS,
)  # fmt: skip
def test_findings_are_counted_and_placed(tool, text, errors, findings):
    report = sanitize.parsed(tool, "cuda", text, 0)
    assert not report.clean and not report.failure
    assert report.errors == errors and list(report.findings) == findings


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [
        (CRASHED, 1, "did not come to their end"),
        (CRASHED, 0, "did not come to their end"),
        (NOTHING, 0, "no summary"),
        ("", 139, "no summary of memcheck: it printed nothing"),
        (CLEAN, 3, "exit status 3"),
        (CLEAN.replace("2 calls", "0 calls"), 0, "did not come to their end"),
    ],
)
def test_a_run_that_did_not_end_is_not_clean(text, code, why):
    report = sanitize.parsed("memcheck", "cuda", text, code)
    assert not report.clean and why in report.failure


def test_more_hazards_than_are_displayed_count():
    text = CLEAN_RACES.replace("0 hazards displayed (0 errors", "20 hazards displayed (256 errors")
    assert sanitize.parsed("racecheck", "cuda", text, 0).errors == 256


def test_the_table_has_every_tool_and_backend():
    texts = {"memcheck": MEMCHECK, "racecheck": CLEAN_RACES, "initcheck": NOTHING, "synccheck": CLEAN}
    reports = [sanitize.parsed(tool, backend, texts[tool], 0) for tool in sanitize.TOOLS for backend in KERNELS]
    lines = sanitize.table(reports).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["tool", "cuda", "triton"],
        ["memcheck", "103", "errors", "103", "errors"],
        ["racecheck", "0", "errors", "0", "errors"],
        ["initcheck", "failed", "failed"],
        ["synccheck", "0", "errors", "0", "errors"],
    ]
    assert "calls: cuda 2, triton 2" in lines
    assert any(line.startswith("initcheck triton: no summary of initcheck") for line in lines)


# ---- what is called --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_every_case_is_called_in_every_form(backend):
    names = [call.name for call in sanitize_calls.calls(backend, CPU)]
    assert len(set(names)) == len(names)
    for case in CASES:
        x, operands, _ = make(case, "cpu")
        if not layout_of(x, operands).total:
            continue
        given = ("x", *dualop.chain(case.text).operands)
        own = {f"{case.name}: grad {name}" for name in (*given, ", ".join(given))}
        assert {f"{case.name}: forward", *own} <= set(names)
    for case in sanitize_calls.LOOPED:
        assert {f"{case.name}, {cut}: grad x" for cut in sanitize_calls.CUTS} <= set(names)
    assert any(name.startswith("slope") for name in names)
    assert any(name.startswith("product") for name in names) == (backend == PRODUCTS_BACKEND)


@pytest.mark.parametrize("processors", [2, 132])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_cuts_loop(backend, processors, monkeypatch, device):
    """Over several tiles down the rows and across the columns, also where many programs fit on the GPU."""
    module = sys.modules[type(BACKENDS[backend]).__module__]
    monkeypatch.setattr(module, "multiprocessors", lambda device: processors)
    BACKENDS[backend].forget()
    steps = {}
    for case in sanitize_calls.LOOPED:
        x, operands, gy = make(case, device)
        needs = (True,) * (1 + len(operands))
        chain, layout = dualop.chain(case.text), layout_of(x, operands, needs)
        for name, change in sanitize_calls.CUTS.items():
            cut = change(BACKENDS[backend].heuristic(chain, layout, "backward"))
            grid = BACKENDS[backend].launch(chain, layout, needs, cut, (gy, x, *operands)).grid
            steps[case.name, name] = (grid.steps > 1 and grid.row_step > 0, grid.steps > 1 and grid.col_step > 0)
    BACKENDS[backend].forget()
    for case in sanitize_calls.LOOPED[:4]:
        assert steps[case.name, "loops"][0] and steps[case.name, "tall"][0], case.name
    assert steps["loop, per row", "loops"][1]


@pytest.mark.parametrize("cut", sanitize_calls.CUTS)
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *(pytest.param("cuda", case, id=f"cuda, {case.name}") for case in sanitize_calls.LOOPED),
        pytest.param("triton", sanitize_calls.LOOPED[0], id="triton", marks=pytest.mark.slow),
    ],
)
def test_what_the_cuts_compute_is_right(backend, case, cut, device):
    x, operands, gy = make(case, device)
    chain = dualop.chain(case.text)
    _, exact, sizes = truth(chain, x, operands, gy)
    (first, *_) = sanitize_calls.of_case(case, backend, device, cut, sanitize_calls.CUTS[cut])
    for name, got, right, size in zip(("x", *chain.operands), first.run(), exact, sizes, strict=True):
        close(f"{backend} gradient of {name}", got, right, size, gy.dtype)


@pytest.mark.slow
def test_the_calls_of_cuda_come_to_their_end():
    text, code, _ = interpreted_run(sanitize.plain("cuda", ""))
    calls = list(sanitize_calls.calls("cuda", CPU))
    assert code == 0 and f"{len(calls)} calls were made" in text and text.count("call: ") == len(calls)


def test_tensors_are_moved_as_they_lie():
    x = torch.arange(40.0).as_strided((3, 4), (10, 2), 3)
    there = sanitize_calls.moved(x, CPU)
    assert torch.equal(there, x) and (there.stride(), there.storage_offset()) == (x.stride(), x.storage_offset())
    gaps = there.as_strided((40,), (1,), 0)
    assert torch.equal(gaps, torch.arange(40.0)) and sanitize_calls.moved(x.bfloat16()[:1].expand(5, 4), CPU).shape == (
        5,
        4,
    )


# ---- the command -----------------------------------------------------------------------------------------------------

FAKE = f"""\
#!{sys.executable}
import subprocess, sys
tool = sys.argv[sys.argv.index("--tool") + 1]
print("========= COMPUTE-SANITIZER", flush=True)
line = sys.argv[sys.argv.index({sys.executable!r}):]
code = subprocess.run(line).returncode
if tool == "racecheck":
    print("========= Error: Race reported between Write access at planted_kernel+0x10 in a.cu:1")
    print("=========     and Read access at planted_kernel+0x20 in a.cu:2 [4 hazards]")
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
else:
    print("========= ERROR SUMMARY: 0 errors")
sys.exit(code)
"""

interpreted = lambda environment: {**environment, "DUALOP_INTERPRET": "1", "TRITON_INTERPRET": "1"}


def interpreted_run(line):
    with pytest.MonkeyPatch.context() as patch:
        own = sanitize.environment()
        patch.setattr(sanitize, "environment", lambda: interpreted(own))
        return sanitize.run(line)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compute-sanitizer that finds one race, and a machine that has all it takes."""
    file = tmp_path / "compute-sanitizer"
    file.write_text(FAKE)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    own = sanitize.environment()
    monkeypatch.setenv(sanitize.VARIABLE, str(file))
    monkeypatch.setattr(sanitize, "environment", lambda: interpreted(own))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tools", "code", "said"), [(("memcheck", "synccheck"), 0, "clean"), (("racecheck",), 1, "NOT CLEAN")]
)
def test_the_command_prints_the_table_and_ends_with_the_verdict(tools, code, said, fake, monkeypatch, capsys):
    more = [word for tool in tools for word in ("--tool", tool)]
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--backend", "cuda", *more, "--only", "middle alone"])
    assert sanitize.main() == code
    output = capsys.readouterr().out
    assert f"\n{said}, " in output and "calls: cuda 4" in output
    assert ("planted_kernel: 1 times, first in `middle alone: grad add`" in output) == (code == 1)


def test_a_run_that_is_too_long_ends(fake, monkeypatch):
    monkeypatch.setattr(sanitize, "LIMIT_S", 1)
    text, code, seconds = sanitize.run([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"])
    assert code == 124 and text.startswith("x") and "ended after 1 s" in text and seconds < 30


def test_calls_that_fail_without_a_tool_end_the_command(fake, monkeypatch):
    monkeypatch.setattr(sanitize, "CALLS", Path(__file__).with_name("nowhere.py"))
    with pytest.raises(SystemExit, match="without a tool, the calls of cuda end with exit status 2"):
        sanitize.sanitize(["cuda"], ["memcheck"], "", lambda text: None)


def test_what_is_missing_is_said_with_its_remedy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(sanitize.VARIABLE, str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 2
    said = capsys.readouterr().err
    assert "no GPU" in said and "compute-sanitizer is missing" in said and sanitize.VARIABLE in said


def test_the_report_is_data():
    report = sanitize.parsed("memcheck", "cuda", CLEAN, 0)
    assert not replace(report, errors=1).clean and not replace(report, failure="it ended").clean
