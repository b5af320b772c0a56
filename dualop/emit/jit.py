"""Take from the modules in `triton_kernels/` the functions that kernels call, in the branches that their dtypes take.

All functions end up in one namespace: those of `stages` get the prefix `stage_`, since `math` has some of the same
names. What `platform` takes from libdevice is called there. A stage that is one expression stands where it was
called.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from dualop.backends.functions import stage_texts
from dualop.build.sources import folder

Key = tuple[str, str]  # a module and a name in it
MODULES = ("platform", "tile", "float32", "math", "stages")


class Library:
    """Hold the functions and constants of the modules, and for which significant bits each function is used."""

    def __init__(self) -> None:
        self.trees: dict[Key, ast.FunctionDef | ast.Assign] = {}
        self.comments: dict[Key, str] = {}
        self.used: dict[Key, set[int]] = {}
        for module in MODULES:
            path = folder("triton_kernels") / f"{module}.py"
            for text in stage_texts("triton").values() if module == "stages" else [path.read_text("utf-8")]:
                self._read(module, text)

    def _read(self, module: str, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        for tree in _on_gpu(ast.parse(text).body):
            if isinstance(tree, ast.FunctionDef):
                first = last = tree.decorator_list[0].lineno - 1
                while lines[first - 1].startswith("# ") and not lines[first - 1].startswith("# --"):
                    first -= 1
                self.trees[module, tree.name] = tree
                self.comments[module, tree.name] = "".join(f"{line}\n" for line in lines[first:last])
            elif isinstance(tree, ast.Assign) and isinstance(tree.targets[0], ast.Name):
                self.trees[module, tree.targets[0].id] = tree

    def use(self, text: str, bits: Iterable[int]) -> str:
        """Mark what a text calls for these significant bits; return it with the file's names and branches."""
        return _text(self._resolved(ast.parse(text), "kernels", set(bits)))

    def printed(self, *modules: str) -> str:
        """Return the used functions of these modules, in order."""
        keys = [key for key in self.trees if key[0] in modules and key in self.used]
        return "\n\n\n".join(
            self.comments[key] + _text(self._resolved(self.trees[key], key[0], self.used[key])) for key in keys
        )

    def _resolved(self, tree: ast.AST, module: str, bits: set[int]) -> ast.AST:
        visitor = Visitor(self, module, bits)
        tree = visitor.visit(ast.parse(ast.unparse(tree)))
        for key, more in visitor.called:
            known = self.used.setdefault(key, set())
            if not more <= known:
                known |= more
                self._resolved(self.trees[key], key[0], known)
        return tree


class Visitor(ast.NodeTransformer):
    """Resolve the branches on BITS and the names in one function, and collect what it calls for which bits."""

    def __init__(self, library: Library, module: str, bits: set[int]) -> None:
        self.library, self.module, self.bits = library, module, bits
        self.called: list[tuple[Key, set[int]]] = []
        self.own: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.own = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        self.own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        node.name = _name((self.module, node.name))
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        taken = _taken(node.test, self.bits)
        if taken is None:
            return self.generic_visit(node)
        body, other = self._branch(node.body, taken), self._branch(node.orelse, self.bits - taken)
        return ast.If(node.test, body, other) if body and other else body or other

    def _branch(self, statements: list[ast.stmt], bits: set[int]) -> list[Any]:
        before, self.bits = self.bits, bits
        found = [self.visit(statement) for statement in statements] if bits else []
        self.bits = before
        return [part for one in found for part in (one if isinstance(one, list) else [one])]

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        taken = _taken(node.test, self.bits)
        if taken is None or (taken and taken != self.bits):
            return self.generic_visit(node)
        return self.visit(node.body if taken else node.orelse)

    def visit_Call(self, node: ast.Call) -> Any:
        key = self._key(node.func)
        node.args = [self.visit(argument) for argument in node.args]
        if key is not None and key[0] == "stages" and (value := self._inlined(key, node.args)):
            return value
        node.func = self.visit(node.func)
        node.keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
        return node

    def _inlined(self, key: Key, arguments: list[ast.expr]) -> ast.expr | None:
        """Return the stage's value if it is one expression in which no argument is computed twice."""
        sub = Visitor(self.library, key[0], self.bits)
        function = sub.visit(ast.parse(ast.unparse(self.library.trees[key]))).body[0]
        given = dict(zip((a.arg for a in function.args.args), arguments, strict=True))
        uses = [n.id for n in ast.walk(function) if isinstance(n, ast.Name)]
        twice = [a for name, a in given.items() if uses.count(name) > 1 and not isinstance(a, (ast.Name, ast.Constant))]
        value = getattr(function.body[0], "value", None)
        if twice or len(function.body) > 1 or not isinstance(value, ast.expr):
            return None
        self.called += sub.called
        return Substitution(given).visit(value)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        return self._reference(node) or self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        return self._reference(node) or node

    def _key(self, node: ast.expr) -> Key | None:
        """Return what a name, or an attribute of a module, means in this module; None if it is none of the library."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            return node.value.id, node.attr
        if not isinstance(node, ast.Name) or node.id in self.own:
            return None
        return next(((m, node.id) for m in (self.module, *MODULES) if (m, node.id) in self.library.trees), None)

    def _reference(self, node: ast.expr) -> ast.expr | None:
        key = self._key(node)
        if key is None:
            return None
        tree = self.library.trees[key]
        if isinstance(tree, ast.Assign):  # libdevice's function
            return tree.value
        self.called.append((key, self.bits))
        return ast.Name(_name(key))


class Substitution(ast.NodeTransformer):
    """Put arguments in the place of parameters."""

    def __init__(self, given: dict[str, ast.expr]) -> None:
        self.given = given

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.given.get(node.id, node)


def _name(key: Key) -> str:
    return f"stage_{key[1]}" if key[0] == "stages" else key[1]


def _taken(test: ast.expr, bits: set[int]) -> set[int] | None:
    """Return those of `bits` that a test on BITS alone holds for; None for other tests."""
    if {n.id for n in ast.walk(test) if isinstance(n, ast.Name)} != {"BITS"}:
        return None
    code = compile(ast.Expression(test), "<test>", "eval")
    return {number for number in bits if eval(code, {"BITS": number})}


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
    text = re.sub(r"\n+@triton", "\n\n\n@triton", ast.unparse(tree))
    return re.sub(r"^(def \w+)\((.{105,})\):$", wrapped, text, flags=re.MULTILINE)
