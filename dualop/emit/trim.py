"""Remove from C++ headers the declarations that nobody calls.

There is no parser: the module relies on how the headers in `cuda/` are written. A declaration ends in a line with ; or
} at its end and all braces closed, and a namespace opens and closes on a line of its own. The namespace alone decides
what a name may mean, so overloads stay together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dualop.build.sources import folder

_INCLUDES = re.compile(r'^#(?:pragma once|include "[\w/]+\.cuh")\n', re.MULTILINE)
# A member of a struct on one line, or up to the brace that closes it, with its comment.
_SECOND = re.compile(
    r"(?:^    //.*\n)*^    template .* static T second\(.*(?:\}\n|\{\n(?:.*\n)*?    \}\n)", re.MULTILINE
)
_NAMESPACE = re.compile(r"namespace ([\w:]+) \{")
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")
_QUALIFIER = re.compile(r"(\w*)::$")


@dataclass
class Item:
    """Hold a declaration of a header with its comment, or a comment that stands alone and declares no names."""

    namespace: str
    lines: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()
    apart: bool = True  # a blank line stands in front of it

    @property
    def directive(self) -> bool:
        return next((line for line in self.lines if not line.startswith("//")), "").startswith("#")


def items(header: str) -> Iterator[Item]:
    """Return the declarations of a header, in order."""
    spaces: list[str] = []
    item, depth = Item(""), 0
    for line in header.splitlines():
        code = line.partition("//")[0].rstrip()
        opened = _NAMESPACE.fullmatch(code)
        if depth == 0 and (opened or code.startswith("}") or not line.strip()):
            if item.lines:
                yield item
            if opened:
                spaces.append(opened[1])
            elif code:
                spaces.pop()
            item = Item("::".join(spaces))
            continue
        item.lines.append(line)
        depth += sum(code.count(c) for c in "{(") - sum(code.count(c) for c in "})")
        if (item.directive and not line.endswith("\\")) or (depth == 0 and code.endswith((";", "}"))):
            item.names = _declared("\n".join(item.lines))
            yield item
            item = Item("::".join(spaces), apart=False)


def _declared(text: str) -> tuple[str, ...]:
    """Return the names that a declaration defines; () for a directive."""
    code = re.sub(r"//.*|alignas\(\d+\)|__launch_bounds__\([^()]*\)", "", text).strip()
    code = re.sub(r"^template <[^{(]*?>\s+(?=[a-zA-Z_])", "", code)
    if code.startswith("#"):
        return ()
    if match := re.match(r"(?:struct|using)\s+(\w+)", code):
        return (match[1],)
    if re.match(r"(?:static )?constexpr [^({]*=", code):
        return tuple(re.findall(r"(\w+)(?:<\w+>)? = ", code))
    match = re.search(r"(\w+)\(", code)
    return (match[1],) if match else ()


def trimmed(header: str, roots: str) -> str:
    """Return `cuda/HEADER` for a GPU after its includes, reduced to what the C++ text `roots` leads to."""
    headers = [(name, (folder("cuda") / name).read_text("utf-8")) for name in _order(header)]
    parsed = [(name, text.splitlines(), list(items(_once(_INCLUDES.sub("", text))))) for name, text in headers]
    every: dict[tuple[str, str], list[Item]] = {}
    for _, _, found in parsed:
        for item in found:
            for name in item.names:
                every.setdefault((item.namespace, name), []).append(item)
    kept: set[int] = set()
    todo = [Item("dualop", roots.splitlines()), *(i for _, _, found in parsed for i in found if i.directive)]
    while todo:
        item = todo.pop()
        for space, name in _mentioned(item):
            new = [i for i in every.get((space, name), ()) if id(i) not in kept]
            kept.update(map(id, new))
            todo += new
    left = [(name, found) for name, _, found in parsed if _left(found, kept)]
    return "\n\n".join(_section(name, found, kept) for name, found in left)


def _once(header: str) -> str:
    """The header without the stages' second derivatives: an emitted module is differentiated once."""
    return _SECOND.sub("", header)


def _left(found: Sequence[Item], kept: set[int]) -> bool:
    """Whether a header still has something to say: a directive, a kept declaration, or it has been a comment alone."""
    return any(i.directive or id(i) in kept for i in found) or not any(i.names for i in found)


def _order(name: str) -> list[str]:
    """Return the header and those that it includes, each after the headers that it needs."""
    name = "device.cuh" if name == "platform.cuh" else name
    needed = re.findall(r'^#include "([\w/]+\.cuh)"', (folder("cuda") / name).read_text("utf-8"), re.MULTILINE)
    return list(dict.fromkeys([*(below for one in needed for below in _order(one)), name]))


def _mentioned(item: Item) -> Iterator[tuple[str, str]]:
    """Return the (namespace, name) pairs that the item may mean; `::exp` is none, `Stage::x` may be dualop's x."""
    code = re.sub(r"//.*", "", "\n".join(item.lines))
    for match in _NAME.finditer(code):
        qualifier = _QUALIFIER.search(code, max(0, match.start() - 40), match.start())
        spaces = (item.namespace, "dualop") if qualifier is None else (f"dualop::{qualifier[1]}", "dualop")
        if qualifier is None or qualifier[1]:
            yield from ((space, match[0]) for space in dict.fromkeys(spaces))


def _section(header: str, found: Sequence[Item], kept: set[int]) -> str:
    """Return the kept items of a header, its opening comment, and the comments that still head something."""
    lines, space, heading, apart = [f"// ==== cuda/{header} {'=' * (106 - len(header))}"], "", [], True
    for item in found:
        apart |= item.apart
        alone = not item.names and not item.directive
        if alone and len(lines) > 1:
            heading = ["", *item.lines] if item.lines[0].startswith("// ----") else []
            continue
        if not (alone or item.directive or id(item) in kept):
            continue
        if item.namespace != space:
            lines += ["", f"}}  // namespace {space}"] if space else []
            lines += ["", f"namespace {item.namespace} {{"] if item.namespace else []
            space, apart = item.namespace, True
        lines += [*heading, *([""] if apart else []), *item.lines]
        heading, apart = [], False
    return "\n".join([*lines, *(["", f"}}  // namespace {space}"] if space else [])])
