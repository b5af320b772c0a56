"""dualop doctor on machines that lack things: each is made for real, with a PATH, packages or tools of its own."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import triton
from conftest import ROOT

from dualop.build import toolchain
from dualop.launch import tuning
from dualop.launch.grid import Cut
from dualop.machine import doctor, probe

NVIDIA_SMI = probe.nvidia_smi


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """No GPU, no driver's tool and no CUDA_HOME, whatever this machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(probe, "nvidia_smi", list)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_probe(monkeypatch):
    """For tests of everything else: what the child would have said on a machine that has all, without starting it."""
    facts = {
        "torch": {"version": "2.13.0", "cuda": None, "file": "/site/torch/__init__.py"},
        "gpus": [],
        "triton": {"version": "3.9.0", "file": "/site/triton/__init__.py"},
        "backends": {"reference": {"reasons": [], "interpreted": False}},
        "tuned": {"file": "/cache/tune/gpu.json", "launches": 0},
        "native": {"on": True, "why": "", "built": True, "missing": []},
    }
    monkeypatch.setattr(probe, "facts", lambda: facts)
    return facts


@pytest.fixture
def bin_folder(tmp_path, monkeypatch):
    """An empty folder that is the whole PATH; `add(name, script)` puts a shell script there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    monkeypatch.setattr(toolchain, "USUAL_CUDA", str(tmp_path / "nowhere"))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")

    def add(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return add


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


def test_this_machine():
    began = time.monotonic()
    report = doctor.examine()
    took = time.monotonic() - began

    assert report["torch"].found.startswith(torch.__version__)
    assert report["GPU"].found == "none" and "DUALOP_INTERPRET=1" in report["GPU"].advice
    assert report["backend reference"].found == "runs here" and not report["backend reference"].advice
    items = [row.item for row in report.rows]
    assert {"driver", "triton", "nvcc", "ninja", "g++", "cache folder", "backend cuda", "backend triton"} < set(items)
    assert len(items) == len(set(items))
    # Three seconds on an idle machine; the suite's other workers are at work here.
    assert took < 20


def test_a_backend_that_does_not_run_says_why():
    environment = {k: v for k, v in os.environ.items() if k != "DUALOP_INTERPRET"}
    script = "import json; from dualop.machine import doctor; print(json.dumps(doctor.as_json(doctor.examine())))"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["item"]: row for row in json.loads(answer.stdout)["rows"]}
    for name in ("cuda", "triton"):
        assert rows[f"backend {name}"]["found"] == "does not run here"
        assert len(rows[f"backend {name}"]["advice"]) > 10
    assert rows["backend reference"] == {"item": "backend reference", "found": "runs here", "advice": ""}


def test_launches_that_were_kept_are_counted(without_probe, tmp_path, monkeypatch):
    assert doctor.examine()["launches"].found == "by the heuristic"
    without_probe["tuned"]["launches"] = 3
    assert doctor.examine()["launches"].found == "3 found by `dualop tune`, /cache/tune/gpu.json"
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path))
    subject = tuning.Subject("cuda", "forward", "float32", "8x8", "3", "relu")
    file = tuning.keep(subject, torch.device("cpu"), Cut(1, 64, 64, 4), 1.0, 2.0)
    assert probe.STEPS["tuned"]() == {"file": str(file), "launches": 1}


def test_no_tools_at_all(without_probe, bin_folder):
    report = doctor.examine()
    assert report["nvcc"].found == "none" and "CUDA toolkit" in report["nvcc"].advice
    assert report["ninja"].found == "none" and "pip install ninja" in report["ninja"].advice
    assert report["g++"].found == "none" and "C++ compiler" in report["g++"].advice


def test_tools_are_found_with_their_versions(without_probe, bin_folder):
    nvcc = bin_folder("nvcc", "echo 'Cuda compilation tools, release 12.9, V12.9.86'")
    bin_folder("ninja", "echo 1.13.0.git.kitware")
    bin_folder("c++", "echo 'g++ (Debian 14.2.0-19) 14.2.0'")
    report = doctor.examine()
    assert report["nvcc"] == doctor.Row("nvcc", f"12.9, {nvcc}")
    assert report["ninja"].found.startswith("1.13.0,")
    assert report["g++"].found.startswith("14.2.0,")


def test_cuda_home_is_where_nvcc_is_looked_for(without_probe, bin_folder, tmp_path, monkeypatch):
    bin_folder("nvcc", "echo release 12.9,")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert doctor.examine()["nvcc"].found == "none"


def test_cxx_that_cannot_be_read(without_probe, bin_folder, monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    row = doctor.examine()["g++"]
    assert "CXX='g++" in row.found and "set CXX" in row.advice


def test_a_broken_tool_is_not_a_found_one(without_probe, bin_folder):
    bin_folder("c++", "echo 'cannot execute cc1plus' >&2; exit 1")
    row = doctor.examine()["g++"]
    assert "cannot execute cc1plus" in row.found and row.advice


def test_a_tool_that_hangs_is_given_up_and_killed(without_probe, bin_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "TOOL_SECONDS", 0.5)
    bin_folder("ninja", f"/bin/sleep 60 & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()
    row = doctor.examine()["ninja"]
    assert "no answer within 0.5 s" in row.found and row.advice
    assert time.monotonic() - began < 10
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    for _ in range(50):  # the script's own child, too; it is gone or waits to be reaped
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the hanging tool's child still runs")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault"),
        ("print('half a line', end='', flush=True); import os; os._exit(7)", "exit status 7"),
    ],
    ids=["import error", "exits", "segmentation fault", "dies mutely"],
)
def test_a_broken_torch(tmp_path, monkeypatch, source, found):
    package(tmp_path, "torch", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = doctor.examine()
    assert found in report["torch"].found and "pip install" in report["torch"].advice
    assert report["GPU"].found == "none"
    assert report["dualop"].found  # the rest is still told
    assert report["backends"].found
    if "exit" not in source and "kill" not in source:  # the child went on: what does not need torch is examined
        assert report["triton"].found.startswith(f"{triton.__version__}, ")


def test_a_torch_that_hangs(tmp_path, monkeypatch):
    package(tmp_path, "torch", "import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(probe, "FACTS_SECONDS", 1.0)
    began = time.monotonic()
    assert "no answer within 1 s" in doctor.examine()["torch"].found
    assert time.monotonic() - began < 10


def test_no_torch_no_triton_no_rich(tmp_path):
    """A Python that has nothing but the standard library: the doctor is there just for it."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dualop.machine import doctor\n"
    script += "import json; print(json.dumps(doctor.as_json(doctor.examine())))"
    environment = {**os.environ, "DUALOP_CACHE_DIR": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    rows = {row["item"]: row for row in json.loads(answer.stdout)["rows"]}
    assert "No module named 'torch'" in rows["torch"]["found"] and "torch>=2.11" in rows["torch"]["advice"]
    assert "No module named 'triton'" in rows["triton"]["found"] and "triton>=3.6" in rows["triton"]["advice"]


def test_old_versions(without_probe):
    without_probe["torch"]["version"] = "2.9.1+cu128"
    without_probe["triton"]["version"] = "3.5.1"
    report = doctor.examine()
    assert "2.11" in report["torch"].advice and "3.6" in report["triton"].advice


def test_versions_that_are_not_tested_are_marked(without_probe):
    without_probe["torch"]["version"], without_probe["triton"]["version"] = "2.14.1+cu130", "3.8.0"
    report = doctor.examine()
    assert not report["torch"].advice and not report["triton"].advice
    without_probe["torch"]["version"], without_probe["triton"]["version"] = "2.99.0", "3.99.0"
    without_probe["private"] = ["torch._C._x is missing; calls are slower"]
    report = doctor.examine()
    assert report["torch"].advice == "not tested; tested are 2.11, 2.13, 2.14"
    assert report["triton"].advice == "not tested; tested are 3.6, 3.8, 3.9"
    (lacking,) = [row for row in report.rows if row.found == "torch._C._x is missing; calls are slower"]
    assert lacking.item == "torch" and "install a tested version" in lacking.advice


def test_a_gpu(without_probe, bin_folder, monkeypatch):
    monkeypatch.setattr(probe, "nvidia_smi", NVIDIA_SMI)
    bin_folder("nvidia-smi", "echo 'NVIDIA H200, 580.1.2'")
    bin_folder("nvcc", "echo 'release 11.2, V11.2.1'")
    without_probe["torch"]["cuda"] = "13.0"
    without_probe["gpus"] = [{"name": "NVIDIA H200", "capability": [9, 0], "sms": 132, "bytes": 150 * 2**30}] * 2
    report = doctor.examine()
    assert report["GPU"] == doctor.Row("GPU", "NVIDIA H200, compute capability 9.0, 132 SMs, 150 GiB")
    assert report["GPU 1"].found == report["GPU"].found
    assert report["driver"] == doctor.Row("driver", "NVIDIA 580.1.2")
    assert "11.8" in report["nvcc"].advice


@pytest.mark.gpu
def test_this_gpu(monkeypatch):

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    report = doctor.examine()
    properties = torch.cuda.get_device_properties(0)
    assert report["GPU"].found.startswith(f"{properties.name}, compute capability {properties.major}.")
    assert f"{properties.multi_processor_count} SMs" in report["GPU"].found and not report["GPU"].advice
    assert report["driver"].found.startswith("NVIDIA ")
    assert report["backend cuda"] == doctor.Row("backend cuda", "runs here")
    assert report["backend triton"] == doctor.Row("backend triton", "runs here")


@pytest.mark.parametrize(
    ("cuda", "visible", "advice"),
    [(None, None, "CUDA build of torch"), ("13.0", "", "CUDA_VISIBLE_DEVICES=''"), ("13.0", None, "driver 470.1")],
    ids=["torch is a CPU build", "hidden", "old driver"],
)
def test_a_gpu_that_torch_does_not_see(without_probe, bin_folder, monkeypatch, cuda, visible, advice):
    monkeypatch.setattr(probe, "nvidia_smi", NVIDIA_SMI)
    bin_folder("nvidia-smi", "echo 'NVIDIA A100, 470.1'")
    without_probe["torch"]["cuda"] = cuda
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    row = doctor.examine()["GPU"]
    assert "NVIDIA A100" in row.found and advice in row.advice


def test_the_cache_folder(without_probe, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path / "cache"))
    row = doctor.examine()["cache folder"]
    assert "not there yet" in row.found and not row.advice and not (tmp_path / "cache").exists()

    (tmp_path / "cache" / "one").mkdir(parents=True)
    (tmp_path / "cache" / "one" / "chain.so").write_bytes(bytes(3 * 2**20))
    row = doctor.examine()["cache folder"]
    assert row.found == f"{tmp_path / 'cache'}, writable, 1 build, 3.0 MiB" and not row.advice

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "DUALOP_CACHE_DIR" in doctor.examine()["cache folder"].advice


def test_variables(without_probe, monkeypatch):
    without_probe["backends"]["triton"] = {"reasons": [], "interpreted": False}
    monkeypatch.setenv("DUALOP_BACKEND", "cudda")
    monkeypatch.setenv("DUALOP_BAKCEND", "cuda")
    monkeypatch.setenv("DUALOP_INTERPRET", "1")
    report = doctor.examine()
    assert report["DUALOP_BACKEND"].found == "cudda" and "triton" in report["DUALOP_BACKEND"].advice
    assert "DUALOP_BACKEND" in report["DUALOP_BAKCEND"].advice
    without_probe["backends"]["cudda"] = {"reasons": [], "interpreted": False}
    assert not doctor.examine()["DUALOP_BACKEND"].advice
    assert not report["DUALOP_INTERPRET"].advice


def test_an_error_of_its_own_costs_one_row(without_probe, monkeypatch):
    def broken(facts):
        raise RuntimeError("what now")
        yield

    monkeypatch.setattr(doctor, "_environment_rows", broken)
    report = doctor.examine()
    assert "what now" in report["environment"].found
    assert report["backend reference"].found == "runs here"


def test_the_table_shows_every_row_as_it_is():
    from rich.console import Console

    report = doctor.Report((doctor.Row("torch", "[red]2.13[/red]"), doctor.Row("nvcc", "none", "install it")))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(doctor.table(report))
    text = console.export_text()
    assert "[red]2.13[/red]" in text and "install it" in text


@pytest.mark.parametrize(
    ("native", "found", "advice"),
    [
        ({}, "built", ""),
        ({"built": False}, "not built yet", ""),
        ({"on": False, "built": False, "why": "DUALOP_NATIVE=0"}, "off: DUALOP_NATIVE=0", ""),
        ({"built": False, "missing": ["no g++: install it"]}, "cannot be built here", "calls work, .*no g"),
    ],
)
def test_the_extension(without_probe, native, found, advice):
    without_probe["native"] |= native
    row = doctor.examine()["native"]
    assert row.found.startswith(found) and re.match(advice, row.advice) and bool(advice) == bool(row.advice)
