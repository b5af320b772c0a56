"""The text of emitted files: KernelBench's rules, what is in it, and that it compiles for a GPU as it is."""

from __future__ import annotations

import ast
import builtins
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_emit import on_host

import dualop
from dualop.build import build, toolchain
from dualop.cli.options import dtypes
from dualop.emit.file import emit, parse_operands
from dualop.errors import BackendUnavailable, ChainError, DtypeError, OperandError, ShapeError
from dualop.language.stages import STAGES

BACKENDS = ("cuda", "triton")

# ---- rules and contents ----------------------------------------------------------------------------------------------


def broken_rules(text: str, backend: str) -> list[str]:
    """What KernelBench's static checker would say; stricter, in that comments count for what must not be there."""
    forbidden = (r"\btry\b", r"\bexcept\b", r"\bpass\b", r"\bthreading\b", "multiprocessing", r"concurrent\.futures",
                 "PoolExecutor", "_make_subclass", r"class\s+\w+.*\((torch\.)?Tensor\)", r"torch\.Tensor\.__new__",
                 r"(Event|synchronize|perf_counter|time\.time|elapsed_time)\s*=[^=]", r"[Ss]tream\s*\(\)",
                 r"torch\.nn\.(?!(Module|Parameter)\b)", r"torch\.nn\.functional", r"\bF\.\w+",
                 r"\.half\s*\(", "__float2half", r"\.to\(torch\.float16", "import dualop",
                 "from dualop")  # fmt: skip
    code = "\n".join(re.split("#|//", line)[0] for line in text.splitlines())
    required = {
        "cuda": ("__global__", "load_inline", r"\bthreadIdx\.", r"__shared__\s+", "ModelNew"),
        "triton": (
            r"@triton\.jit",
            r"\btl\.\w+",
            r"tl\.load\s*\(",
            r"tl\.store\s*\(",
            r"tl\.program_id\s*\(",
            "ModelNew",
        ),
    }[backend]
    broken = [f"{pattern}: {match[0]}" for pattern in forbidden if (match := re.search(pattern, text))]
    return broken + [f"no {pattern}" for pattern in required if not re.search(pattern, code)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_static_rules(stage: str, backend: str) -> None:
    text = emit(f"add | {STAGES[stage].example}", "linear:16x24", backend)
    assert not broken_rules(text, backend)
    assert not undefined(ast.parse(text))


def undefined(tree: ast.Module) -> set[str]:
    """Names that are read somewhere and defined nowhere."""
    nodes = [*ast.walk(tree)]
    known = {n.arg for n in nodes if isinstance(n, ast.arg)} | {*dir(builtins)}
    known |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    known |= {a.asname or a.name.split(".")[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))
              for a in n.names}  # fmt: skip
    names = [n for n in nodes if isinstance(n, ast.Name)]
    known |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return {n.id for n in names} - known


def test_the_rules_can_be_broken() -> None:
    assert broken_rules(emit() + "# no pass", "cuda") == [r"\bpass\b: pass"]
    assert "no __global__" in broken_rules("import torch", "cuda")
    assert undefined(ast.parse("def f(a):\n    return a + b")) == {"b"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_used_is_there_and_always_the_same(backend: str) -> None:
    text = emit(backend=backend)
    assert text == emit(dualop.chain("add | silu | tanh | gelu | hardtanh"), "linear:8192x8192", backend, batch=1024)
    assert len(text.splitlines()) < (750 if backend == "cuda" else 600)
    code = re.sub(r"(//|#) .*", "", text)
    for other in ("softplus", "mish", "leaky_relu", "log1p", "expm1", "hardshrink", "maximum"):
        assert not re.search(rf"(?<!tl\.)\b(stage_)?{other}\b", code), other
    assert "stage_silu" in code or "struct silu" in code
    for other in (
        r"torch\.float(16|64)",
        r"(?<!b)float16",
        r"\bfrom_f16",
        r"(BITS|bits) == 53",
        r"_second\b|\bsecond\(",
    ):
        assert not re.search(other, code), other
    assert f"Written by dualop {dualop.__version__}:" in text
    assert "batch_size = 1024\nin_features = 8192\nout_features = 8192\nadd_value_shape = (out_features,)\n" in text


def test_the_command_in_the_file_writes_the_file() -> None:
    text = emit('add(a) | gelu(approximate="tanh") | mul(b)', "linear:8x8", "triton", batch=3, bias=False, linear="fc",
                shapes={"b": (), "a": (1, 8)}, dtypes=("float16",))  # fmt: skip
    words = shlex.split(text.splitlines()[3])
    assert words[:2] == ["dualop", "emit"]
    options = {words[i]: words[i + 1] for i in (2, 4, 6, 8)}
    assert words[10:] == ["--no-bias", "--linear", "fc", "--operand", "b=scalar", "--operand", "a=1x8",
                          "--dtype", "float16"]  # fmt: skip
    shapes = parse_operands(["b=scalar", "a=1x8"])
    again = emit(options["--chain"], options["--model"], options["--backend"], batch=int(options["--batch"]),
                 bias=False, linear="fc", shapes=shapes, dtypes=dtypes("float16"))  # fmt: skip
    assert again == text


# ---- compiling -------------------------------------------------------------------------------------------------------


TYPES = {
    "float32": ("float", "float", 24, 4),
    "bfloat16": ("bfloat16", "float", 8, 8),
    "float16": ("float16", "float", 11, 8),
    "float64": ("double", "double", 53, 2),
}


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16",), ("float64", "float16")], ids="-".join)
@pytest.mark.parametrize("first", range(0, len(STAGES), 8))
def test_trimmed_kernels_compile(first: int, dtypes: tuple[str, ...], tmp_path: Path) -> None:
    """Some stages at a time, so that each is there without most others."""
    chain = " | ".join(stage.example for stage in list(STAGES.values())[first : first + 8])
    compile_on_host(emit(chain, "linear:8x8", "cuda", dtypes=dtypes), dtypes[0], tmp_path)


@pytest.mark.parametrize("stage", ["relu6", "selu", "gelu", "celu", "clamp", "hardsigmoid"])
def test_a_stage_alone_compiles(stage: str, tmp_path: Path) -> None:
    """Of stages that take another one, a constant or a function of their own dtype."""
    compile_on_host(emit(f"add | {STAGES[stage].example}", "linear:8x8", "cuda"), "bfloat16", tmp_path)


def compile_on_host(text: str, dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "source.cpp"
    start = text.index('r"""') + 4
    names = ("DTYPE", "ARITHMETIC", "BITS_", "VEC", "SUM_Y", "FORWARD_CUT", "BACKWARD_CUT")
    values = (*TYPES[dtype], 4, "Cut<2, 32, 8, 6, 1, 1>", "Cut<2, 32, 8, 4, 1, 2>")
    defined = "".join(f"#define {name} {value}\n" for name, value in zip(names, values, strict=True))
    source.write_text(defined + on_host(text[start : text.index('"""', start)]))
    command = [str(toolchain.find_cxx()), "-std=c++17", "-fsyntax-only", "-Wall", "-Wno-unknown-pragmas", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


@pytest.mark.skipif(toolchain.cuda_home() is None, reason="no nvcc")
def test_its_own_load_inline_builds_it(tmp_path: Path) -> None:
    """In a process of its own, executed as a string, for sm_90, any warning an error; then its library is loaded."""
    (tmp_path / "model.py").write_text(emit())
    for name in ("c10_cuda", "torch_cuda"):  # torch has none on a machine without a GPU
        (tmp_path / f"lib{name}.a").write_bytes(build.EMPTY_ARCHIVE)
    home = toolchain.cuda_home()
    runtime = next(path for path in home.glob("**/libcudart.so") if "stubs" not in path.parts)
    code = (
        "import ctypes, sys, torch\n"
        f"ctypes.CDLL({str(runtime)!r}, ctypes.RTLD_GLOBAL)\n"
        f"import torch.utils.cpp_extension\ntorch.utils.cpp_extension.CUDA_HOME = {str(home)!r}\n"
        "names = {}\nexec(open(sys.argv[1]).read(), names)\n"
        "library = names['library'](torch.bfloat16)\nlibrary.dualop_forward, library.dualop_backward\nprint('built')\n"
    )
    environment = {
        **os.environ,
        "LIBRARY_PATH": f"{tmp_path}:{runtime.parent}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "NVCC_APPEND_FLAGS": "-Werror all-warnings",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    command = [sys.executable, "-c", code, str(tmp_path / "model.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "built" in done.stdout, done.stdout + done.stderr


# Compiles what a Triton file launches in a training step, with the arguments that it passes, in place of launching it.
COMPILE = """
import contextlib, importlib.util, inspect, sys, types
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("model", sys.argv[1])
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(**PROPERTIES)
PROPERTIES = {"multi_processor_count": 132, "major": 9, "shared_memory_per_block_optin": 227 << 10}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}

class Launch:
    def __init__(self, name):
        self.kernel = getattr(model, name)
        setattr(model, name, self)
    def __getitem__(self, grid):
        return self.compile
    def compile(self, *positional, **named):
        parameters = inspect.signature(self.kernel.fn)
        signature, constants = {}, {}
        options = {name: named.pop(name) for name in [*named] if name not in parameters.parameters}
        for i, (name, value) in enumerate(parameters.bind(*positional, **named).arguments.items()):
            if parameters.parameters[name].annotation is tl.constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[i,] = "constexpr", value
            else:
                signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        built = triton.compile(
            ASTSource(fn=self.kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options=options,
        )
        print(self.kernel.fn.__name__, len(built.asm["cubin"]))

for name in ("forward_kernel", "backward_kernel", "sum_kernel"):
    Launch(name)
for dtype in POINTERS:
    ours = model.ModelNew(*model.get_init_inputs()).to(dtype)
    ours(model.get_inputs()[0].to(dtype)).sum().backward()
"""


def test_triton_compiles_what_it_launches(tmp_path: Path) -> None:
    """For sm_90, without the interpreter, which accepts more."""
    (tmp_path / "model.py").write_text(emit(model="linear:64x512", backend="triton", batch=4096))
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DUALOP_INTERPRET")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "model.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == 2 * [
        "forward_kernel",
        "backward_kernel",
        "sum_kernel",
    ]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ChainError, "unknown stage", dict(chain="ad")),
        (BackendUnavailable, "no file can be emitted for backend 'reference'", dict(backend="reference")),
        (ShapeError, "write linear:INxOUT", dict(model="linear:8")),
        (ShapeError, "write linear:INxOUT", dict(model="linear:8x0")),
        (ShapeError, "batch 0", dict(batch=0)),
        (DtypeError, "unknown dtype 'float8'; there are float32", dict(dtypes=("float8",))),
        (DtypeError, "unknown dtype ''", dict(dtypes=())),
        (OperandError, "has no operand bias; it takes add", dict(shapes={"bias": (8192,)})),
        (OperandError, r"has the shape \(8192, 1\)", dict(shapes={"add": (8192, 1)})),
        (OperandError, r"has the shape \(1, 1, 8192\)", dict(shapes={"add": (1, 1, 8192)})),
        (
            OperandError,
            r"\(3, 1, 4, 1, 1\) on \(3, 16, 4, 5, 8192\); an emitted file takes operands that vary along",
            dict(model="input:3x16x4x5x8192", shapes={"add": (3, 1, 4, 1, 1)}),
        ),
        (OperandError, "the operand forward cannot be", dict(chain="add(forward)")),
        (OperandError, "the operand matmul cannot be", dict(chain="add(matmul)")),
        (OperandError, "cannot be the parameter add_value", dict(chain="add | mul(add_value)")),
        (OperandError, "cannot be called 'not a name'", dict(linear="not a name")),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        emit(**arguments)


@pytest.mark.parametrize("text", ["scale", "scale=", "scale=1x", "scale=-1", "a b=1"])
def test_shapes_of_the_command_line(text: str) -> None:
    with pytest.raises(ShapeError, match="is not NAME=SHAPE"):
        parse_operands([text])
