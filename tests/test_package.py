"""The wheel, built and used far from the checkout, and the checkout's own folders on sys.path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import dualop

FOLDERS = ("dualop", "cuda", "triton_kernels", "bench")
FILES = ("pyproject.toml", "README.md", "LICENSE")
CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"

USE = f"""
import os, sys
import torch, dualop
assert dualop.__file__.startswith(sys.prefix), dualop.__file__
op = dualop.chain({CHAIN!r})
torch.manual_seed(0)
x, add, gy = torch.randn(3, 37) * 2, torch.randn(37), torch.randn(3, 37)
def run(backend):
    a, b = x.clone().requires_grad_(), add.clone().requires_grad_()
    y = op(a, b, backend=backend)
    return (y.detach(), *torch.autograd.grad(y, (a, b), gy))
expected = run("reference")
for backend in ("cuda", "triton"):
    for name, got, want in zip(("y", "grad_x", "grad_add"), run(backend), expected):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, msg=lambda m: f"{{backend}} {{name}}: {{m}}")
    print(backend, "agrees")
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command prints; the test fails with all of it when the command does."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**plain, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")  # a copy: setuptools leaves build/ and *.egg-info where it works
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=source)
    return dist


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def venv(wheel, tmp_path_factory) -> Path:
    """A fresh venv that holds the wheel and sees torch and the rest where the running Python has them."""
    pytest.importorskip("pip")
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=venv)
    (site,) = venv.glob("lib/python3*/site-packages")
    # Folders named in a .pth are searched last, and their own .pth files, such as an editable dualop's, are not read.
    packages = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    (site / "packages_of_the_running_python.pth").write_text("\n".join(packages) + "\n")
    return venv


def test_what_the_wheel_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"dualop/{path.relative_to(ROOT)}" for path in (ROOT / "cuda").rglob("*.cuh")}
    for folder in ("triton_kernels", "bench"):
        expected |= {f"dualop/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    for pattern in ("*.py", "*.h", "*.cpp", "*.in"):
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "dualop").rglob(pattern)}
    kernels = {"dualop/cuda/stages.cuh", "dualop/cuda/stages/smooth.cuh", "dualop/triton_kernels/stages/smooth.py"}
    assert {*kernels, "dualop/bench/timing.py"} < expected
    assert {"dualop/replay/module.cpp", "dualop/replay/call.h", "dualop/emit/templates/kernels.cu.in"} < expected
    assert expected <= names
    assert not [name for name in names if "torch_contract" in name or "capabilities" in name or "/test_" in name]
    assert not [name for name in names if name.startswith("dualop/cuda/") and not name.endswith(".cuh")]
    assert {name.split("/")[0] for name in names} == {"dualop", f"dualop-{dualop.__version__}.dist-info"}


def test_what_the_wheel_says(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"dualop-{dualop.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {dualop.__version__}\n" in metadata and "\nLicense-Expression: MIT\n" in metadata
    for need in ("torch>=2.11", "triton>=3.6", "ninja", "typer"):
        assert f"\nRequires-Dist: {need}" in metadata
    assert "dualop = dualop.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_what_the_source_distribution_holds(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "cuda").rglob("*.cuh")} <= names
    assert {"LICENSE", "README.md", "bench/timing.py", "dualop/replay/call.h"} <= names
    assert {"triton_kernels/stages/smooth.py", "cuda/stages/smooth.cuh", "dualop/emit/templates/model.py.in"} <= names


def test_the_installed_command(venv, tmp_path):
    help_text = run(venv / "bin" / "dualop", "--help", cwd=tmp_path)
    for command in ("bench", "check", "doctor", "emit", "show", "stages", "tune", "verify"):
        assert command in help_text
    stages = run(venv / "bin" / "dualop", "stages", cwd=tmp_path, COLUMNS="200")
    for stage in dualop.stages.STAGES:
        assert stage in stages
    assert run(venv / "bin" / "python", "-m", "dualop", "stages", cwd=tmp_path, COLUMNS="200") == stages


def test_both_kernels_run_from_the_wheel(venv, tmp_path):
    # A cache of its own: builds are named by content, and here the wheel's own sources shall be compiled.
    environment = {"DUALOP_INTERPRET": "1", "DUALOP_CACHE_DIR": str(tmp_path / "cache")}
    said = run(venv / "bin" / "python", "-c", USE, cwd=tmp_path, **environment)
    assert said.splitlines()[-2:] == ["cuda agrees", "triton agrees"]
    assert list((tmp_path / "cache").rglob("*.so"))


def test_the_extension_is_built_from_the_wheel(venv, tmp_path):
    script = "from dualop import replay; assert replay.load(), replay.why_not; print(replay.extension().library)"
    said = run(venv / "bin" / "python", "-c", script, cwd=tmp_path, DUALOP_CACHE_DIR=str(tmp_path / "cache"))
    assert said.startswith(str(tmp_path / "cache" / "native_"))


def test_the_checkout_runs_without_installation(tmp_path):
    said = run(sys.executable, "-m", "dualop", "--help", cwd=ROOT)
    assert "bench" in said
    script = f"import dualop, dualop.bench, dualop.triton_kernels; assert dualop.__file__.startswith({str(ROOT)!r})"
    run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_the_checkout_does_not_hide_the_namespace_package_cuda(tmp_path):
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "cuda" / "bindings" / "__init__.py").write_text("answer = 42\n")
    script = "import dualop, cuda.bindings; assert cuda.bindings.answer == 42"
    run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
