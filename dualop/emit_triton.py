"""The Triton part of an emitted file: the functions that a chain's kernels call, in one namespace, and their launch.

The chain's own file is written by `triton_kernels/generate.py`, the others are read from `triton_kernels/`. Functions
of `stages` get the prefix `stage_`, since `math` has some of the same names, and what `platform` takes from libdevice
is called there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualop.backends import triton
from dualop.chains import Chain
from dualop.layout import COLUMN, FULL
from dualop.sources import folder

_PYTHON = '''import torch
import torch.nn as nn
import triton
import triton.language as tl
@LIBDEVICE@
@SOURCE@

BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}  # significant ones of a result
WARPS, UNROLL = @WARPS@, @UNROLL@  # of a program; 16-byte accesses of a thread in a tile
PROGRAMS_PER_SM = @PROGRAMS@  # in backward, so that few partial sums are left to add up
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


def ceil_div(a, b):
    return -(-a // b)


def power_of_two(n):
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def shape_of(z):
    """z as rows and columns."""
    @SHAPE@
    return rows, cols


def cut(z, most_programs):
    """Rows and columns of a tile, programs (across, down), and the tiles (steps) of a program, one below the other."""
    rows, cols = shape_of(z)
    elements = WARPS * 32 * (16 // z.element_size())
    tile_cols = min(power_of_two(cols), elements)
    tile_rows = UNROLL * elements // tile_cols
    across, tiles = ceil_div(cols, tile_cols), ceil_div(rows, tile_rows)
    steps = ceil_div(tiles, max(1, min(tiles, ceil_div(most_programs, across))))
    return tile_rows, tile_cols, across, ceil_div(tiles, steps), steps


def arguments(inputs, tile_rows, tile_cols, across, steps):
    """What both kernels take. The inputs are dense: z in rows, the others a vector along its columns or one number."""
    rows, cols = shape_of(inputs[0])
    total = inputs[0].numel()
    return {
        @ARGUMENTS@
    }


def tail_forward(inputs):
    z = inputs[0]
    result = torch.empty_like(z)
    tile_rows, tile_cols, across, down, steps = cut(z, most_programs=z.numel())
    with torch.cuda.device(z.device):
        forward_kernel[(across * down,)](
            result, **arguments(inputs, tile_rows, tile_cols, across, steps), BITS=BITS[z.dtype], **OPTIONS
        )
    return result


def tail_backward(gy, inputs, needs):
    """The gradients of those inputs that `needs` is true for, None for the others."""
    z = inputs[0]
    cols = shape_of(z)[1]
    sms = torch.cuda.get_device_properties(z.device).multi_processor_count
    tile_rows, tile_cols, across, down, steps = cut(z, most_programs=PROGRAMS_PER_SM * sms)
    gradients = [torch.empty_like(t) if need else None for t, need in zip(inputs, needs)]
    # A program leaves one sum for each of its columns, or a single one for an operand that is a number:
    # the sums' shape is (terms, outputs), and the gradient sums over the terms.
    shapes = {"matrix": None, "vector": (down, cols), "number": (down * across, 1)}
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    partials = [
        torch.empty(shapes[kind], dtype=wide, device=z.device) if need and shapes[kind] else None
        for kind, need in zip(KINDS, needs)
    ]
    # What nobody wants is not written; gy stands in for its address.
    written = [p if p is not None else g if g is not None else gy for p, g in zip(partials, gradients)]
    with torch.cuda.device(z.device):
        backward_kernel[(across * down,)](
            gy,
            *written,
            **arguments(inputs, tile_rows, tile_cols, across, steps),
            NEEDS=sum(1 << i for i, need in enumerate(needs) if need),
            BITS=max(BITS[z.dtype], 11),  # a bfloat16 gradient takes float16's functions
            **OPTIONS,
        )
        for partial, gradient in zip(partials, gradients):
            if partial is not None:
                terms, outputs = partial.shape
                block_out = min(power_of_two(outputs), 32)
                block_terms = min(power_of_two(terms), 4096 // block_out)
                sum_kernel[(ceil_div(outputs, block_out),)](
                    partial, gradient, @SUMS@,
                    BLOCK_TERMS=block_terms, BLOCK_OUT=block_out, **OPTIONS,
                )
    return gradients
'''

_MODULES = ("platform", "math", "stages", "tile", "chain")
# What the kernels' parameters are for dense inputs; {0} is an input's number.
_VIEW = {"p": "inputs[{0}]", "div": "1", "mod": "1", "stride": "cols", "outer": "0"}
_SHAPE = {
    "rows": "rows",
    "cols": "cols",
    "total": "total",
    "col_programs": "across",
    "program_rows": "tile_rows * steps",
    "program_cols": "tile_cols",
    "steps": "steps",
    "row_step": "tile_rows",
    "col_step": "0",
    "FOLDED": "total != rows * cols",
    "BLOCK_ROWS": "tile_rows",
    "BLOCK_COLS": "tile_cols",
}
_SUMS = {"outer": "terms", "kept": "1", "inner": "1", "columns": "outputs"}


@dataclass
class Function:
    """A function or constant of a module: its text with the comment above it, its tree, and its name when emitted."""

    module: str
    name: str
    text: str
    tree: ast.stmt
    first_line: int

    @property
    def emitted(self) -> str:
        return f"stage_{self.name}" if self.module == "stages" else self.name


Key = tuple[str, str]


def emitted(chain: Chain, kinds: Sequence[int], shape: str) -> str:
    """The part of the file above the model: `tail_forward(inputs)` and `tail_backward(gy, inputs, needs)`.

    `kinds` are those of z and the chain's operands: FULL, COLUMN or 0. `shape` is Python that sets `rows` and `cols`.
    """
    assert set(kinds) <= {FULL, COLUMN, 0}
    texts = {name: (folder("triton_kernels") / f"{name}.py").read_text() for name in _MODULES[:-1]}
    texts["chain"] = triton.source(chain, kinds)
    library = Library(texts)
    source = library.flattened(("chain", "forward_kernel"), ("chain", "backward_kernel"), ("tile", "sum_kernel"))
    libdevice = "from triton.language.extra.cuda import libdevice\n" if "libdevice." in source else ""
    forward = library.parameters("chain", "forward_kernel")[1:]
    sums = library.parameters("tile", "sum_kernel")[2:]
    filled = {
        "@SOURCE@": source,
        "@LIBDEVICE@": libdevice,
        "@WARPS@": triton.WARPS,
        "@UNROLL@": triton.UNROLL,
        "@PROGRAMS@": triton.PROGRAMS_PER_SM,
        "@SHAPE@": shape,
        "@ARGUMENTS@": "\n        ".join(f'"{name}": {_argument(name)},' for name in forward if name != "BITS"),
        "@SUMS@": ", ".join(f"{name}={_SUMS[name]}" for name in sums if not name.startswith("BLOCK")),
    }
    text = _PYTHON
    for mark, value in filled.items():
        text = text.replace(mark, str(value))
    return text


def _argument(parameter: str) -> str:
    match = re.fullmatch(r"([a-z]+)(\d+)", parameter)
    return _VIEW[match[1]].format(match[2]) if match else _SHAPE[parameter]


class Library:
    """The functions of the modules and what their names mean in each."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.functions: dict[Key, Function] = {}
        self.aliases: dict[Key, str] = {}  # platform's names for libdevice's
        self.imported: dict[Key, Key] = {}  # a name in a module -> the module and name that it comes from
        self.modules: dict[Key, str] = {}  # a name in a module that is a module of ours
        for module, text in texts.items():
            for tree in _on_gpu(ast.parse(text).body):
                self._read(module, tree, text.splitlines())

    def _read(self, module: str, tree: ast.stmt, lines: list[str]) -> None:
        if isinstance(tree, ast.ImportFrom):
            source = (tree.module or "").rpartition(".")[2]
            for name in (alias.name for alias in tree.names):
                if name in _MODULES and source not in _MODULES:
                    self.modules[module, name] = name
                elif source in _MODULES:
                    self.imported[module, name] = source, name
        elif isinstance(tree, ast.Assign) and isinstance(tree.targets[0], ast.Name):
            value = ast.unparse(tree.value)
            if value.startswith("libdevice."):
                self.aliases[module, tree.targets[0].id] = value
            else:
                self._keep(module, tree.targets[0].id, tree, tree.lineno, lines)
        elif isinstance(tree, ast.FunctionDef):
            self._keep(module, tree.name, tree, tree.decorator_list[0].lineno, lines)

    def _keep(self, module: str, name: str, tree: ast.stmt, first: int, lines: list[str]) -> None:
        while lines[first - 2].lstrip().startswith("# ") and not lines[first - 2].lstrip().startswith("# --"):
            first -= 1
        text = "\n".join(line[tree.col_offset :] for line in lines[first - 1 : tree.end_lineno])
        self.functions[module, name] = Function(module, name, text, tree, first)

    def parameters(self, module: str, name: str) -> list[str]:
        tree = self.functions[module, name].tree
        assert isinstance(tree, ast.FunctionDef)
        return [argument.arg for argument in tree.args.args]

    def flattened(self, *roots: Key) -> str:
        """The text of all functions that the roots lead to, in the order of the modules, with their emitted names."""
        kept: dict[Key, str] = {}
        todo = list(roots)
        while todo:
            key = todo.pop()
            if key not in kept:
                kept[key], called = self._renamed(self.functions[key])
                todo += called
        names = [self.functions[key].emitted for key in kept]
        assert len(set(names)) == len(names), "two functions of one name"
        order = sorted(kept, key=lambda key: (_MODULES.index(key[0]), self.functions[key].first_line))
        parts = []
        for module in _MODULES:
            mine = [key for key in order if key[0] == module]
            constants = [kept[key] for key in mine if not isinstance(self.functions[key].tree, ast.FunctionDef)]
            functions = [kept[key] for key in mine if isinstance(self.functions[key].tree, ast.FunctionDef)]
            if mine:
                heading = "# ---- the chain " if module == "chain" else f"# ---- triton_kernels/{module}.py "
                parts += [f"{heading:-<120}" + ("\n\n" + "\n".join(constants) if constants else ""), *functions]
        return "\n\n\n".join(parts) + "\n\n"

    def _renamed(self, function: Function) -> tuple[str, list[Key]]:
        """The text with the emitted names, and what it calls."""
        lines = function.text.split("\n")
        edits, called = [], []
        for node, key in self._references(function):
            if key in self.aliases:
                new = self.aliases[key]
            else:
                new = self.functions[key].emitted
                called.append(key)
            assert node.end_col_offset is not None
            indent = function.tree.col_offset
            edits.append(
                (node.lineno - function.first_line, node.col_offset - indent, node.end_col_offset - indent, new)
            )
        for line, start, end, new in sorted(edits, reverse=True):
            lines[line] = lines[line][:start] + new + lines[line][end:]
        text = "\n".join(lines)
        return re.sub(rf"^def {function.name}\(", f"def {function.emitted}(", text, count=1, flags=re.MULTILINE), called

    def _references(self, function: Function) -> Iterator[tuple[ast.expr, Key]]:
        tree, module = function.tree, function.module
        own = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (module, node.value.id) in self.modules and node.value.id not in own:
                    yield node, (self.modules[module, node.value.id], node.attr)
            elif isinstance(node, ast.Name) and node.id not in own:
                key = self.imported.get((module, node.id), (module, node.id))
                if key in self.functions or key in self.aliases:
                    yield node, key


def _on_gpu(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module; of `if INTERPRETED` those of the other branch."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "INTERPRETED":
            yield from statement.orelse
        else:
            yield statement
