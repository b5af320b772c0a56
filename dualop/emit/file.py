"""Write one self-contained file of a model with a fused tail, in the form that KernelBench takes.

    text = emit("add | swish | tanh | gelu | hardtanh(-1, 1)", "linear:8192x8192", "cuda")

The file needs torch alone (and nvcc or triton, depending on the backend). It has `ModelNew`, `get_inputs` and
`get_init_inputs`, kernels for this layout alone, and a small autograd.Function around them.
Its form follows KernelBench's rules: it handles no exceptions, draws weights in the order of the written-out model, and
shows its kernels. It can be executed as a string (CUDA) or imported as a module (either backend).
"""

from __future__ import annotations

import keyword
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

import dualop
from dualop.emit import cuda as emit_cuda
from dualop.emit import plan as plans
from dualop.emit import triton as emit_triton
from dualop.emit.template import Value, filled
from dualop.errors import BackendUnavailable, DtypeError, OperandError, ShapeError
from dualop.language.stages import argument_text
from dualop.nn import parameter_name, starts_with_add, with_bias
from dualop.numerics.cases import DEFAULT_CHAIN, DTYPES
from dualop.op.callable import Chain
from dualop.op.callable import chain as make_chain

DEFAULT_MODEL, DEFAULT_BATCH = "linear:8192x8192", 1024  # with the default chain: KernelBench level 2, problem 95
DEFAULT_DTYPES = ("float32", "bfloat16")

Shape = tuple[int, ...]
# The kernel languages that a file can be written in, by their backends: what a reader calls them, and who writes it.
LANGUAGES = {"cuda": ("CUDA", emit_cuda.emitted), "triton": ("Triton", emit_triton.emitted)}


@dataclass(frozen=True)
class Model:
    """Describe what precedes the tail: a Linear, or nothing (then `linear` is "" and `shape` is that of x)."""

    shape: Shape
    linear: str = ""
    bias: bool = True

    @property
    def columns(self) -> int:
        return self.shape[-1]


def emit(
    chain: str | Chain = DEFAULT_CHAIN,
    model: str = DEFAULT_MODEL,
    backend: str = "cuda",
    *,
    batch: int = DEFAULT_BATCH,
    bias: bool = True,
    linear: str = "matmul",
    shapes: Mapping[str, Shape] | None = None,
    dtypes: Sequence[str] = DEFAULT_DTYPES,
) -> str:
    """Return the text of the file; the same arguments give the same text.

    `model` is linear:INxOUT, for nn.Linear(IN, OUT, bias) under the name `linear` and inputs of (batch, IN), or
    input:AxBx..., for the chain alone on inputs of this shape. An operand is a parameter, drawn by torch.randn, with
    the shape that `shapes` has for it, or (OUT,): any that broadcasts with (batch, OUT) or AxBx... and varies along
    neighbouring dimensions, such as a channel (C, 1, 1), a row (B, 1) or a number (). Its name is that of dualop.nn.
    The launch is decided here, for `batch` and an H100 or H200. The file takes any batch, unless an operand has the
    size of one, and for the rest these sizes and `dtypes` only. Raises ChainError, ShapeError, DtypeError,
    OperandError, BackendUnavailable.
    """
    op, given = make_chain(chain), dict(shapes or {})
    if backend not in LANGUAGES:
        raise BackendUnavailable(f"no file can be emitted for backend {backend!r}; there are {', '.join(LANGUAGES)}")
    for dtype in dtypes or [""]:
        if dtype not in DTYPES:
            raise DtypeError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    spec = _model(model, linear, bias, batch)
    if unknown := given.keys() - set(op.operands):
        raise OperandError(f"`{op}` has no operand {', '.join(sorted(unknown))}; it takes {', '.join(op.operands)}")
    every = tuple(tuple(given.get(name, (spec.columns,))) for name in op.operands)
    for i, name in enumerate(op.operands):
        _check(name, [linear, *map(parameter_name, op.operands[:i])])

    values = [f"self.{parameter_name(name)}" for name in op.operands]
    tail, shape, tensors = op, (batch, spec.columns) if spec.linear else spec.shape, list(every)
    z, folded, forward = "x", with_bias(op) if spec.linear and bias else None, []
    if spec.linear:
        z = f"self.{linear}(x)" if bias and folded is None else f"x @ self.{linear}.weight.t()"
    if folded is not None and starts_with_add(op) and every[0] == (spec.columns,):
        forward = [
            f"# The Linear's bias and {values[0].removeprefix('self.')} are added up first: one gradient is both's."
        ]
        values[0] = f"self.{linear}.bias + {values[0]}"
    elif folded is not None:
        tail, values, tensors = folded, [f"self.{linear}.bias", *values], [(spec.columns,), *every]
    names = [parameter_name(name) for name in tail.operands]
    plan = plans.plan(shape, dict(zip(tail.operands, tensors, strict=True)), [DTYPES[d] for d in dtypes])

    command = ["dualop", "emit", "--chain", str(op), "--model", model, "--backend", backend]
    command += ["--batch", str(batch)] if spec.linear else []
    command += [] if bias or not spec.linear else ["--no-bias"]
    command += ["--linear", linear] if spec.linear and linear != "matmul" else []
    command += [word for n, s in given.items() for word in ("--operand", f"{n}={shape_text(s)}")]
    command += ["--dtype", ",".join(dtypes)] if tuple(dtypes) != DEFAULT_DTYPES else []
    language, written = LANGUAGES[backend]
    return filled(
        "model.py.in",
        WHAT=f"{op}{' behind a Linear' if spec.linear else ''}",
        LANGUAGE=language,
        VERSION=dualop.__version__,
        COMMAND=shlex.join(command),
        KERNELS=written(tail, plan),
        CHAIN=str(tail),
        INPUTS=", ".join(("z", *names)),
        OPERANDS=", ".join(plan.names) or "there is none",
        SIZES=str(plan.sizes),
        TRAILING=str(plan.trailing) if plan.trailing else "",
        DIMENSIONS=len(plan.trailing),
        NARROW=plan.layout.narrow,
        COLS=plan.cols,
        SHAPES=", ".join(plan.sum_shape(i) for i in range(len(plan.views))),
        FORWARD=[*forward, f"return Tail.apply({', '.join((z, *values))})"],
        **_constructor(op, spec, every),
        **_inputs(op, spec, every, batch),
    )


def parse_operands(texts: Sequence[str]) -> dict[str, Shape]:
    """Return the shapes from a command line such as `scale=1`, `shift=1x8192`, `alpha=scalar`."""
    shapes = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(scalar|\d+(?:x\d+)*)", text)
        if not match:
            raise ShapeError(f"{text!r} is not NAME=SHAPE with a shape such as 8192, 1x8192 or scalar")
        shapes[match[1]] = () if match[2] == "scalar" else tuple(map(int, match[2].split("x")))
    return shapes


def shape_text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _model(text: str, linear: str, bias: bool, batch: int) -> Model:
    match = re.fullmatch(r"(?:(linear):(\d+)x(\d+)|input:(\d+(?:x\d+)*))", text)
    sizes = [int(n) for n in re.findall(r"\d+", text)] if match else []
    if not match or 0 in sizes or batch < 1:
        raise ShapeError(f"model {text!r}, batch {batch}: write linear:INxOUT or input:AxBx..., with sizes from 1 on")
    if not match[1]:
        return Model(tuple(sizes))
    if not linear.isidentifier() or keyword.iskeyword(linear) or hasattr(nn.Module(), linear):
        raise OperandError(f"the Linear cannot be called {linear!r} in a module: choose another name")
    return Model(tuple(sizes), linear, bias)


def _check(operand: str, taken: Sequence[str]) -> None:
    name = parameter_name(operand)
    if keyword.iskeyword(name) or hasattr(nn.Module(), name) or name in taken:
        raise OperandError(f"the operand {operand} cannot be the parameter {name}: write another name into the chain")


def _constructor(chain: Chain, model: Model, shapes: Sequence[Shape]) -> dict[str, Value]:
    """Return the code for ModelNew's parameters and their use, with weights in the order of the written-out model."""
    names = [parameter_name(name) for name in chain.operands]
    parameters = ["self", *(("in_features", "out_features") if model.linear else ()), *(f"{n}_shape" for n in names)]
    numbers = [a for call in chain.calls for a in call.arguments if isinstance(a, float) and math.isfinite(a)]
    body = []
    if numbers:
        parameters.append("*numbers")
        known = ", ".join(dict.fromkeys(map(argument_text, numbers)))
        body += [
            f"if not set(numbers) <= {{{known}}}:",
            '    raise ValueError(f"{numbers} are not the numbers that are compiled into the kernels")',
        ]
    if model.linear:
        bias = "" if model.bias else ", bias=False"
        body.append(f"self.{model.linear} = nn.Linear(in_features, out_features{bias})")
    for name, shape in zip(names, shapes, strict=True):
        body.append(f"self.{name} = nn.Parameter(torch.randn({name}_shape))")
        body += [
            f"if self.{name}.shape != {shape}:",
            f'    raise ValueError(f"{name}_shape {{{name}_shape}} needs other kernels")',
        ]
    return {"PARAMETERS": ", ".join(parameters), "INIT": body}


def _inputs(chain: Chain, model: Model, shapes: Sequence[Shape], batch: int) -> dict[str, Value]:
    names = [f"{parameter_name(name)}_shape" for name in chain.operands]
    if model.linear:
        lines = [f"batch_size = {batch}", f"in_features = {model.shape[0]}", f"out_features = {model.shape[1]}"]
    else:
        lines = [f"shape = {model.shape}"]
    for name, shape in zip(names, shapes, strict=True):
        lines.append(f"{name} = {'(out_features,)' if model.linear and shape == model.shape[1:] else shape}")
    return {
        "INPUT_SIZES": lines,
        "GET_INPUTS": "torch.rand(batch_size, in_features)" if model.linear else "torch.rand(shape)",
        "GET_INIT_INPUTS": ", ".join([*(("in_features", "out_features") if model.linear else ()), *names]),
    }
