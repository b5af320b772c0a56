"""Take from the modules in `triton_kernels/` the functions that kernels call, in the branches that their dtypes take.

All functions end up in one namespace: those of `stages` get the prefix `stage_`, since `math` has some of the same
names, and what `platform` takes from libdevice is called there.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dualop.backends.functions import stage_texts
from dualop.build.sources import folder

Key = tuple[str, str]  # a module and a name in it
MODULES = ("platform", "tile", "float32", "math", "stages")


@dataclass
class Function:
    """Hold a function or constant, the comment above it, and for which significant bits it is used."""

    module: str
    tree: ast.FunctionDef | ast.Assign
    comment: str
    used: set[int] = field(default_factory=set)


class Library:
    """Hold the functions of the modules by module and name."""

    def __init__(self) -> None:
        self.found: dict[Key, Function] = {}
        for module in MODULES:
            texts = (
                stage_texts("triton").values()
                if module == "stages"
                else [(folder("triton_kernels") / f"{module}.py").read_text("utf-8")]
            )
            for text in texts:
                self._read(module, text)

    def _read(self, module: str, text: str) -> None:
        lines = text.splitlines()
        for tree in _on_gpu(ast.parse(text).body):
            if isinstance(tree, ast.FunctionDef):
                first = tree.decorator_list[0].lineno - 1
                comment = re.search(r"(?:\n#(?! ----).*)*$", "\n" + "\n".join(line.strip() for line in lines[:first]))
                assert comment is not None
                self.found[module, tree.name] = Function(module, tree, comment[0].lstrip("\n"))
            elif isinstance(tree, ast.Assign) and isinstance(tree.targets[0], ast.Name):
                self.found[module, tree.targets[0].id] = Function(module, tree, "")

    def use(self, text: str, bits: Iterable[int]) -> str:
        """Mark what a text calls for each of these significant bits; return it with the file's names and branches."""
        for number in bits:
            self._visited(ast.parse(text), "kernels", {number}, mark=True)
        return _text(self._visited(ast.parse(text), "kernels", set(bits), mark=False))

    def printed(self, *modules: str) -> str:
        """Return the used functions of these modules, in order."""
        texts = []
        for one in self.found.values():
            if one.module in modules and one.used and isinstance(one.tree, ast.FunctionDef):
                text = _text(self._visited(one.tree, one.module, one.used, mark=False))
                texts.append(f"{one.comment}\n{text}".lstrip("\n"))
        return "\n\n\n".join(texts)

    def _visited(self, tree: ast.AST, module: str, bits: set[int], mark: bool) -> ast.AST:
        again = ast.parse(ast.unparse(tree))
        visitor = _Visitor(self, module, bits)
        again = visitor.visit(again)
        for key in visitor.called if mark else ():
            one = self.found[key]
            for number in bits - one.used:
                one.used.add(number)
                self._visited(one.tree, one.module, {number}, mark=True)
        return again


class _Visitor(ast.NodeTransformer):
    """Resolves branches on BITS, and names; collects what is called."""

    def __init__(self, library: Library, module: str, bits: set[int]) -> None:
        self.library, self.module, self.bits = library, module, bits
        self.called: list[Key] = []
        self.own: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.own = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        self.own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if (self.module, node.name) in self.library.found:
            node.name = self._name((self.module, node.name))
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        before, taken = self.bits, _taken(node.test, self.bits)
        if taken is None:
            return self.generic_visit(node)
        self.bits = taken
        body = [part for statement in node.body for part in _listed(self.visit(statement))] if taken else []
        self.bits = before - taken
        other = [part for statement in node.orelse for part in _listed(self.visit(statement))] if self.bits else []
        self.bits = before
        return body or other if not (body and other) else ast.If(node.test, body, other)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        taken = _taken(node.test, self.bits)
        if taken is None or (taken and taken != self.bits):
            return self.generic_visit(node)
        return self.visit(node.body if taken else node.orelse)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id in MODULES and node.value.id not in self.own:
            return self._reference((node.value.id, node.attr))
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.own:
            return node
        keys = [(module, node.id) for module in (self.module, *MODULES) if (module, node.id) in self.library.found]
        return self._reference(keys[0]) if keys else node

    def _reference(self, key: Key) -> ast.AST:
        tree = self.library.found[key].tree
        if isinstance(tree, ast.Assign):  # libdevice's function or a constexpr
            value = tree.value
            return value.args[0] if isinstance(value, ast.Call) else value
        self.called.append(key)
        return ast.Name(self._name(key))

    def _name(self, key: Key) -> str:
        return f"stage_{key[1]}" if key[0] == "stages" else key[1]


def _taken(test: ast.expr, bits: set[int]) -> set[int] | None:
    """Return those of `bits` that pass a test on BITS alone; None for other tests."""
    if {n.id for n in ast.walk(test) if isinstance(n, ast.Name)} != {"BITS"}:
        return None
    code = compile(ast.Expression(test), "<test>", "eval")
    return {number for number in bits if eval(code, {"BITS": number})}


def _listed(statement: ast.AST | list[ast.AST]) -> list[ast.AST]:
    return statement if isinstance(statement, list) else [statement]


def _on_gpu(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Return the statements of a module; `if INTERPRETED` contributes those of its other branch."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "INTERPRETED":
            yield from statement.orelse
        else:
            yield statement


def _text(tree: ast.AST) -> str:
    """Return the code of a tree, with long lists of parameters in lines of their own."""
    wrapped = lambda m: f"{m[1]}(\n{textwrap.fill(m[2], 116, initial_indent='    ', subsequent_indent='    ')},\n):"
    return re.sub(r"^(def \w+)\((.{105,})\):$", wrapped, ast.unparse(tree), flags=re.MULTILINE)
