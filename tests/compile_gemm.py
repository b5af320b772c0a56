"""Compile the fused matrix product for sm_90 on a machine without a GPU: prints a JSON list, a row for each kernel.

    python tests/compile_gemm.py

It must run without TRITON_INTERPRET; the Triton is the one that PYTHONPATH gives.
"""

from __future__ import annotations

import json
import re

import torch
import triton
from compile_triton import TYPES, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dualop
from dualop import linear as gemm

CHAIN = "add(bias) | add | swish | tanh | gelu | hardtanh(-1, 1)"


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """As Triton's launcher specialises it: ones are constants, multiples of 16 and tensors are known to be aligned."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[i,] = "constexpr", value
        elif hasattr(value, "block_shape"):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = TYPES[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(dtype: torch.dtype, depth: int) -> dict:
    empty = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")
    x, weight, y, operands = empty(4096, depth), empty(8192, depth), empty(4096, 8192), [empty(8192), empty(8192)]
    op = dualop.chain(CHAIN)
    kernel, _, arguments, constants, options = gemm.prepared(op, x, weight, y, operands, gemm.TILE)
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    built = triton.compile(source(kernel, bound), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    return {
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "descriptors": constants["DESCRIPTORS"],
        "shared": built.metadata.shared,
        "warps": options["num_warps"],
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tensor_copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        **resources(ptx, 90),
    }


if __name__ == "__main__":
    kinds = [(torch.bfloat16, 1024), (torch.bfloat16, 1001), (torch.float16, 1024), (torch.float32, 1024)]
    print(json.dumps([compiled(*kind) for kind in kinds]))
