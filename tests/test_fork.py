"""A process that is forked while another thread builds: the child does its own work at once, and rightly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

SECONDS = 60
START = """
import os, signal, sys, threading, time
from pathlib import Path
import torch, dualop
from dualop import replay
from dualop.build import build, locks
from dualop.build.build import Build

folder = Path(sys.argv[1])
ANSWER = 'extern "C" int answer() { return %d; }'
host = lambda number: Build("answer", ANSWER % number, host=True)

def begun(function):
    threading.Thread(target=function, daemon=True).start()
    compiling()

def compiling():
    while not (folder / "calls").exists():
        time.sleep(0.01)
    (folder / "sleep").unlink()

def in_child(function):
    child = os.fork()
    if not child:
        signal.alarm(40)  # ends a child that hangs
        try:
            function()
            print("the child is done", flush=True)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child

def ended(child):
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child ended with {status}"
"""


def start(script: str, folder: Path, seconds: float, **variables: str) -> subprocess.Popen[str]:
    """A process in which every compilation takes `seconds` more while there is a file `sleep`."""
    compiler = folder / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" -o "*) touch {folder}/calls; [ -e {folder}/sleep ] && sleep {seconds};; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    (folder / "sleep").touch()
    environment = {
        **os.environ, "CXX": str(compiler), "PYTHONPATH": str(ROOT), "DUALOP_CACHE_DIR": str(folder / "cache"),
        "DUALOP_INTERPRET": "1", "DUALOP_NATIVE": "0", **variables,
    }  # fmt: skip
    command = [sys.executable, "-c", START + script, str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run(script: str, folder: Path, seconds: float = 50, **variables: str) -> None:
    process = start(script, folder, seconds, **variables)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        subprocess.run(["kill", "--", f"-{process.pid}"], stderr=subprocess.DEVNULL)
    assert process.returncode == 0 and "the child is done" in out, (out, err[-3000:])


def test_the_child_builds_while_its_parent_does(tmp_path: Path) -> None:
    script = """
before = os.environ["PATH"]
begun(host(1).load)
from torch.utils import cpp_extension
assert os.environ["PATH"] != before

def child():
    assert os.environ["PATH"] == before
    assert host(2).load().answer() == 2
    x = torch.randn(3, 4, requires_grad=True)
    y = dualop.chain("tanh | mul(2)")(x, backend="cuda")
    torch.testing.assert_close(y, 2 * x.tanh())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * (1 - x.tanh() ** 2))
    with dualop.use_backend("reference"):
        dualop.chain("tanh")(x)

ended(in_child(child))
os._exit(0)
"""
    run(script, tmp_path)


def test_the_child_wants_the_library_that_its_parent_builds(tmp_path: Path) -> None:
    script = """
begun(host(1).load)
def child():
    assert host(1).load().answer() == 1
ended(in_child(child))
os._exit(0)
"""
    run(script, tmp_path, seconds=2)


def test_a_cuda_build_leaves_nothing_in_the_child(tmp_path: Path) -> None:
    script = """
from torch.utils import cpp_extension
home = cpp_extension.CUDA_HOME
inside = threading.Event()

def long():
    with build._one_in_this_process, build._prepared(folder, Path("/some/toolkit")):
        inside.set()
        time.sleep(100)

threading.Thread(target=long, daemon=True).start()
inside.wait()
assert cpp_extension.CUDA_HOME == "/some/toolkit" and build.KEEPER in os.environ["PYTORCH_NVCC"]
def child():
    assert cpp_extension.CUDA_HOME == home and "PYTORCH_NVCC" not in os.environ
    assert host(1).load().answer() == 1
ended(in_child(child))
assert cpp_extension.CUDA_HOME == "/some/toolkit"
os._exit(0)
"""
    (tmp_path / "sleep").unlink(missing_ok=True)
    run(script, tmp_path, seconds=0)


def test_the_short_way_is_built_in_the_child(tmp_path: Path) -> None:
    script = """
x = torch.randn(3, 4)
dualop.chain("tanh")(x, backend="triton")
compiling()
assert replay._building
def child():
    assert not replay._building and not replay._begun
    for _ in range(3):
        torch.testing.assert_close(dualop.chain("tanh")(x, backend="triton"), x.tanh())
    assert any(thread.name == "dualop native build" for thread in threading.enumerate())
ended(in_child(child))
os._exit(0)
"""
    run(script, tmp_path, DUALOP_NATIVE="1")


def test_fork_waits_for_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import time\nstarted = True\ntime.sleep(1)\ndone = True\n")
    script = """
sys.path.insert(0, str(folder))
def imports():
    with locks.brief:
        import slow_module
threading.Thread(target=imports, daemon=True).start()
while "slow_module" not in sys.modules:
    time.sleep(0.01)
def child():
    import slow_module
    assert slow_module.done
    with locks.brief:
        pass
ended(in_child(child))
"""
    run(script, tmp_path)


def test_a_property_that_another_thread_computes(tmp_path: Path) -> None:
    script = """
stamp, inside = build._stamp, threading.Event()
def slow(compiler):
    inside.set()
    if threading.current_thread() is not threading.main_thread():
        time.sleep(100)
    return stamp(compiler)
build._stamp = slow
threading.Thread(target=lambda: host(1).name, daemon=True).start()
inside.wait()
def child():
    assert host(1).name.startswith("answer_")
ended(in_child(child))
os._exit(0)
"""
    run(script, tmp_path)


def test_a_child_does_not_keep_the_lock_of_a_build_that_was_killed(tmp_path: Path) -> None:
    """A lock of a file belongs to all copies of its descriptor, a child's too."""
    script = """
begun(host(1).load)
child = in_child(lambda: time.sleep(35))
print("forked", flush=True)
time.sleep(100)
"""
    process = start(script, tmp_path, 50)
    try:
        assert process.stdout is not None and process.stdout.readline() == "forked\n"
        process.kill()
        process.wait()
        began = time.monotonic()
        script = "assert host(1).load().answer() == 1\nin_child(lambda: None)"
        again = tmp_path / "again"
        again.mkdir()
        other = start(script, again, 0, DUALOP_CACHE_DIR=str(tmp_path / "cache"), CXX=str(tmp_path / "c++"))
        _, err = other.communicate(timeout=SECONDS)
        assert other.returncode == 0, err[-2000:]
        assert time.monotonic() - began < 30
    finally:
        subprocess.run(["kill", "--", f"-{process.pid}"], stderr=subprocess.DEVNULL)


def test_the_compiler_of_the_short_way_ends_with_the_process(tmp_path: Path) -> None:
    script = """
dualop.chain("tanh")(torch.randn(3), backend="triton")
compiling()
child = os.fork()
if not child:
    sys.exit(0)  # runs what its parent registered for its own end
ended(child)
time.sleep(0.5)
assert replay._building
print((folder / "pid").read_text(), flush=True)
"""
    process = start(script, tmp_path, 50, DUALOP_NATIVE="1")
    (tmp_path / "c++").write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid; touch {tmp_path}/calls; sleep 50; exit 1\n")
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and not err, err[-2000:]
    until = time.monotonic() + 5
    while Path(f"/proc/{int(out)}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(out)}").exists()
