"""Write the Triton part of an emitted file: the functions that a chain's kernels call, and their launch.

All functions are in one namespace. The chain's own file is written by `triton_kernels/generate.py`, the others are read
from `triton_kernels/`. Functions of `stages` get the prefix `stage_`, since `math` has some of the same names, and what
`platform` takes from libdevice is called there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualop.backends import triton
from dualop.backends.functions import stage_texts
from dualop.build.sources import folder
from dualop.emit import launch as emit_launch
from dualop.language.syntax import Chain

_PYTHON = '''import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import triton
import triton.language as tl
@IMPORTS@
@SOURCE@
@LAUNCH@

# ---- the kernels launched --------------------------------------------------------------------------------------------

STAGES, RESERVED = @STAGES@, @RESERVED@  # tiles under way at once, and bytes of shared memory that are not theirs
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}  # significant ones of a result


@COPIED@


@functools.lru_cache(maxsize=None)
def gpu(device):
    """Its multiprocessors, shared memory for tiles, and whether it launches kernels while the one before runs."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin - RESERVED, found.major >= 9


def options(device, threads, resident=1):
    limit = {"maxnreg": 65536 // (256 * resident)} if resident > 1 else {}
    early = {"launch_pdl": True} if gpu(device)[2] else {}
    return {"num_warps": threads // 32, "enable_fp_fusion": True, **limit, **early}


def launch(kernel, layout, grid, cut, pointers, inputs, **constants):
    views = []
    for view, tensor in zip(layout.views, inputs):
        views += (tensor, view.div, view.mod, view.row_stride, 0)
    shape = (layout.rows, layout.cols, layout.total)
    walk = (grid.steps, grid.row_step, grid.col_step)
    device = inputs[0].device
    with torch.cuda.device(device):
        kernel[grid.axes](
            *pointers, *views, *shape, *walk, **constants,
            MASK=mask(layout, grid), NARROW=@NARROW@, EARLY=gpu(device)[2],
            BLOCK_ROWS=grid.tile_rows, BLOCK_COLS=grid.tile_cols, **options(device, cut.threads, cut.resident),
        )


def launch_sum(partial, out, shape):
    """Adds up the programs' partial sums, [outer, kept, inner, columns], over outer and inner."""
    outer, kept, inner, columns = shape
    block_out = min(power_of_two(kept * columns), 32)
    sizes = {"BLOCK_TERMS": min(power_of_two(outer * inner), 1024 // block_out), "BLOCK_OUT": block_out}
    constants = {"COLUMNS": kept == inner == 1, "EARLY": gpu(out.device)[2], **sizes}
    with torch.cuda.device(out.device):
        sum_kernel[(ceil_div(kept * columns, block_out),)](
            partial, out, outer, kept, inner, columns, **constants, **options(out.device, 128)
        )


def tail_forward(inputs):
    z = inputs[0]
    layout, result = layout_of(z.shape, z.dtype), torch.empty_like(z)
    cut = FORWARD[z.dtype]
    grid = forward_grid(layout, *tile(layout, cut))
    launch(forward_kernel, layout, grid, cut, [result], inputs, BITS=BITS[z.dtype])
    return result


def tail_backward(gy, inputs, needs):
    """The gradients of those inputs that `needs` is true for, None for the others."""
    z = inputs[0]
    layout = layout_of(z.shape, z.dtype)
    cut = (BACKWARD if any(view.reduced for view in layout.views) else FORWARD)[z.dtype]
    multiprocessors, shared, _ = gpu(z.device)
    cut = TALL[layout.dtype].fitted(cut, layout, multiprocessors)
    grid = backward_grid(layout, *tile(layout, cut), multiprocessors, cut)
    gradients = [torch.empty_like(t) if need else None for t, need in zip(inputs, needs)]
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    shapes = [view.sum_shape(layout.rows, layout.cols, grid.row_programs, grid.col_programs) for view in layout.views]
    # Where elements share an operand's element, each program leaves a partial sum, but where one has all of a sum. What
    # nobody wants is not written; gy stands in for its address.
    parted = [view.reduced and shape[0] * shape[2] > 1 for view, shape in zip(layout.views, shapes)]
    written = [
        gy if gradient is None else gradient.new_empty(math.prod(shape), dtype=wide) if parts else gradient
        for gradient, parts, shape in zip(gradients, parted, shapes)
    ]
    wanted = sum(1 << i for i, need in enumerate(needs) if need)
    bits = max(BITS[z.dtype], BITS[torch.float16])  # a bfloat16 gradient takes float16's functions
    constants = {"NEEDS": wanted, "STAGES": stages(layout, grid, shared), "BITS": bits}
    launch(backward_kernel, layout, grid, cut, [gy, *written], inputs, **constants)
    for parts, partial, gradient, shape in zip(parted, written, gradients, shapes):
        if gradient is not None and parts:
            launch_sum(partial, gradient, shape)
    return gradients
'''

_MODULES = ("platform", "float32", "math", "stages", "tile", "chain")


@dataclass
class Function:
    """Hold a function or constant of a module: its text with the comment above, its tree, and its emitted name."""

    module: str
    name: str
    text: str
    tree: ast.stmt
    first_line: int

    @property
    def emitted(self) -> str:
        if self.module == "tile" and not isinstance(self.tree, ast.FunctionDef):
            return f"KIND_{self.name}"  # Python has its own constants of this name, plain numbers
        return f"stage_{self.name}" if self.module == "stages" else self.name


Key = tuple[str, str]


def emitted(chain: Chain, plan: emit_launch.Plan) -> str:
    """Return the part of the file above the model: `tail_forward(inputs)` and `tail_backward(gy, inputs, needs)`."""
    texts = {name: _text(name) for name in _MODULES[:-1]} | {"chain": triton.source(chain, plan.kinds)}
    library = Library(texts)
    source = library.flattened(("chain", "forward_kernel"), ("chain", "backward_kernel"), ("tile", "sum_kernel"))
    filled = {
        "@SOURCE@": source,
        "@IMPORTS@": "".join(f"{line}\n" for line in library.imports(source)),
        "@LAUNCH@": emit_launch.emitted(plan, triton.FORWARD, triton.BACKWARD, triton.TALL),
        "@COPIED@": emit_launch.copied(triton._tile, triton._mask, triton._stages),
        "@STAGES@": str(triton.STAGES),
        "@RESERVED@": str(triton.RESERVED),
        "@NARROW@": str(plan.view.narrow),
    }
    text = _PYTHON
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return text


def _text(module: str) -> str:
    if module == "stages":  # a folder
        return "\n".join(stage_texts("triton").values())
    return (folder("triton_kernels") / f"{module}.py").read_text("utf-8")


class Library:
    """Collect the functions of the modules, and what their names mean in each."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.functions: dict[Key, Function] = {}
        self.aliases: dict[Key, str] = {}  # platform's name -> libdevice's name
        self.imported: dict[Key, Key] = {}  # a name in a module -> the module and name that it comes from
        self.modules: dict[Key, str] = {}  # a name in a module -> the module of ours that it is
        self.outside: dict[str, str] = {}  # a name that comes from Triton's own packages -> which
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
                elif (tree.module or "").startswith("triton."):
                    self.outside[name] = str(tree.module)
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

    def imports(self, text: str) -> list[str]:
        """Return the lines that import what `text` takes from Triton's own packages."""
        used = sorted(name for name in self.outside if re.search(rf"\b{name}\b", text))
        places = dict.fromkeys(self.outside[name] for name in used)
        return [f"from {p} import {', '.join(n for n in used if self.outside[n] == p)}" for p in places]

    def flattened(self, *roots: Key) -> str:
        """Return the text of all functions that the roots lead to, in the order of the modules, with emitted names."""
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
                where = f"triton_kernels/{module}" + ("/" if module == "stages" else ".py")
                heading = "# ---- the chain " if module == "chain" else f"# ---- {where} "
                parts += [f"{heading:-<120}" + ("\n\n" + "\n".join(constants) if constants else ""), *functions]
        return "\n\n\n".join(parts) + "\n\n"

    def _renamed(self, function: Function) -> tuple[str, list[Key]]:
        """Return the text with the emitted names, and what it calls."""
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
        defined = rf"^(def )?{function.name}(?=\(| =)"
        return re.sub(defined, rf"\g<1>{function.emitted}", text, count=1, flags=re.MULTILINE), called

    def _references(self, function: Function) -> Iterator[tuple[ast.expr, Key]]:
        tree, module = function.tree, function.module
        own = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found = self._module(module, node.value, own)
                if found and (found, node.attr) not in self.modules:
                    yield node, (found, node.attr)
            elif isinstance(node, ast.Name) and node.id not in own:
                key = self.imported.get((module, node.id), (module, node.id))
                if key in self.functions or key in self.aliases:
                    yield node, key

    def _module(self, module: str, named: ast.expr, own: set[str]) -> str | None:
        """Return the module of ours that an expression such as `math` or `math.platform` means in `module`."""
        if isinstance(named, ast.Name):
            return None if named.id in own else self.modules.get((module, named.id))
        outer = self._module(module, named.value, own) if isinstance(named, ast.Attribute) else None
        return self.modules.get((outer, named.attr)) if outer and isinstance(named, ast.Attribute) else None


def _on_gpu(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Return the statements of a module; `if INTERPRETED` contributes those of its other branch."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "INTERPRETED":
            yield from statement.orelse
        else:
            yield statement
