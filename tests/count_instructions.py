"""Count the machine instructions of a chain's kernels an element, by class, on a machine without a GPU.

    python tests/count_instructions.py "mish | mish" float32 [--rows 16384] [--cols 8192] [--arch 90]

A backward is counted in its largest loop, a forward as a whole; both are divided by the elements that a thread handles
in one pass. What a loop calls outside of itself (the slow path of a division) is not in its count; `calls` are. The
last columns are the cycles of a multiprocessor for 32 elements by the tightest of its units: four instructions are
issued a cycle, MUFU (ex2, rcp, tanh) and conversions take a warp two cycles in each quarter, everything else one.
It must run without DUALOP_INTERPRET.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from compile_triton import launches, specialised
from named import parse
from triton.backends.compiler import GPUTarget

import dualop.backends.cuda as cuda
from dualop.backends import triton as triton_backend
from dualop.build import build, toolchain
from dualop.launch.layout import layout_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CLASSES = {
    "MUFU": "special",
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"), "float"),
    **dict.fromkeys(("F2F", "F2FP", "HADD2", "F2I", "I2F", "I2FP", "PRMT", "FRND"), "convert"),
    **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDGSTS", "LDC", "ULDC", "LDL", "STL"), "memory"),
    **dict.fromkeys(("BRA", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC", "EXIT"), "branch"),
}
LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)([^;]*);")

Instruction = tuple[int, str, str]  # address, name, operands


def disassembled(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each function of a cubin."""
    command = [str(TOOLS / "nvdisasm"), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        name, rest = part.split(":", 1)
        labels, pending, listed = {}, [], []
        for line in rest.splitlines():
            if label := re.match(r"^\s*(\.L_x_\d+):", line):
                pending.append(label[1])
            elif match := LINE.search(line):
                address = int(match[1], 16)
                labels |= dict.fromkeys(pending, address)
                pending = []
                listed.append((address, match[2], match[3]))
        for i, (address, instruction, operands) in enumerate(listed):
            if target := re.search(r"`\((\.L_x_\d+)\)", operands):
                listed[i] = (address, instruction, f"->{labels.get(target[1], -1)}")
        found[name] = listed
    return found


def loop(listed: list[Instruction]) -> list[Instruction]:
    """The largest loop that is no other's: from the target of a jump back to the jump."""
    spans = []
    for address, name, operands in listed:
        target = re.search(r"->(\d+)", operands)
        if name == "BRA" and target and int(target[1]) < address:
            spans.append((int(target[1]), address))
    if not spans:
        return listed
    count = lambda s: sum(s[0] <= a <= s[1] and n in ("MUFU", "FFMA", "FMUL", "FADD") for a, n, _ in listed)
    low, high = max(spans, key=count)
    return [i for i in listed if low <= i[0] <= high]


def counted(listed: list[Instruction], elements: int) -> dict[str, float]:
    kinds = Counter(CLASSES.get(name, "integer, select, compare") for _, name, _ in listed if name != "NOP")
    per = {kind: n / elements for kind, n in sorted(kinds.items())}
    per["all"] = sum(per.values())
    per["calls"] = sum(name == "CALL" for _, name, _ in listed) / elements
    slow = per.get("special", 0.0) + sum(n in ("F2F", "F2I", "I2F") for _, n, _ in listed) / elements
    per["cycles: issue"], per["cycles: special"] = per["all"] / 4, slow * 2
    return per


def of_cuda(op, tensors, arch):
    """(kernel, instructions, elements a pass, what ptxas says) of forward and backward with 16-byte accesses."""
    x, *operands = tensors
    layout = layout_of(x, operands)
    text = cuda.source(op, cuda._signature(layout, [t.dtype for t in tensors]), host=False)
    folder = Path(tempfile.mkdtemp())
    (folder / "kernels.cu").write_text(text)
    home = toolchain.cuda_home()
    assert home
    command = [str(home / "bin" / "nvcc"), *build.CUDA_FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", "kernels.cubin"]
    ran = subprocess.run([*command, "kernels.cu"], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said = {
        m[1]: " ".join(m[2].split())
        for m in re.finditer(r"Compiling entry function '(\w+)'.*?\n.*?\n\s*(.*?Used \d+ registers)", ran.stderr, re.S)
    }
    wide = 16 // layout.dtype.itemsize
    for name, listed in disassembled(folder / "kernels.cubin").items():
        if f"ELi{wide}EEEv" not in name or "sum_kernel" in name:
            continue
        way = "forward" if "forward_kernel" in name else "backward"
        cut = cuda.Cuda().heuristic(op, layout, way)
        yield f"cuda {way}", listed, cut.rows * wide, said.get(name, "")


def of_triton(problem, arch):
    for kernel, arguments, options in launches(problem):
        if kernel.fn.__name__ == "sum_kernel":
            continue
        built = triton.compile(specialised(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            ((_, listed),) = disassembled(Path(file.name)).items()
            command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        tile = arguments["BLOCK_ROWS"] * arguments["BLOCK_COLS"] // (32 * options["num_warps"])
        said = " ".join(re.findall(r"(?:REG|STACK|LOCAL|SHARED):\d+", usage))
        way = kernel.fn.__name__.removesuffix("_kernel")
        yield f"triton {way}", listed, tile, f"{said} {built.metadata.shared} bytes shared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chain")
    parser.add_argument("dtype")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--cols", type=int, default=8192)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--listing", help="print the instructions of this kernel, such as 'cuda backward'")
    given = parser.parse_args()
    op, dtype = parse(given.chain), getattr(torch, given.dtype)
    shapes = [(given.rows, given.cols), *[(given.cols,)] * len(op.operands)]
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    problem = dict(chain=given.chain, shapes=shapes, dtypes=[given.dtype] * len(shapes))
    triton_backend.multiprocessors = cuda.multiprocessors = lambda device: 132
    triton_backend._shared = lambda device: (227 << 10) - triton_backend.RESERVED
    for source in (of_cuda(op, tensors, given.arch), of_triton(problem, given.arch)):
        for name, listed, elements, said in source:
            inner = loop(listed) if name.endswith("backward") else listed
            if given.listing == name:
                print("\n".join(f"{a:05x} {n}{o}" for a, n, o in inner))
            figures = "  ".join(f"{kind} {n:.2f}" for kind, n in counted(inner, elements).items())
            print(f"{given.chain}, {given.dtype}, {name}: {elements} elements a pass  {figures}  [{said}]")


if __name__ == "__main__":
    main()
