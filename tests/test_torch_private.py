"""Private names of torch: where they stand, and what happens on a torch that lacks one or has it otherwise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualop import torch_private, versions

ROOT = Path(__file__).parents[1]
AT_IMPORT = tuple(p for p in torch_private.PURPOSES if p is not torch_private.DTENSOR)
NAMES = sorted({name.path for purpose in AT_IMPORT for name in purpose.names})
# Names that are still there and behave otherwise.
OTHERWISE = {
    "torch.autograd.function._SingleLevelFunction": "target = torch.autograd.Function",  # as if apply were functorch's
    "torch.autograd.forward_ad._set_fwd_grad_enabled": "import contextlib; target = lambda m: contextlib.nullcontext()",
    "torch._C._functorch.peek_interpreter_stack": "def target(): raise TypeError('gone')",
    "torch._C._len_torch_dispatch_stack": "target = lambda: 0",
    "torch._C._are_functorch_transforms_active": "target = lambda: False",
    "torch._C._dispatch_keys": "target = lambda t: kept(torch.ones(1))",
}

# Runs with a name of torch taken away, or replaced, while dualop is imported. Everything is compared with torch's own.
SCRIPT = """
import sys, warnings
sys.argv[0] = "dualop"  # the command, which imports torch later: nothing looks for its names yet
import dualop
from dualop import versions
assert "torch" not in sys.modules
import torch, torch.utils.flop_counter, torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, vmap, jvp, jacrev, hessian

path, change = sys.argv[1], sys.argv[2]
module, _, name = path.rpartition(".")
owner = sys.modules.get(module)
if owner is None:
    import importlib
    owner = importlib.import_module(module)
kept = getattr(owner, name)
if change:
    scope = dict(torch=torch, kept=kept)
    exec(change, scope)
    setattr(owner, name, scope["target"])
else:
    try:
        delattr(owner, name)
    except KeyError:  # a module that guards its attributes
        sys.modules[module] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    if change:
        versions.TORCH = ()  # a torch that nobody has tested: its names are tried out
    from dualop import torch_private
    setattr(owner, name, kept) if sys.modules[module] else sys.modules.update({module: owner})  # torch keeps its name
    import dualop, dualop.op.library
texts = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning)]
assert len(texts) == len(set(texts)) and any(f"torch {torch.__version__}" in t for t in texts), texts
if not change:
    assert any(path in t for t in texts), texts

op = dualop.chain("add | swish | tanh | mul(x)")
def ours(x, a): return op(x, a, backend=BACKEND)
def theirs(x, a): return torch.tanh((x + a) * torch.sigmoid(x + a)) * x
def same(of):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(of(ours), of(theirs), rtol=1e-9, atol=1e-9)

BACKEND = "reference"
torch.manual_seed(0)
x, a = torch.randn(4, 5, dtype=torch.double), torch.randn(5, dtype=torch.double)
xg, ag = x.clone().requires_grad_(), a.clone().requires_grad_()
one = torch.ones_like(x)
def tangents(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, one), a)).tangent
def twice(f):
    (g,) = torch.autograd.grad(f(xg, ag).sum(), xg, create_graph=True)
    return torch.autograd.grad(g.pow(2).sum(), (xg, ag))
class Sees(torch.utils.flop_counter.FlopCounterMode): pass
def under_a_mode(f):
    with Sees(display=False):
        return f(x, a)
for of in (
    lambda f: f(x, a),
    lambda f: torch.autograd.grad(f(xg, ag).sum(), (xg, ag)),
    twice,
    tangents,
    under_a_mode,
    lambda f: grad(lambda x: f(x, a).sum())(x),
    lambda f: grad(lambda x: grad(lambda x: f(x, a).sum())(x).sum())(x),
    lambda f: vmap(f, (0, None))(x, a),
    lambda f: vmap(grad(lambda x, a: f(x, a).sum()), (0, None))(x, a),
    lambda f: jvp(lambda x: f(x, a), (x,), (one,)),
    lambda f: jacrev(f)(x[0], a),
    lambda f: hessian(lambda x: f(x, a).sum())(x[0]),
    lambda f: torch.autograd.grad(f(xg, ag), xg, torch.stack([one, 2 * one]), is_grads_batched=True),
    lambda f: torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(xg, ag).sum(), (xg, ag)),
):
    same(of)
print("right")
"""


def _run(path: str, change: str = "") -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, path, change]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("right\n"), done.stderr[-3000:]


@pytest.mark.parametrize("path", NAMES)
def test_without_a_name_everything_is_right_and_a_warning_says_so(path: str) -> None:
    _run(path)


@pytest.mark.parametrize("path", OTHERWISE)
def test_with_a_name_that_behaves_otherwise_everything_is_right_and_a_warning_says_so(path: str) -> None:
    _run(path, OTHERWISE[path])


def test_each_name_has_its_reason_and_what_was_tried_instead() -> None:
    torch_private.sharding_names()
    for purpose in torch_private.PURPOSES:
        assert purpose.works and purpose.text and purpose.fallback, purpose.why_not
        assert purpose.names and all(n.reason and n.instead for n in purpose.names)
    assert len(NAMES) >= 15


def test_no_other_module_has_a_private_name() -> None:
    """Names with an underscore of `torch` and its modules, imported or read, in the library and in the bench."""
    found = []
    for file in [file for folder in ("dualop", "bench", "triton_kernels") for file in (ROOT / folder).rglob("*.py")]:
        if file.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = ""
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                text = ".".join([node.module or "", *(alias.name for alias in node.names)])
            elif isinstance(node, ast.Import):
                text = ".".join(a.name for a in node.names if a.name.split(".")[0] == "torch")
            elif isinstance(node, ast.Attribute):
                text = ast.unparse(node) if ast.unparse(node).startswith("torch.") else ""
            if re.search(r"\._[a-z]", text.replace("__", "")) or re.search(r"\._C\b", text):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {text}")
    assert not found, "\n".join(found)


def test_the_tested_versions_are_named_alike_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for name, tested in (("torch", versions.TORCH), ("triton", versions.TRITON)):
        (said,) = re.findall(rf"^tested-{name} = \[(.+)\]$", project, re.MULTILINE)
        assert tuple(versions.of(v) for v in re.findall(r'"(.+?)"', said)) == tested
    readme = (ROOT / "README.md").read_text()
    assert f"torch {versions.listed(versions.TORCH)}" in readme
    assert f"triton {versions.listed(versions.TRITON)}" in readme
    assert versions.of(torch.__version__) in versions.TORCH
