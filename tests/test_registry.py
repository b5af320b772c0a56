"""Which backend runs: order of precedence, reasons, choices that never fall back, and what carries a choice on."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dualop
from dualop.backends import registry
from dualop.backends.registry import BACKENDS
from dualop.errors import BackendUnavailable, DeviceError, DtypeError, OperandError, ShapeError

if not registry.interpreting():
    pytest.skip("on CPU tensors, with DUALOP_INTERPRET=1", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("python_way")
NAMES = ("cuda", "triton", "reference")
OP = dualop.chain("add | relu")
X, B = torch.randn(4, 8), torch.randn(8)

Calls = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_process", None)
    monkeypatch.setattr(registry, "_environment", "auto")
    monkeypatch.setattr(registry, "_traced", None, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(backend, "forward" or "backward") of every kernel call, in order."""
    seen: Calls = []

    def watch(name: str, method: str) -> None:
        original = getattr(BACKENDS[name], method)

        def watched(*arguments: Any) -> Any:
            seen.append((name, method))
            return original(*arguments)

        monkeypatch.setattr(BACKENDS[name], method, watched)

    for name in BACKENDS:
        watch(name, "forward")
        watch(name, "backward")
    return seen


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chosen(calls: Calls, function: Callable[[], Any]) -> str:
    """The one backend whose forward `function` calls."""
    calls.clear()
    function()
    (call,) = calls
    assert call[1] == "forward"
    return call[0]


def in_process(code: str, **environment: str) -> Any:
    """What the code, in a new Python without this one's switches, leaves in `result`."""
    switches = ("DUALOP_INTERPRET", "TRITON_INTERPRET", "DUALOP_BACKEND")
    inherited = {k: v for k, v in os.environ.items() if k not in switches}
    ran = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}\nprint('RESULT', json.dumps(result))"],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.rpartition("RESULT ")[2])


# ---- order of precedence ---------------------------------------------------------------------------------------------


def test_the_backends_are_these() -> None:
    assert tuple(BACKENDS) == NAMES and all(backend.name == name for name, backend in BACKENDS.items())
    assert registry.interpreting()


def test_auto_takes_no_interpreted_kernel(calls: Calls) -> None:
    assert chosen(calls, lambda: OP(X, B)) == "reference"
    assert chosen(calls, lambda: OP(X, B, backend="auto")) == "reference"


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_choose(calls: Calls, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(calls, lambda: OP(X, B, backend=name)) == name
    with dualop.use_backend(name):
        assert chosen(calls, lambda: OP(X, B)) == name
    dualop.set_backend(name)
    assert chosen(calls, lambda: OP(X, B)) == name
    dualop.set_backend("auto")
    monkeypatch.setattr(registry, "_process", None)
    monkeypatch.setattr(registry, "_environment", name)
    assert chosen(calls, lambda: OP(X, B)) == name


def test_order_of_precedence(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_environment", "triton")
    assert chosen(calls, lambda: OP(X, B)) == "triton"
    dualop.set_backend("cuda")
    assert chosen(calls, lambda: OP(X, B)) == "cuda"
    with dualop.use_backend("triton"):
        assert chosen(calls, lambda: OP(X, B)) == "triton"
        assert chosen(calls, lambda: OP(X, B, backend="reference")) == "reference"
        with dualop.use_backend("reference"):
            assert chosen(calls, lambda: OP(X, B)) == "reference"
            assert chosen(calls, lambda: OP(X, B, backend="cuda")) == "cuda"
        assert chosen(calls, lambda: OP(X, B)) == "triton"
        with dualop.use_backend("auto"):
            assert chosen(calls, lambda: OP(X, B)) == "reference"
    assert chosen(calls, lambda: OP(X, B)) == "cuda"
    dualop.set_backend("auto")  # a choice too: it has precedence over the environment
    assert chosen(calls, lambda: OP(X, B)) == "reference"


def test_use_backend_ends_with_an_error(calls: Calls) -> None:
    with pytest.raises(ZeroDivisionError), dualop.use_backend("cuda"):
        raise ZeroDivisionError
    assert chosen(calls, lambda: OP(X, B)) == "reference"


def test_use_backend_decorates(calls: Calls) -> None:
    @dualop.use_backend("triton")
    def function() -> torch.Tensor:
        return OP(X, B)

    assert [chosen(calls, function), chosen(calls, function), chosen(calls, lambda: OP(X, B))] == [
        "triton",
        "triton",
        "reference",
    ]


@pytest.mark.parametrize("name", ["Cuda", "", "tpu", "cuda ", "auto,cuda"])
def test_unknown_names(name: str) -> None:
    dualop.set_backend("triton")
    for choose in (
        lambda: dualop.set_backend(name),
        lambda: dualop.use_backend(name).__enter__(),
        lambda: OP(X, B, backend=name),
        lambda: dualop.explain(OP, X, B, backend=name),
    ):
        with pytest.raises(BackendUnavailable, match="auto, cuda, triton, reference") as caught:
            choose()
        assert repr(name) in str(caught.value)
    assert registry.requested() == "triton"  # nothing is half done


ENVIRONMENT = """
import torch, dualop
x, b = torch.randn(4, 8), torch.randn(8)
op = dualop.chain("add | relu")
def chosen(**kwargs):
    try:
        return dualop.explain(op, x, b, **kwargs).chosen
    except dualop.errors.BackendUnavailable as error:
        return str(error)
result = [chosen()]
result.append(chosen(backend="triton"))
dualop.set_backend("reference")
result.append(chosen())
"""


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("cuda", ["cuda", "triton", "reference"]), ("", ["reference", "triton", "reference"])],
)
def test_the_environment_variable(variable: str, expected: list[str]) -> None:
    assert in_process(ENVIRONMENT, DUALOP_BACKEND=variable, DUALOP_INTERPRET="1") == expected


def test_a_wrong_environment_variable_is_told_when_it_matters() -> None:
    first, named, later = in_process(ENVIRONMENT, DUALOP_BACKEND="cudnn", DUALOP_INTERPRET="1")
    assert "'cudnn'" in first and "DUALOP_BACKEND" in first and "auto, cuda, triton, reference" in first
    assert [named, later] == ["triton", "reference"]


# ---- without the switch ----------------------------------------------------------------------------------------------

REFUSED = """
import torch, dualop
from dualop.backends.registry import BACKENDS, interpreting
x, b = torch.randn(4, 8), torch.randn(8)
op = dualop.chain("add | relu")
explanation = dualop.explain(op, x, b, backend="cuda")
result = {"interpreting": interpreting(), "chosen": explanation.chosen, "reasons": explanation.reasons,
          "auto": dualop.explain(op, x, b).chosen, "errors": {}}
for name in ("cuda", "triton"):
    assert not BACKENDS[name].interpreted
    try:
        op(x, b, backend=name)
    except dualop.errors.BackendUnavailable as error:
        result["errors"][name] = str(error)
    x.requires_grad_()
    try:
        with dualop.use_backend(name):
            op(x, b)
    except dualop.errors.BackendUnavailable as error:
        result["errors"][name + " in a context"] = str(error)
result["equal"] = torch.equal(op(x, b), torch.relu(x + b))
"""


@pytest.mark.parametrize("switch", [None, "0", ""])
def test_cpu_tensors_are_refused_without_the_switch(switch: str | None) -> None:
    got = in_process(REFUSED, **({} if switch is None else {"DUALOP_INTERPRET": switch}))
    assert not got["interpreting"] and got["chosen"] is None and got["auto"] == "reference" and got["equal"]
    assert sorted(got["errors"]) == ["cuda", "cuda in a context", "triton", "triton in a context"]
    for name, error in got["errors"].items():
        assert error.startswith(f"backend {name.partition(' ')[0]} cannot run `add | relu` on cpu")
        assert "DUALOP_INTERPRET=1" in error and error.endswith("Backends that can: reference")
    assert all("DUALOP_INTERPRET=1" in " ".join(got["reasons"][name]) for name in ("cuda", "triton"))


def test_importing_builds_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys, dualop
light = [m for m in ("triton", "typer", "rich") if m in sys.modules]
op = dualop.chain("add | relu")
import dualop.backends.registry
result = [light, [m for m in ("triton", "typer", "rich", "torch.utils.cpp_extension") if m in sys.modules]]
"""
    light, heavy = in_process(code, DUALOP_CACHE_DIR=str(tmp_path / "cache"))
    assert light == []
    assert heavy == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("first", "switch", "runs"), [("triton", "", False), ("dualop", "", True), ("triton", "1", True)]
)
def test_a_triton_that_was_imported_without_its_interpreter_is_named(first: str, switch: str, runs: bool) -> None:
    code = f"""
import {first}, torch, triton, dualop
x, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
try:
    dualop.chain("add | gelu")(x, b, backend="triton").sum().backward()
    result = "" if b.grad.shape == (4,) else "wrong"
except dualop.errors.BackendUnavailable as error:
    result = str(error)
"""
    said = in_process(code, DUALOP_INTERPRET="1", **({"TRITON_INTERPRET": switch} if switch else {}))
    assert said == "" if runs else "import dualop before it or set TRITON_INTERPRET=1" in said


# ---- reasons, and no way around them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_explain(name: str) -> None:
    explanation = dualop.explain(OP, X, B, backend=name)
    assert explanation.requested == name
    assert explanation.chosen == ("reference" if name == "auto" else name)
    assert list(explanation.reasons) == list(NAMES)
    for other, reasons in explanation.reasons.items():
        assert bool(reasons) == (other != explanation.chosen), other
        assert all(isinstance(reason, str) and reason for reason in reasons)
    text = str(explanation)
    assert all(other in text for other in NAMES) and f"{explanation.chosen} runs" in text
    with dualop.use_backend(name):
        assert dualop.explain(OP, X, add=B) == explanation


def test_explain_says_that_nothing_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"], "reasons", lambda *_: ["no triton: pip install triton"])
    explanation = dualop.explain(OP, X, B, backend="triton")
    assert explanation.chosen is None
    assert explanation.reasons["triton"] == ["no triton: pip install triton"]
    assert "pip install triton" in str(explanation)
    with pytest.raises(BackendUnavailable, match="pip install triton"):
        OP(X, B, backend="triton")


def test_explain_does_not_compute(calls: Calls) -> None:
    dualop.explain(OP, X, B, backend="cuda")
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((X,), OperandError),
        ((X, B, B), OperandError),
        ((X, 1.0), OperandError),
        ((X, torch.ones(3)), ShapeError),
        ((X.int(), B), DtypeError),
        ((X, B.to(torch.complex64)), DtypeError),
        ((X, torch.empty(8, device="meta")), DeviceError),
    ],
)
@pytest.mark.parametrize("backend", ["auto", *NAMES])
def test_bad_input_has_the_same_error_everywhere(arguments: Any, error: type, backend: str, calls: Calls) -> None:
    with pytest.raises(error) as explained:
        dualop.explain(OP, *arguments, backend=backend)
    with pytest.raises(error) as called:
        OP(*arguments, backend=backend)
    assert str(explained.value) == str(called.value)
    assert calls == []


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_never_falls_back(name: str, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    monkeypatch.setattr(BACKENDS[name], "reasons", lambda *_: ["reason one", "reason two"])
    for call in (lambda: OP(X, B, backend=name), lambda: contextvars.copy_context().run(_within, name)):
        with pytest.raises(BackendUnavailable) as caught:
            call()
        for part in (f"backend {name}", "`add | relu`", "reason one", "reason two", "reference"):
            assert part in str(caught.value)
        assert name not in str(caught.value).partition("Backends that can")[2]
    assert calls == []


def _within(name: str) -> torch.Tensor:
    with dualop.use_backend(name):
        return OP(X, B)


def test_auto_fails_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setattr(BACKENDS[name], "reasons", lambda *_, name=name: [f"{name} is broken"])
    with pytest.raises(BackendUnavailable) as caught:
        OP(X, B)
    assert all(f"{name} is broken" in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_inside_a_backend_is_not_hidden(name: str, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def fails(*_: Any) -> None:
        raise OverflowError("inside")

    monkeypatch.setattr(BACKENDS[name], "forward", fails)
    with pytest.raises(OverflowError, match="inside"):
        OP(X, B, backend=name)
    assert calls == []


@pytest.mark.parametrize("name", NAMES)
def test_backends_show_their_source(name: str) -> None:
    source = BACKENDS[name].source(dualop.chain("add(bias) | gelu | hardtanh(-1, 0.5)"))
    assert "gelu" in source and "hardtanh" in source and len(source.splitlines()) > 3
    if name != "cuda":
        compile(source, name, "exec")


# ---- a backend from outside the package ------------------------------------------------------------------------------

THIRD = """
import torch
from dualop.backends.base import Backend
from dualop.backends.reference import reference, reference_gradients


class Third(Backend):
    name = "third"

    def environment(self):
        return []

    def reasons(self, chain, device):
        return ["has no kernel of tanh"] if "tanh" in chain.text else []

    def forward(self, chain, x, operands):
        print("third forward")
        with torch.no_grad():
            return reference(chain, x, operands)

    def backward(self, chain, gy, x, operands, needs):
        print("third backward")
        with torch.no_grad():
            return [g.clone() for g in reference_gradients(chain, gy, x, operands, needs)]

    def source(self, chain):
        return f"# third: {chain}"
"""


@pytest.fixture(params=["entry point", "register"])
def third(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """Runs a command line in a process that has a backend `third`, and gives what it prints."""
    (tmp_path / "third.py").write_text(THIRD)
    start = "import sys; from dualop.cli import main; sys.argv = ['dualop', *sys.argv[1:]]; main()"
    if request.param == "entry point":
        packaged(tmp_path, "third = third:Third")
    else:
        start = f"import third; from dualop.backends.registry import register; register(third.Third()); {start}"

    def call(*arguments: str, code: str = "", status: int = 0) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", (code and f"{start.partition('import sys;')[0]}{code}") or start, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "DUALOP_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    call.installed = request.param == "entry point"  # type: ignore[attr-defined]
    return call


def packaged(folder: Path, entry: str) -> None:
    about = folder / "third-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[dualop.backends]\n{entry}\n")


def test_every_command_knows_a_third_backend(third: Any, tmp_path: Path) -> None:
    explained = third(code="import torch, dualop; x = torch.ones(2); print(dualop.explain(dualop.chain('relu'), x))")
    assert "third: reference was chosen" in explained
    file = tmp_path / "out.json"
    third("check", "--chain", "add | relu", "--backend", "third,reference", "--json", str(file))
    found = json.loads(file.read_text())
    assert found["ok"] and "third" in {row["backend"] for row in found["rows"]}
    third("bench", "--chain", "add | relu", "--backend", "all", "--shape", "4x8", "--no-compile", "--json", str(file))
    assert {"third", "cuda", "triton", "reference"} <= {row["backend"] for row in json.loads(file.read_text())["rows"]}
    third("verify", "relu", "--backend", "third", "--dtype", "float16", "--json", str(file))
    assert {row["backend"] for row in json.loads(file.read_text())["rows"]} == {"third"}
    assert "third: relu" in third("show", "relu", "--backend", "third")
    assert "no launches to choose" in third("tune", "--backend", "third", "--chain", "relu", status=2)
    assert "cannot run `tanh`" in third("check", "--chain", "tanh", "--backend", "third", status=2)
    if third.installed:  # doctor asks another process, which knows what is installed
        third("doctor", "--json", str(file))
        rows = {row["item"]: row["found"] for row in json.loads(file.read_text())["rows"]}
        assert rows["backend third"] == "runs here"


def test_a_third_backend_computes_and_differentiates(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(THIRD, scope)
    registry.register(scope["Third"]())
    try:
        x, b = X.clone().requires_grad_(), B.clone().requires_grad_()
        y = OP(x, b, backend="third")
        expected = torch.relu(x + b)
        torch.testing.assert_close(y, expected)
        for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, b)), torch.autograd.grad(expected.sum(), (x, b))):
            torch.testing.assert_close(ours, theirs)
        with pytest.raises(BackendUnavailable, match="no kernel of tanh"):
            dualop.chain("tanh")(X, backend="third")
        with pytest.raises(BackendUnavailable, match="'third'"):
            registry.register(scope["Third"]())
        for name in ("auto", "two words", ""):
            with pytest.raises(BackendUnavailable, match="identifier"):
                registry.register(type("Odd", (scope["Third"],), {"name": name})())
    finally:
        registry.unregister("third")
    with pytest.raises(BackendUnavailable, match="unknown backend 'third'"):
        OP(X, B, backend="third")


def test_a_third_backend_that_cannot_be_loaded_says_so_and_harms_nobody(tmp_path: Path) -> None:
    packaged(tmp_path, "third = nowhere_to_be_found:Third")
    code = "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
            ENVIRONMENT,
            "result = [chosen(), chosen(backend='third')]",
            "from dualop.backends.registry import BACKENDS",
            "result += BACKENDS['third'].environment()",
            "try: op(x, b, backend='third')",
            "except dualop.errors.BackendUnavailable as error: result.append(str(error))",
        ]
    )
    auto, named, why, raised = in_process(code, DUALOP_INTERPRET="1")
    assert auto == "reference" and named is None
    assert "nowhere_to_be_found" in why and "could not be loaded" in why and why in raised


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_use_backend_is_of_its_thread(calls: Calls) -> None:
    inside, done = threading.Barrier(len(NAMES)), threading.Barrier(len(NAMES))

    def other(name: str) -> tuple[str, str]:
        with dualop.use_backend(name):
            inside.wait()  # all are in their blocks now
            within = registry.requested()
            done.wait()
        return within, registry.requested()

    with ThreadPoolExecutor(len(NAMES)) as pool:
        assert list(pool.map(other, NAMES)) == [(name, "auto") for name in NAMES]
    with dualop.use_backend("cuda"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(registry.requested).result() == "auto"


def test_threads_that_leave_in_turn_leave_nothing_behind(fresh_compiler: None, calls: Calls) -> None:
    """The second to enter is the last to leave: no choice of theirs may stay for what is compiled afterwards."""
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with dualop.use_backend("triton"):
            entered.set()
            left.wait(60)

    first = dualop.use_backend("cuda")
    first.__enter__()
    thread = threading.Thread(target=second)
    thread.start()
    entered.wait(60)
    first.__exit__(None, None, None)
    left.set()
    thread.join()
    compiled = torch.compile(lambda x, b: OP(x, b), backend="aot_eager", fullgraph=True)
    assert chosen(calls, lambda: compiled(X, B)) == "reference"


# ---- compiled functions ----------------------------------------------------------------------------------------------


def test_a_compiled_function_honours_every_way_to_choose(fresh_compiler: None, calls: Calls) -> None:
    compiled = torch.compile(lambda x, b: OP(x, b) * 2, backend="aot_eager", fullgraph=True)
    assert chosen(calls, lambda: compiled(X, B)) == "reference"
    with dualop.use_backend("cuda"):
        assert chosen(calls, lambda: compiled(X, B)) == "cuda"
        with dualop.use_backend("triton"):
            assert chosen(calls, lambda: compiled(X, B)) == "triton"
        assert chosen(calls, lambda: compiled(X, B)) == "cuda"
    assert chosen(calls, lambda: compiled(X, B)) == "reference"
    dualop.set_backend("triton")
    assert chosen(calls, lambda: compiled(X, B)) == "triton"
    named = torch.compile(lambda x, b: OP(x, b, backend="cuda"), backend="aot_eager", fullgraph=True)
    assert chosen(calls, lambda: named(X, B)) == "cuda"


def test_use_backend_inside_a_compiled_function(fresh_compiler: None, calls: Calls) -> None:
    def function(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with dualop.use_backend("cuda"):
            return OP(x, b) * 2

    compiled = torch.compile(function, backend="aot_eager")
    assert chosen(calls, lambda: compiled(X, B)) == "cuda"
    assert chosen(calls, lambda: OP(X, B)) == "reference"


def test_a_compiled_function_refuses_as_an_eager_one(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"], "reasons", lambda *_: ["no triton here"])
    compiled = torch.compile(lambda x, b: OP(x, b, backend="triton"), backend="aot_eager", fullgraph=True)
    with pytest.raises(BackendUnavailable, match="no triton here"):
        compiled(X, B)


# ---- the choice travels with the autograd node -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_backward_runs_where_forward_ran(name: str, calls: Calls) -> None:
    x, b = X.clone().requires_grad_(), B.clone().requires_grad_()
    with dualop.use_backend(name):
        y = OP(x, b)
    other = "triton" if name == "cuda" else "cuda"
    with dualop.use_backend(other):
        y.sum().backward()
    assert calls == [(name, "forward"), (name, "backward")]


def test_backward_in_another_thread(calls: Calls) -> None:
    x = X.clone().requires_grad_()
    with dualop.use_backend("cuda"):
        y = OP(x, B)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: y.sum().backward()).result()
    assert calls == [("cuda", "forward"), ("cuda", "backward")]


def test_auto_is_resolved_once(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" chose in forward holds in backward, whatever has become available or unavailable meanwhile."""
    x = X.clone().requires_grad_()
    y = OP(x, B)
    monkeypatch.setattr(type(BACKENDS["cuda"]), "interpreted", property(lambda _: False))
    assert dualop.explain(OP, X, B).chosen == "cuda"
    y.sum().backward()
    assert calls == [("reference", "forward"), ("reference", "backward")]


def test_compiled_backward_runs_where_forward_ran(fresh_compiler: None, calls: Calls) -> None:
    x = X.clone().requires_grad_()
    compiled = torch.compile(lambda x, b: OP(x, b) * 2, backend="aot_eager", fullgraph=True)
    with dualop.use_backend("triton"):
        y = compiled(x, B)
    with dualop.use_backend("cuda"):
        y.sum().backward()
    assert calls == [("triton", "forward"), ("triton", "backward")]


def test_checkpoint_recomputes_on_the_same_backend(calls: Calls) -> None:
    """The recomputation happens in backward, outside of the block."""
    from torch.utils.checkpoint import checkpoint

    x = X.clone().requires_grad_()
    y = checkpoint(lambda x: OP(x, B, backend="cuda"), x, use_reentrant=False)
    y.sum().backward()
    assert calls == [("cuda", "forward"), ("cuda", "forward"), ("cuda", "backward")]
