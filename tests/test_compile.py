"""Every kernel template compiled for sm_80, sm_90 and sm_100, on a machine without a GPU.

CUDA: nvcc, with no spills and no stack frame. Triton: to PTX and cubin, with the installed release and with the oldest
supported one, whose folder DUALOP_TRITON36 names. Registers go to `registers/` in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from named import parse
from test_stages import cuda_stages

import dualop
from dualop.backends.cuda import _signature as signature_of
from dualop.backends.cuda import source
from dualop.build import build, cache, toolchain
from dualop.language.program import steps
from dualop.language.stages import STAGES
from dualop.launch.layout import layout_of

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "float16", "bfloat16", "float64")
DEFAULT = "add | swish | tanh | gelu | hardtanh(-1, 1)"

# ---- what is compiled ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A chain on inputs of these shapes; x first. One dtype, or one an input."""

    name: str
    chain: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @property
    def all_dtypes(self) -> tuple[str, ...]:
        return self.dtypes * (len(self.shapes) if len(self.dtypes) == 1 else 1)

    def signature(self) -> Any:
        """As the CUDA backend makes it of tensors."""
        kinds = [getattr(torch, d) for d in self.all_dtypes]
        x, *operands = [torch.empty(s, dtype=t, device="meta") for s, t in zip(self.shapes, kinds, strict=True)]
        layout = layout_of(x, operands, [True] * len(kinds))
        return signature_of(layout, kinds, [True] * (1 + len(kinds)))


X = (2048, 8192)
# The forms of an operand, each a kind of view.
FORMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "features": (X, (8192,)),
    "channel": ((32, 64, 56, 56), (64, 1, 1)),
    "full": (X, X),
    "scalar": (X, ()),
}
MORE_FORMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "per row": (X, (2048, 1)),
    "position": ((64, 128, 1024), (128, 1024)),
    "x broadcast": ((8192,), X),
    "two rows": ((64, 8, 16, 1024), (64, 1, 16, 1)),
    "odd features": ((2048, 1001), (1001,)),
    "odd channels": ((64, 256, 7, 7), (256, 1, 1)),
    "odd rows": ((2047, 1001), (2047, 1)),
    "channels": ((64, 256, 28, 28), (256, 1, 1)),
}
# All stages of the table, a few a chain. A number in between keeps intervals from simplifying the next stage away.
EXAMPLES = [stage.example for stage in STAGES.values() if not stage.operand]
GROUPS = {
    "operands": "add(a) | mul(b) | sub(a) | div(b) | rsub(a) | minimum(b) | maximum(a)",
    **{f"stages {i + 1}": " | sub(0.1) | ".join(EXAMPLES[i : i + 8]) for i in range(0, len(EXAMPLES), 8)},
    "gelus": 'gelu(approximate="tanh") | silu | tanh | sub(1) | hardtanh | gelu | mul(x) | add(2) | tanh | gelu | mish',
}
# The same of those that have a second derivative, in double backward.
CURVED = [text for text in EXAMPLES if any(call.stage.curved for call in dualop.chain(text).calls)]
SLOPES = {
    **{f"slope {i + 1}": f"slope of {' | sub(0.1) | '.join(CURVED[i : i + 6])}" for i in range(0, len(CURVED), 6)},
    "slope of gelus": 'slope of gelu("tanh") | tanh | sub(1) | hardtanh | gelu | mish',
}


def group_shapes(chain: str) -> tuple[tuple[int, ...], ...]:
    return (X, *[(8192,), ()][: len(dualop.chain(chain).operands)])


PROBLEMS = [
    *[Problem(f"{form}, {t}", DEFAULT, shapes, (t,)) for form, shapes in FORMS.items() for t in DTYPES],
    *[
        Problem(f"{form}, {t}", DEFAULT, s, (t,))
        for (form, s), t in zip(MORE_FORMS.items(), [*DTYPES, *DTYPES], strict=True)
    ],
    Problem("mixed", DEFAULT, FORMS["features"], ("bfloat16", "float32")),
    *[Problem(f"{name}, {t}", text, group_shapes(text), (t,)) for name, text in GROUPS.items() for t in DTYPES],
    *[Problem(f"slope, {t}", "slope of silu | tanh | gelu | hardtanh", (X, X), (t,)) for t in DTYPES],
    *[Problem(f"{name}, {t}", text, (X, X), (t,)) for name, text in SLOPES.items() for t in ("float32", "float64")],
]


def test_every_function_of_the_kernels_is_compiled() -> None:
    compiled = {step.function for problem in PROBLEMS for step in steps(parse(problem.chain))}
    assert compiled >= {name for name, _ in cuda_stages()}


# ---- CUDA ------------------------------------------------------------------------------------------------------------

ENTRY = re.compile(
    r"Compiling entry function '\w*?(?P<kernel>forward|backward|sum)_kernel\w*' for 'sm_(?P<architecture>\d+)'"
    r"(?:(?!Compiling).)*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads(?:(?!Compiling).)*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def nvcc(text: str, folder: Path) -> str:
    """What ptxas says of every kernel in `text`; kept in the cache by content."""
    home = toolchain.cuda_home()
    if home is None:
        pytest.skip("no nvcc")
    compiler = home / "bin" / "nvcc"
    key = hashlib.sha256(f"{text}{compiler.resolve()}{compiler.stat().st_mtime_ns}".encode()).hexdigest()[:24]
    log = cache.folder() / "ptxas" / f"{key}.log"
    if log.exists():
        return log.read_text()
    path = folder / "kernels.cu"
    path.write_text(text)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [str(compiler), *build.CUDA_FLAGS, *targets, "-c", str(path), "-o", str(folder / "kernels.o")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    log.parent.mkdir(parents=True, exist_ok=True)
    written = log.with_suffix(f".{os.getpid()}")
    written.write_text(ran.stdout + ran.stderr)
    written.replace(log)
    return log.read_text()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_cuda_without_spills_and_stack_frames(problem: Problem, tmp_path: Path, record_property: Any) -> None:
    said = nvcc(source(parse(problem.chain), problem.signature(), host=False), tmp_path)
    assert "warning" not in said, said
    kernels = [match.groupdict() for match in ENTRY.finditer(said)]
    # Forward (not of a slope), backward, and the sum of partial sums.
    assert len(kernels) == len(ARCHITECTURES) * (2 if problem.name.startswith("slope") else 3)
    name = re.sub(r"[^a-z0-9]+", "-", problem.name)
    rows = [f"{problem.name}\tsm_{k['architecture']}\t{k['kernel']}\t{k['registers']}" for k in kernels]
    folder = cache.folder() / "registers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"cuda-{name}.tsv").write_text("\n".join(rows) + "\n")
    record_property("registers", "; ".join(rows))
    # Five to eight float64 stages in a row, which nobody writes, may need a few more than the 255 registers there are.
    most = 32 if problem.name.startswith("stages") and problem.all_dtypes[0] == "float64" else 0
    assert not [k for k in kernels if max(int(k["stack"]), int(k["stores"]), int(k["loads"])) > most]


# ---- Triton ----------------------------------------------------------------------------------------------------------


def architectures(problem: Problem) -> tuple[int, ...]:
    """All where the memory accesses differ most; the mathematics alone compiles for one as for the others."""
    return ARCHITECTURES if problem.name.startswith(("features", "channel, bfloat16")) else (90,)


# Forms are the same memory accesses in every dtype of a size.
TRITON_PROBLEMS = [
    dict(name=p.name, chain=p.chain, dtypes=p.all_dtypes, shapes=p.shapes, architectures=architectures(p))
    for p in PROBLEMS
    if p.chain != DEFAULT or p.name.startswith("features") or p.all_dtypes[0] == "bfloat16"
]


def compile_triton(folder: Path, triton: str | None) -> list[dict[str, Any]]:
    """The rows of tests/compile_triton.py in a process of its own, with the Triton in the folder `triton`."""
    asked, answered = folder / "problems.json", folder / "results.json"
    asked.write_text(json.dumps(TRITON_PROBLEMS))
    environment = {k: v for k, v in os.environ.items() if k not in ("DUALOP_INTERPRET", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join([*([triton] if triton else []), str(ROOT)])
    script = Path(__file__).with_name("compile_triton.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(asked), str(answered)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    return json.loads(answered.read_text())


@pytest.mark.parametrize("release", ["installed", "3.6.0"])
def test_triton_compiles(release: str, tmp_path: Path, record_property: Any) -> None:
    """Every problem compiles, and its rows are read and written 16 bytes at a time."""
    pytest.importorskip("triton")
    oldest = os.environ.get("DUALOP_TRITON36")
    if release == "3.6.0" and not oldest:
        pytest.skip("DUALOP_TRITON36 does not name a folder with triton 3.6.0 (`make test` makes one)")
    rows = compile_triton(tmp_path, oldest if release == "3.6.0" else None)
    assert release == "installed" or {row["triton"] for row in rows} == {release}

    compiled = {(row["name"], row["kernel"], row["architecture"]) for row in rows}
    for problem in TRITON_PROBLEMS:
        for architecture in problem["architectures"]:
            assert problem["name"].startswith("slope") or (problem["name"], "forward_kernel", architecture) in compiled
            assert (problem["name"], "backward_kernel", architecture) in compiled
    assert "sum_kernel" in {kernel for _, kernel, _ in compiled}
    assert all(row["cubin"] for row in rows)

    for row in rows:
        assert row["architecture"] < 90 or row["shared"] <= 227 << 10, f"more shared memory than there is: {row}"
        kernel_takes, it_is_given = row["parameters"]
        assert kernel_takes == it_is_given > 3, f"the launch in C++ does not fit: {row}"
        if row["kernel"] != "sum_kernel":
            odd = row["name"].startswith("odd rows")  # whose last access is not a whole one (docs/limits.md)
            assert odd or (row["wide_loads"] and row["wide_stores"]), f"no 16-byte accesses: {row}"
            assert not row["conversions"], f"tiles pass through shared memory: {row}"
    table = [f"{r['name']}\tsm_{r['architecture']}\t{r['kernel']}\t{r['registers']}\t{r['spills']}" for r in rows]
    folder = cache.folder() / "registers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"triton-{rows[0]['triton']}.tsv").write_text("\n".join(table) + "\n")
    record_property("registers", "; ".join(table))
