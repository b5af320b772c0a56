"""Take from the C++ headers in `cuda/` what a text uses, in the branches that its dtypes take.

This is no parser: it relies on how the headers are written. A declaration begins at a line's start, right below its
comment, and its other lines are indented or close a brace. A stage is a struct whose members are templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dualop.backends.functions import stage_texts
from dualop.build.sources import folder

_DECLARATION = re.compile(
    r"(?:^//.*\n)*(?:^template <.*>\n)?^(?:template|struct|constexpr|using|inline|void|DUALOP_\w+) .*\n"
    r"(?:^(?!\}  // )[ }#].*\n)*",
    re.MULTILINE,
)
_NAME = re.compile(r"(?:struct|using) (?:alignas\(\w+\) )?(\w+)|(\w+)(?:<\w+>)? = |(\w+)\(")
_MEMBER = re.compile(
    r"(?:^    //.*\n)*^    template .* static T (\w+)\(.*\n(?:^(?:        .*|    \})\n)*", re.MULTILINE
)
_SHORT = re.compile(r"^(.*)\{\n +(return .*;)\n *\}$", re.MULTILINE)  # a function of one line
_BASE = re.compile(r"struct \w+ : (\w+)")
_USED_MEMBER = re.compile(r"(\w+)(?:<[^>]*>)?::(forward|inner|backward)\b")
_USED = re.compile(r"(?<![\w.])(?:(\w*)::)?([A-Za-z_]\w*)(?=([(<])?)")

Key = tuple[str, ...]  # a namespace, a name and, for a stage, its member


@dataclass
class Declaration:
    """Hold a declaration's text, and for which significant bits it is used; of a stage, each member."""

    header: str
    namespace: str
    text: str
    function: bool
    apart: bool  # a blank line precedes it
    used: dict[str, set[int]] = field(default_factory=dict)

    @property
    def members(self) -> dict[str, str]:
        return {m[1]: m[0] for m in _MEMBER.finditer(self.text)} if self.namespace == "stage" else {}

    def printed(self) -> str:
        """Return the text with the used members and branches."""
        keep = lambda m: resolved(m[0], self.used[m[1]]) if m[1] in self.used else ""
        stage = self.namespace == "stage"
        text = _MEMBER.sub(keep, self.text) if stage else resolved(self.text, set().union(*self.used.values()))
        return _SHORT.sub(lambda m: m[0] if len(m[0]) > 130 else f"{m[1]}{{ {m[2]} }}", text.replace("{\n}", "{}"))


class Headers:
    """Hold the declarations of the headers by namespace and name; overloads stay together."""

    def __init__(self, dropped: Iterable[str] = (), types: Iterable[str] = ()) -> None:
        """Read the headers without the declarations called `dropped` and the functions on these types."""
        self.found: dict[Key, list[Declaration]] = {}
        unwanted = re.compile(rf"^(?:DUALOP_FUN|template <>).*\b(?:{'|'.join([*types, 'none'])})\b", re.MULTILINE)
        spaces = {"device.cuh": "", "types.cuh": "", "float32.cuh": "math", "math.cuh": "math", "view.cuh": ""}
        for header, namespace in {**spaces, **dict.fromkeys(stage_texts("cuda"), "stage")}.items():
            text = (folder("cuda") / header).read_text("utf-8")
            for match in _DECLARATION.finditer(text):
                code = re.sub(r"^//.*\n|^template <.*?>+\s(?=\w)", "", match[0], flags=re.MULTILINE)
                named = _NAME.search(code)
                assert named is not None, code
                name, apart = named[named.lastindex or 0], match[0][0] == "/" or text[: match.start()].endswith("\n\n")
                if name not in dropped and not unwanted.search(match[0]):
                    one = Declaration(header, namespace, match[0], named.lastindex == 3, apart)
                    self.found.setdefault((namespace, name), []).append(one)

    def use(self, text: str, bits: int, namespace: str = "") -> None:
        """Mark what a text uses that is compiled for so many significant bits."""
        text = re.sub(r"//.*", "", resolved(text, {bits}))
        for match in _USED_MEMBER.finditer(text):
            self._use_member(match[1], match[2], bits)
        for match in _USED.finditer(text):
            spaces = (namespace, "") if match[1] is None else (match[1].replace("dualop", ""),) if match[1] else ()
            for one in next((found for space in spaces if (found := self.found.get((space, match[2])))), []):
                if (one.function and not match[3]) or one.namespace == "stage":
                    continue
                if bits not in one.used.setdefault("", set()):
                    one.used[""].add(bits)
                    self.use(one.text, bits, one.namespace)

    def _use_member(self, stage: str, member: str, bits: int) -> None:
        for one in self.found.get(("stage", stage), []):
            base = _BASE.search(one.text)
            if "" not in one.used:
                one.used[""] = set()
                self.use(_MEMBER.sub("", one.text), bits)  # its base's parameters
                for inherited in self.found["stage", base[1]] if base else ():
                    inherited.used.setdefault("", set())
            if member not in one.members:
                assert base, f"{stage} has no {member}"
                self._use_member(base[1], member, bits)
            elif bits not in one.used.setdefault(member, set()):
                one.used[member].add(bits)
                self.use(one.members[member], bits, "stage")

    def has_member(self, stage: str, member: str) -> bool:
        """Return True if the stage or its base has such a member."""
        (declaration,) = self.found["stage", stage]
        base = _BASE.search(declaration.text)
        return member in declaration.members or (base is not None and self.has_member(base[1], member))

    def printed(self, *headers: str) -> str:
        """Return the used declarations of these headers, in order, in their namespaces."""
        text, space = "", ""
        for one in (one for found in self.found.values() for one in found if one.used):
            if any(one.header.startswith(header) for header in headers):
                if one.namespace != space:
                    text += (f"\n}}  // namespace {space}\n" if space else "") + f"\nnamespace {one.namespace} {{\n"
                    space = one.namespace
                text += ("\n" if one.apart else "") + one.printed()
        return (text + (f"\n}}  // namespace {space}\n" if space else "")).strip("\n")


def resolved(text: str, bits: set[int], branch: bool = False) -> str:
    """Return C++ text without the branches of `if constexpr` that no number of significant bits in `bits` takes.

    Where the text is itself a `branch`, its statement keeps its braces.
    """
    start = text.find("if constexpr (")
    if start < 0:
        return text
    head = _closing(text, start + 13)
    condition, end = re.sub(r"(!?)(?:math::)?lean<bits>", _lean, text[start + 14 : head - 1]), _end(text, head)
    body, other, gap = text[head:end], "", text[end:]
    gap = gap[: len(gap) - len(gap.lstrip())]
    if text.startswith("else", end + len(gap)):
        begin = end + len(gap) + 4
        end = _end(text, begin)
        other = text[begin:end]
    holds = {b: _holds(condition, b) for b in bits}
    if all(holds.values()) and "&&" not in condition:
        chosen = resolved(body, bits).strip() if branch else _alone(resolved(body, bits))
    elif not any(holds.values()):
        chosen = resolved(other, bits, branch).strip() if branch else _alone(resolved(other, bits))
    else:
        chosen = f"if constexpr ({condition})" + resolved(body, {b for b in bits if holds[b]})
        rest = bits if "&&" in condition else {b for b in bits if not holds[b]}
        chosen += f"{gap}else{resolved(other, rest, branch=True)}" if other else ""
    return text[:start] + chosen + resolved(text[end:], bits)


def _holds(condition: str, bits: int) -> bool:
    """Return whether a branch may be taken: what follows && is not known here. Arithmetic in T has 53 bits or float's."""
    condition = condition.replace("sizeof(T) == 8", "bits == 53")
    return bool(eval(condition.partition(" && ")[0], {"bits": bits}))


def _lean(match: re.Match[str]) -> str:
    return "bits > 11" if match[1] else "bits <= 11"


def _end(text: str, at: int) -> int:
    """Return where the statement ends that begins at `at`, after white space."""
    at += len(text[at:]) - len(text[at:].lstrip())
    if text[at] == "{":
        return _closing(text, at)
    if not text.startswith("if constexpr (", at):
        return text.index(";", at) + 1
    end = _end(text, _closing(text, at + 13))
    return _end(text, text.index("else", end) + 4) if text[end:].lstrip().startswith("else") else end


def _closing(text: str, at: int) -> int:
    """Return the place behind the brace or parenthesis that closes the one at `at`."""
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"nothing closes {text[:80]!r}")


def _alone(statement: str) -> str:
    """Return a branch's statement as it stands without the branch."""
    text = statement.strip()
    if text.startswith("{"):
        return re.sub(r"^    ", "", text[1:-1].strip(), flags=re.MULTILINE)
    return text.replace("\n    ", "\n") if statement.startswith("\n") else text
