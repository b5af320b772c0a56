"""Builds: cached by content, compiled once, never blocked by what a killed process left, and errors that say enough."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dualop.build import toolchain
from dualop.build.build import Build
from dualop.errors import BackendUnavailable, BuildError, DualopError

ROOT = Path(__file__).resolve().parents[1]
ANSWER = 'extern "C" int answer() { return %d; }\n'
KERNEL = """
__global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }
extern "C" int start(float* x) { twice<<<1, 32>>>(x); return static_cast<int>(cudaGetLastError()); }
"""
needs_nvcc = pytest.mark.skipif(toolchain.cuda_home() is None, reason="no nvcc")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TORCH_CUDA_ARCH_LIST", "DUALOP_VERBOSE", "PYTORCH_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def host(number: int) -> Build:
    return Build("answer", ANSWER % number, host=True)


def python(script: str, *arguments: object, **options) -> subprocess.Popen:
    """A new process that has `build` of ANSWER number argv[1] as `b`."""
    start = "import sys\nfrom dualop.build.build import Build\n"
    start += f"b = Build('answer', {ANSWER!r} % int(sys.argv[1]), True)\n"
    command = [sys.executable, "-c", start + script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: CXX notes each compilation in `calls` and sleeps while there is a file `sleep`."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    real = shutil.which("c++")
    script = folder / "c++"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo $$ >>{folder}/calls; [ -e {folder}/sleep ] && sleep 60;; esac\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return folder


def test_second_process_starts_no_process_and_imports_no_build_system() -> None:
    assert host(42).load().answer() == 42
    script = (
        "import subprocess, os, time, torch\n"
        "def forbidden(*_, **__): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = os.system = os.posix_spawn = os.fork = forbidden\n"
        "start = time.perf_counter(); library = b.load(); took = time.perf_counter() - start\n"
        "print(library.answer(), took, 'torch.utils.cpp_extension' in sys.modules)\n"
    )
    answer, took, imported = python(script, 42).communicate()[0].split()
    assert (answer, imported) == ("42", "False")
    assert float(took) < 0.1


def test_two_processes_compile_once(compiler: Path) -> None:
    waiting = [python("print(b.load().answer())", 7) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in waiting] == ["7", "7"]
    assert len((compiler / "calls").read_text().split()) == 1


def test_killed_build_blocks_nobody(compiler: Path, cache: Path) -> None:
    (compiler / "sleep").touch()
    first = python("b.build()", 3, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (compiler / "calls").exists():
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        assert host(3).try_load() is None
        os.kill(first.pid, signal.SIGKILL)  # ninja and the compiler live on
        first.wait()
        (compiler / "sleep").unlink()
        assert host(3).load().answer() == 3
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # ninja gave the compiler a process group of its own
            os.killpg(os.getpgid(int((compiler / "calls").read_text().split()[0])), signal.SIGKILL)
    assert not list(cache.glob("*/build-*"))


def test_what_an_earlier_build_left_is_cleared() -> None:
    made = host(4)
    left = made.folder / "build-left"
    left.mkdir(parents=True)
    (left / "lock").touch()  # load_inline waits for ever for such a file to vanish
    (made.folder / "lock").write_text("12345")
    assert made.load().answer() == 4
    assert not left.exists()


def test_changed_source_is_another_library() -> None:
    assert host(1).name != host(2).name
    assert (host(1).load().answer(), host(2).load().answer()) == (1, 2)


def test_name_depends_on_what_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(arch):
        return [Build("k", KERNEL, is_host, arch).name for is_host in (True, False)]

    assert names((8, 0))[0] == names((9, 0))[0]
    assert names((8, 0))[1] != names((9, 0))[1]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;10.0")
    assert names((8, 0))[1] == names((9, 0))[1]
    assert len({*names((8, 0)), *names((9, 0))}) == 2


def test_replaced_compiler_is_another_library(compiler: Path) -> None:
    before = host(1).name
    os.utime(compiler / "c++", (1, 1))
    assert host(1).name != before


def test_deleted_cache_is_built_again_in_the_same_process(cache: Path) -> None:
    """load_inline by itself takes a name that it has built before for done."""
    assert host(5).load().answer() == 5
    shutil.rmtree(cache)
    assert host(5).try_load() is None
    assert host(5).load().answer() == 5


def test_broken_library_is_replaced() -> None:
    made = host(6)
    made.folder.mkdir(parents=True)
    made.library.write_bytes(b"\x7fELF")
    assert made.try_load() is None
    assert made.load().answer() == 6


def test_threads_build_side_by_side() -> None:
    answers: dict[int, int] = {}

    def one(number: int) -> None:
        answers[number] = host(number).load().answer()

    threads = [threading.Thread(target=one, args=(number,)) for number in (11, 11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {11: 11, 12: 12}


def test_broken_source_says_the_first_error_and_keeps_the_log() -> None:
    made = Build("broken", "int fine;\nint broken = unknown_name;\nint more = also_unknown;\n", host=True)
    for _ in range(2):  # the second try compiles again
        with pytest.raises(BuildError) as caught:
            made.load()
        error = caught.value
        assert isinstance(error, DualopError)
        assert "unknown_name" in error.first_error and "also_unknown" not in error.first_error
        assert error.first_error in str(error) and str(error.log) in str(error)
        assert "also_unknown" in error.log.read_text()
        source, line = re.match(r"(.*?):(\d+):", error.first_error).groups()
        assert Path(source).read_text().splitlines()[int(line) - 1] == "int broken = unknown_name;"
    assert made.try_load() is None


def test_unresolved_symbol_is_a_build_error() -> None:
    with pytest.raises(BuildError, match="nowhere") as caught:
        Build("unresolved", 'int nowhere();\nextern "C" int f() { return nowhere(); }\n', host=True).load()
    assert "nowhere" in caught.value.log.read_text()


@needs_nvcc
def test_nvcc_builds_without_a_gpu_and_keeps_registers() -> None:
    made = Build("kernel", KERNEL, host=False, arch=(9, 0))
    before = dict(os.environ)
    library = made.load()
    assert dict(os.environ) == before
    assert ctypes.cast(library.start, ctypes.c_void_p).value
    log = made.log.read_text()
    assert "for 'sm_90'" in log and re.search(r"Used \d+ registers", log) and "0 bytes spill stores" in log
    assert b"libtorch" not in made.library.read_bytes()
    assert sorted(path.name for path in made.folder.iterdir()) == ["build.log", made.library.name, "lock", "source.cu"]


@needs_nvcc
def test_arch_list_of_the_environment_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    made = Build("kernel", KERNEL, host=False, arch=(9, 0))
    made.load()
    assert "for 'sm_80'" in made.log.read_text() and "sm_90" not in made.log.read_text()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "nonsense")
    with pytest.raises(BuildError, match="nonsense"):
        Build("kernel", KERNEL, host=False).load()


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "arch", "expected"),
    [
        ("\n__global__ void k(float* x) { *x = unknown_name; }\n", (9, 0), r"source\.cu\(2\): error: .*unknown_name"),
        (KERNEL, (99, 0), "nvcc fatal .*compute_990"),
        ('__global__ void k() { asm volatile("nonsense;"); }', (9, 0), "ptxas .*(error|fatal)"),
    ],
    ids=["syntax", "architecture", "ptx"],
)
def test_broken_cuda_source(source: str, arch: tuple[int, int], expected: str) -> None:
    with pytest.raises(BuildError) as caught:
        Build("broken", source, host=False, arch=arch).load()
    assert re.search(expected, caught.value.first_error)
    assert caught.value.first_error in caught.value.log.read_text()


def test_no_architecture_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for verb in ("try_load", "build", "load"):
        with pytest.raises(BackendUnavailable, match="TORCH_CUDA_ARCH_LIST"):
            getattr(Build("kernel", KERNEL, host=False), verb)()


@pytest.mark.parametrize(("is_host", "expected"), [(True, "g\\+\\+.*ninja"), (False, "g\\+\\+.*ninja.*CUDA_HOME")])
def test_missing_tools_are_all_named(is_host: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")  # where ninja may lie beside Python
    with pytest.raises(BackendUnavailable, match=expected):
        Build("k", KERNEL, is_host, (9, 0)).load()


def test_built_library_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    host(8).load()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert host(8).load().answer() == 8
    assert host(9).try_load() is None


def test_ninja_beside_python_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("ninja", path=os.path.dirname(sys.executable)) is None:
        pytest.skip("no ninja beside this Python")
    wrapper = tmp_path / "c++"  # the compiler itself still needs a PATH
    wrapper.write_text(f'#!/bin/sh\nPATH={shlex.quote(os.environ["PATH"])} exec c++ "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("PATH", "/nowhere")
    assert host(10).load().answer() == 10
    assert os.environ["PATH"] == "/nowhere"


def test_unwritable_cache_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert host(1).try_load() is None
    with pytest.raises(BackendUnavailable, match="DUALOP_CACHE_DIR"):
        host(1).load()


def test_compiler_output_is_shown_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    warns = '#warning look here\nextern "C" int f() { return %d; }\n'
    Build("quiet", warns % 1, host=True).load()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("DUALOP_VERBOSE", "1")
    with pytest.raises(BuildError):
        Build("loud", warns % 2 + "broken", host=True).load()
    assert "look here" in capfd.readouterr().err


def test_a_folder_with_a_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUALOP_CACHE_DIR", str(tmp_path / "with a space"))
    assert host(13).load().answer() == 13
