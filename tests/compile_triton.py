"""Compile the Triton backend's kernels to PTX and cubin on a machine without a GPU.

    python tests/compile_triton.py PROBLEMS.json RESULTS.json

PROBLEMS: a list of {name, chain, dtypes, shapes, architectures}, x first, then the operands. For each, the backend is
called with meta tensors up to the point where it would launch: so each kernel is compiled with the arguments that a GPU
would be given. RESULTS: for each kernel and architecture its 16-byte accesses, conversions of layout, registers and
bytes of spills.
It must run without TRITON_INTERPRET; the Triton is the one that PYTHONPATH gives.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import triton
from named import parse
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dualop.backends import triton as backend
from dualop.language.slopes import Slope
from dualop.replay import triton as native_triton

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
H200_MULTIPROCESSORS = 132
H200_SHARED = 227 << 10  # bytes of a program at most

Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]


def launches(problem: dict[str, Any]) -> list[Launch]:
    """(kernel, its arguments by name, options) of every launch in forward and backward."""
    seen: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        bound = dict(zip(kernel.arg_names, arguments, strict=False))
        bound |= {name: value for name, value in named.items() if name in kernel.arg_names}
        assert list(bound) == list(kernel.arg_names) or set(bound) == set(kernel.arg_names), "arguments do not fit"
        seen.append((kernel, bound, {k: v for k, v in named.items() if k not in kernel.arg_names}))

    JITFunction.run = record
    op = parse(problem["chain"])
    tensors = [
        torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for shape, dtype in zip(problem["shapes"], problem["dtypes"], strict=True)
    ]
    x, *operands = tensors
    gy = torch.empty_like(reduce(torch.add, operands, x) if operands else x)
    triton_backend = backend.Triton()
    if not isinstance(op, Slope):
        triton_backend.forward(op, x, operands)
    triton_backend.backward(op, gy, x, operands, [True] * len(tensors))
    return seen


def specialised(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """As Triton's launcher does: ones become constants, multiples of 16 and tensors are known to be aligned."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(ptx: str, architecture: int) -> dict[str, int]:
    """What Triton's own ptxas says."""
    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", f"-arch={name}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert numbers and registers, said
    return {"registers": int(registers[1]), "spills": int(numbers[1]) + int(numbers[2])}


def parameters(built: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """How many parameters the kernel has, and how many dualop/replay would give it."""
    entry = re.search(r"\.entry.*?\)", built.asm["ptx"], re.DOTALL)
    words = native_triton._words(built, (1,), (), arguments)
    assert entry and words
    return entry[0].count(".param"), len(words[9:])


def compiled(
    source: ASTSource, arguments: dict[str, Any], architecture: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The row of one kernel."""
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = built.asm["ptx"]
    loops = re.findall(r"scf\.for.*?scf\.yield", built.asm["ttgir"], re.DOTALL)
    return {
        "triton": triton.__version__,
        "kernel": source.fn.fn.__name__,
        "architecture": architecture,
        "wide_loads": len(re.findall(r"\bld\.global[.\w:]*\.(?:v4\.b32|v2\.b64)|\bcp\.async.*, 0x10", ptx)),
        "wide_stores": len(re.findall(r"\bst\.global[.\w:]*\.(?:v4\.b32|v2\.b64)", ptx)),
        "cubin": len(built.asm["cubin"]),
        # Of a tile, in the loop: each passes through shared memory.
        "conversions": sum(len(re.findall(r"ttg\.convert_layout .*: tensor<\d+x\d+x", loop)) for loop in loops),
        "shared": built.metadata.shared,
        "parameters": parameters(built, arguments),
        **resources(ptx, architecture),
    }


def main(problems: Path, results: Path) -> None:
    assert not backend.INTERPRET, "interpreted kernels have no PTX"
    backend.multiprocessors = lambda device: H200_MULTIPROCESSORS
    backend._shared = lambda device: H200_SHARED - backend.RESERVED
    done: dict[Any, dict[str, Any]] = {}  # problems share kernels, above all the one that sums
    rows = []
    for problem in json.loads(problems.read_text()):
        for kernel, arguments, options in launches(problem):
            for architecture in problem["architectures"]:
                if "EARLY" in arguments:
                    arguments = {**arguments, "EARLY": architecture >= 90}
                source = specialised(kernel, arguments)
                key = (source.hash(), kernel.cache_key, architecture)
                if key not in done:
                    done[key] = compiled(source, arguments, architecture, options)
                rows.append({"name": problem["name"], **done[key]})
    results.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
