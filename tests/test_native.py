"""The short way in C++: the same bits as Python's way, from the right record, seen by whoever watches."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_consistency import CASES, Case, Result, bits, make, run
from test_direct import SPECIAL, WATCHERS, Dispatch, Functions, _profile
from torch import Tensor

import dualop
from dualop import replay
from dualop.backends import cuda, registry
from dualop.build.build import Build
from dualop.build.sources import folder
from dualop.errors import DtypeError, LayoutError, ShapeError
from dualop.launch.layout import layout_of
from dualop.replay import triton as native_triton

ROOT = Path(__file__).resolve().parents[1]
OP = dualop.chain("add | tanh")
if not replay.load():
    pytest.skip(f"no extension: {replay.why_not}", allow_module_level=True)
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("nothing_known")]


def same(first: Result, second: Result) -> None:
    for a, b in zip(first.all, second.all, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(bits(a), bits(b))


def check_same_bits(case: Case, device: torch.device, backend: str, by_python: list[str]) -> None:
    op, (x, operands, gy) = dualop.chain(case.text), make(case, device)
    first = run(op, x, operands, gy, backend)
    assert by_python == ["forward", "backward"]
    by_python.clear()
    same(first, run(op, x, operands, gy, backend))
    layout = layout_of(x, operands, [True] * (1 + len(operands)))
    direct = layout.total > 0
    written = direct and gy.stride() == layout.strides and not any(v.expanded for v in layout.views)
    assert ("forward" in by_python) == (not direct)
    assert ("backward" in by_python) == (not written)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_python(case: Case, device: torch.device, by_python: list[str]) -> None:
    check_same_bits(case, device, "cuda", by_python)


def variants(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Calls that differ in one thing each: shape, strides, dtype, alignment, broadcasting; and in values."""
    x, a = torch.randn(8, 16, device=device), torch.randn(16, device=device)
    off = lambda t: torch.randn(t.numel() + 1, device=device)[1:].view(t.shape)
    return [
        *((x, a), (off(x), a), (x, off(a)), (x.t().contiguous().t(), a), (x[:4], a), (x[:, :8], a[:8])),
        *((x.view(4, 32), off(x)[:2].view(32)), (x.bfloat16(), a), (x.bfloat16(), a.bfloat16()), (x, a.bfloat16())),
        *((x, a[None]), (x, off(x)), (x, x.new_ones(8, 1)), (x, x.new_tensor(0.5)), (x.double(), a), (x[::2], a)),
    ]


def test_a_record_serves_its_own_layout_only(device: torch.device, by_python: list[str]) -> None:
    everything = [(x, a, needs) for x, a in variants(device) for needs in ((1, 0), (0, 1), (1, 1), (0, 0))]

    def results(x: Tensor, a: Tensor, needs: tuple[int, int]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip((x, a), needs)]
        y = OP(*leaves, backend="cuda")
        assert y.requires_grad == any(needs)
        wanted = [t for t in leaves if t.requires_grad]
        return [y.detach(), *(torch.autograd.grad(y, wanted, torch.ones_like(y)) if wanted else ())]

    expected = [results(*one) for one in everything]
    calls = len(by_python)
    order = list(range(len(everything)))
    random.shuffle(order)
    for i in order:
        for a, b in zip(results(*everything[i]), expected[i], strict=True):
            assert a.stride() == b.stride() and torch.equal(bits(a), bits(b)), everything[i]
    assert len(by_python) == calls, "all of them were known"


def test_a_record_does_not_serve_data_that_are_less_aligned(device: torch.device) -> None:
    """Four of bfloat16 are an access of 8 bytes beside float32: aligned at the fourth element, and not at the first."""
    x, memory = torch.randn(8, 16, device=device), torch.randn(20, device=device).bfloat16()
    for first in (4, 4, 4, 1):
        a = memory[first : first + 16]
        y = OP(x, a, backend="cuda")
        assert torch.equal(y, OP(x, a.clone(), backend="cuda"))


def known(x: Tensor, a: Tensor) -> Any:
    """The Calls of OP on the CUDA backend, which have seen a call with these tensors."""
    OP(x, a, backend="cuda")
    return replay.known[OP.text, "cuda"]


@pytest.mark.parametrize("name", sorted(WATCHERS.keys() - {"compile"}))  # which is asked for before the extension is
def test_transforms_and_tracers_are_seen(name: str, pair: tuple[Tensor, Tensor]) -> None:
    calls, found = known(*pair), []

    @torch._dynamo.disable
    def inside(x: Tensor) -> None:
        found.append((calls(pair[0], (pair[1],)), calls.unknown(None, pair)))

    def function(x: Tensor) -> Tensor:
        inside(x)
        return x.sin().sum()

    WATCHERS[name](function)(torch.randn(3, device=pair[0].device))
    assert found == [(None, False)]
    assert isinstance(calls(pair[0], (pair[1],)), Tensor), "a switch is left on"


@pytest.mark.parametrize("mode", [Functions, Dispatch, _profile, torch._subclasses.FakeTensorMode])
def test_modes_are_seen(mode: Any, pair: tuple[Tensor, Tensor]) -> None:
    calls = known(*pair)
    with mode():
        assert calls(pair[0], (pair[1],)) is None and not calls.unknown(None, pair)
        assert calls.backward((False, True, True), pair[0], *pair) is None
        assert not calls.unknown((1, True, True), (pair[0], *pair))
    assert isinstance(calls(pair[0], (pair[1],)), Tensor)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tensors_are_seen(name: str) -> None:
    x = torch.randn(4)
    calls, special = known(x, x.clone()), SPECIAL[name](x)
    assert calls(x, (special,)) is None and calls(special, (x,)) is None
    assert not calls.unknown(None, (x, special)) and not calls.unknown(None, (special, x))


def test_what_is_no_call_is_refused(pair: tuple[Tensor, Tensor]) -> None:
    calls = known(*pair)
    assert calls(*pair) is None and calls() is None and calls(pair[0], ()) is None
    assert calls.unknown(None, pair[:1]) and not calls.unknown(None, pair)
    with torch.enable_grad():
        assert calls.backward((False, True, True), pair[0], *pair) is None
    with pytest.raises(TypeError):
        calls.backward(pair[0])
    with pytest.raises(TypeError, match="order"):
        calls.unknown([1, True, True], (pair[0], *pair))


def test_errors_are_as_before(pair: tuple[Tensor, Tensor], by_python: list[str]) -> None:
    x, a = pair
    for _ in range(2):
        OP(x, a, backend="cuda")
        with pytest.raises(ShapeError, match=r"x \(4, 5\), add \(3,\)"):
            OP(x, a[:3], backend="cuda")
        with pytest.raises(DtypeError, match="add is int64"):
            OP(x, a.long(), backend="cuda")
        with pytest.raises(LayoutError, match="sparse_coo"):
            OP(x, a.to_sparse(), backend="cuda")
    assert by_python == ["forward"]


def test_the_same_tensor_twice_leaves_no_record(device: torch.device, by_python: list[str]) -> None:
    x, a = torch.randn(4, 5, device=device), torch.randn(4, 5, device=device)
    for first, second in ((x, x), (x, a), (x, x), (a, x)):
        y = OP(first, second, backend="cuda")
        torch.testing.assert_close(y, torch.tanh(first + second))
    assert len(by_python) == 2


def test_a_tensor_that_was_changed_is_looked_at_again(device: torch.device) -> None:
    x, a = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    other = torch.randn(8, 4, device=device)
    changes = (lambda: x.set_(other.t()), lambda: x.resize_(2, 8), lambda: x.set_(other[:2].reshape(1, 8)))
    for change in (lambda: None, *changes):
        change()
        for _ in range(2):
            torch.testing.assert_close(OP(x, a, backend="cuda"), torch.tanh(x + a))


@contextmanager
def offloaded() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.t().contiguous(), lambda t: t.t()):
        yield


def test_what_saved_tensor_hooks_give_is_looked_at(device: torch.device) -> None:
    x, a = (torch.randn(4, 5, device=device, requires_grad=True) for _ in range(2))
    for hooks in (offloaded, torch.enable_grad, offloaded):
        with hooks():
            y = OP(x, a, backend="cuda")
        found = torch.autograd.grad(y, (x, a), torch.ones_like(y))
        torch.testing.assert_close(found, torch.autograd.grad(torch.tanh(x + a).sum(), (x, a)))


def test_a_launch_that_fails_goes_python_s_way(pair: tuple[Tensor, Tensor], by_python: list[str]) -> None:
    library = Build("fails", 'extern "C" int fails(const void*) { return 1; }\n', host=True).load()
    calls, (x, a) = known(*pair), pair
    launch = (replay.record.address(library.fails), [0] * 3, [1, 2, 0], [0, 1, 2], 0, None)
    calls.learn(None, (x, a), (torch.empty_like(x),), (launch,), (0,))
    assert calls(x, (a,)) is None
    torch.testing.assert_close(OP(x, a, backend="cuda"), torch.tanh(x + a))
    assert by_python == ["forward"] * 2
    not_allowed = (*launch[:5], lambda: False)
    calls.learn(None, (x, a), (torch.empty_like(x),), (not_allowed,), (0,))
    assert calls(x, (a,)) is None
    with pytest.raises(IndexError):
        calls.learn(None, (x, a), (), (launch,), (0,))


def test_another_launch_may_be_chosen_after_tuning(pair: tuple[Tensor, Tensor]) -> None:
    calls = known(*pair)
    assert len(calls) == 1
    registry.forget_launches()
    assert len(calls) == 0 and calls(pair[0], (pair[1],)) is None


def test_sizes_without_end_are_not_kept(device: torch.device) -> None:
    calls = known(torch.ones(1, device=device), torch.ones(1, device=device))
    for n in range(2, 5000):
        calls.learn(None, (torch.empty(n), torch.empty(n)), (), (), ())
    assert 0 < len(calls) <= 4096


def test_threads(device: torch.device) -> None:
    tensors = [(torch.randn(n, 8, device=device), torch.randn(8, device=device)) for n in range(1, 9)]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            for x, a in tensors:
                y = OP(x, a, backend="cuda")
                if not torch.allclose(y, torch.tanh(x + a), atol=1e-5):
                    wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        replay.forget()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the extension ---------------------------------------------------------------------------------------------------


def python(script: str, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "DUALOP_NATIVE": "1", **environment}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    return out.strip()


def test_two_processes_build_once_and_none_waits(tmp_path: Path) -> None:
    script = (
        "import time; from dualop import replay; now, CUDA = time.perf_counter, ('relu', 'cuda')\n"
        "start = now(); first = replay.calls(CUDA, CUDA, None, None); took = now() - start\n"
        "while replay.calls(CUDA, CUDA, None, None) is None and now() < start + 100: time.sleep(0.05)\n"
        "print(first, took < 1, len(replay.calls(('relu', 'auto'), CUDA, None, None)))\n"
    )
    processes = [python(script, DUALOP_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [said(process) for process in processes] == ["None True 0"] * 2
    (folder,) = tmp_path.glob("native_*")
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".cpp", ".log", ".so"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CXX": "/nowhere/c++"}, "kernels cannot be compiled here: CXX=/nowhere/c++ is not there"),
        ({"CXX": "sh -c 'echo error: a bad day >&2; exit 1' --"}, "error: a bad day"),
        ({"DUALOP_NATIVE": "0"}, "DUALOP_NATIVE=0"),
    ],
    ids=["no compiler", "a broken one", "off"],
)
def test_without_the_extension_python_serves(tmp_path: Path, variables: dict[str, str], expected: str) -> None:
    script = (
        "import torch, dualop; from dualop import replay; CUDA = ('relu', 'cuda')\n"
        "assert not replay.load() and replay.calls(CUDA, CUDA, None, None) is None\n"
        "x = torch.ones(3); assert dualop.chain('relu')(x, backend='reference').equal(x) and not replay.known\n"
        "print(replay.why_not)\n"
    )
    assert said(python(script, DUALOP_CACHE_DIR=str(tmp_path), **variables)).startswith(expected)


# ---- the words of a launch -------------------------------------------------------------------------------------------


def fields(header: str, struct: str) -> list[str]:
    """The names of a C++ struct's members in order, each of 8 bytes, up to its first function."""
    text = (folder("cuda") / header).read_text("utf-8")
    body = text[text.index(f"struct {struct} {{") :].split("{", 1)[1].split("};")[0].split("(")[0]
    found = re.findall(r"^ +(?:const )?(?:word|void\*) ([a-z_, ]+);", body, re.MULTILINE)
    return [name for line in found for name in line.split(", ")]


def test_the_words_of_a_launch_are_those_of_its_struct() -> None:
    assert fields("view.cuh", "View") == list(cuda.ViewWords._fields)
    assert fields("library.cuh", "Launch") + fields("kernels.cuh", "Arguments") == list(cuda.LaunchWords._fields)


# ---- Triton ----------------------------------------------------------------------------------------------------------

DRIVER = r"""
#include <cstdio>
struct Attribute { int id, unused; int value; char rest[60]; };
struct Config { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned count; };
extern "C" int cuLaunchKernelEx(const Config* c, void* function, void** parameters, void** extra) {
    printf("%u %u %u, %u %u %u, %u, %p, %u:", c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
           c->shared, c->stream, c->count);
    for (unsigned i = 0; i < c->count; i++) printf(" %d=%d", c->attributes[i].id, c->attributes[i].value);
    printf(", %p, %lld %d %s\n", function, *(long long*)parameters[0], *(int*)parameters[1], extra ? "" : "-");
    fflush(stdout);
    return 7;
}
"""


def compiled(**changes: Any) -> Any:
    """A kernel as Triton gives it."""
    metadata = {"num_warps": 4, "shared": 96, "launch_pdl": False, **native_triton.PLAIN, **changes}
    signature = {"y": "*fp32", "x": "*fp32", "rows": "i32", "steps": "constexpr", "cols": "i64", "BITS": "constexpr"}
    return SimpleNamespace(
        metadata=SimpleNamespace(**metadata), src=SimpleNamespace(signature=signature), function=4711
    )


def test_the_words_of_a_triton_launch() -> None:
    y, x = torch.empty(2), torch.empty(2)
    named = {"rows": 8, "steps": 1, "cols": 64, "BITS": 24, "num_warps": 4}
    words = native_triton._words(compiled(), (5, 6), (y, x), named)
    assert words is not None and words[9] is y and words[10] is x
    assert [0 if isinstance(w, Tensor) else w for w in words] == [0, 4711, 5, 6, 1, 128, 96, 0, 6, 0, 0, 8, 64, 0, 0]
    for change in ({"num_ctas": 2}, {"global_scratch_size": 64}, {"launch_cooperative_grid": True}):
        assert native_triton._words(compiled(**change), (5,), (y, x), named) is None
    assert native_triton._words(compiled(), (5,), (y, 2.0), named) is None


def test_the_driver_is_called_as_triton_calls_it(tmp_path: Path) -> None:
    library = Build("driver", DRIVER, host=True)
    library.load()
    (tmp_path / "libcuda.so.1").symlink_to(library.library)
    script = (
        "import ctypes; from dualop import replay\n"
        "assert replay.load(), replay.why_not\n"
        "launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(replay.triton_launcher())\n"
        "words = [0x50, 0x4711, 5, 6, 7, 128, 96, 0, 2, 2**40 + 1, 8]\n"
        "for early in (0, 1):\n"
        "    words[7] = early; print(launch((ctypes.c_int64 * len(words))(*words)), flush=True)\n"
    )
    out = said(python(script, LD_LIBRARY_PATH=str(tmp_path))).splitlines()
    start, end = "5 6 7, 128 1 1, 96, 0x50,", f"0x4711, {2**40 + 1} 8 -"
    assert out == [f"{start} 0:, {end}", "7", f"{start} 1: 6=1, {end}", "7"]


def test_whoever_hooks_himself_into_triton_s_launches_is_seen() -> None:
    hooks = lambda: SimpleNamespace(calls=[])
    runtime = SimpleNamespace(launch_enter_hook=hooks(), launch_exit_hook=None)
    quiet: Callable[[], bool] = lambda: native_triton._unhooked(runtime, enter, None, None)
    enter = runtime.launch_enter_hook
    assert quiet()
    enter.calls.append(print)
    assert not quiet()
    enter.calls.clear()
    assert quiet()
    runtime.launch_enter_hook = print
    assert not quiet()
    runtime.launch_enter_hook, runtime.launch_exit_hook = enter, hooks()
    assert not quiet()


# ---- on a GPU --------------------------------------------------------------------------------------------------------

KERNELS = ("cuda", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_on_a_gpu(case: Case, backend: str, device: torch.device, by_python: list[str]) -> None:
    check_same_bits(case, device, backend, by_python)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_streams_and_graphs(backend: str, by_python: list[str]) -> None:
    x, a = torch.zeros(64, 128, device="cuda"), torch.randn(128, device="cuda")
    OP(x, a, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.fill_(1.0)
        y = OP(x, a, backend=backend)  # on another stream it would still see zeros
    stream.synchronize()
    torch.testing.assert_close(y, torch.tanh(a + 1).expand(64, 128))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OP(x, a, backend=backend)
    x.fill_(-1.0)
    graph.replay()
    torch.testing.assert_close(y, torch.tanh(a - 1).expand(64, 128))
    assert by_python == ["forward"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu(backend: str, by_python: list[str]) -> None:
    for index in (0, 1):
        x, a = torch.randn(4, 8, device=f"cuda:{index}"), torch.randn(8, device=f"cuda:{index}")
        for current in (0, 1, index, index):
            with torch.cuda.device(current):
                torch.testing.assert_close(OP(x, a, backend=backend), torch.tanh(x + a))
    assert len(by_python) == 3, "the first of each, and where another device is current"


@pytest.mark.gpu
def test_triton_s_hooks_are_called() -> None:
    from triton import knobs

    x, a, seen = torch.randn(4, 8, device="cuda"), torch.randn(8, device="cuda"), []
    for _ in range(2):
        OP(x, a, backend="triton")
    hook = lambda metadata: seen.append(metadata.get()["name"])
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        OP(x, a, backend="triton")
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    OP(x, a, backend="triton")
    assert seen == ["forward_kernel"]
