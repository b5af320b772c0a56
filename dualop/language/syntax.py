"""Chains as data: parse, print, compose, bind operands to names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dualop.errors import ChainError, OperandError
from dualop.language.stages import Call, call

MAX_STAGES = 64
MAX_OPERANDS = 8

_TOKEN = re.compile(
    r"""\s*(?: (?P<number>[+-]?(?:inf|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))(?![\w.])
             | (?P<name>[A-Za-z_]\w*)
             | (?P<word>"[a-z]*"|'[a-z]*')
             | (?P<mark>[|(),=]) )""",
    re.VERBOSE | re.ASCII,
)


class Chain:
    """Hold an immutable chain of stages: the calls, the names of the operands, and the canonical text."""

    # Values of the class, for Dynamo of torch 2.11 takes the hash of a chain before it is filled.
    calls: tuple[Call, ...] = ()
    operands: tuple[str, ...] = ()
    text: str = ""
    order = 1  # of the derivative that its backward gives; that of a slope (slopes.py) gives the second

    def __init__(self, calls: tuple[Call, ...]) -> None:
        if not calls:
            raise ChainError("a chain needs at least one stage")
        if len(calls) > MAX_STAGES:
            raise ChainError(f"a chain has at most {MAX_STAGES} stages, this one has {len(calls)}")
        names = (c.operand for c in calls if isinstance(c.operand, str) and c.operand != "x")
        for name, value in (
            ("calls", calls),
            ("operands", tuple(dict.fromkeys(names))),
            ("text", " | ".join(map(str, calls))),
        ):
            object.__setattr__(self, name, value)
        if len(self.operands) > MAX_OPERANDS:
            raise ChainError(f"a chain takes at most {MAX_OPERANDS} operands, this one has {len(self.operands)}")

    @property
    def of(self) -> Chain:
        """Return the chain itself, as a slope's `of` is the chain that it is the slope of."""
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a chain cannot be changed; make a new one ({name})")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def bind(self, operands: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Return the operands in the order of `self.operands`. Raises OperandError for what is missing or too much."""
        given = dict(zip(self.operands, operands, strict=False))
        found = {
            "missing": [n for n in self.operands if n not in given and n not in named],
            "unknown": [n for n in named if n not in self.operands],
            "given twice": [n for n in named if n in given],
        }
        reasons = [f"{what} {', '.join(names)}" for what, names in found.items() if names]
        if len(operands) > len(self.operands):
            reasons.insert(0, f"{len(operands)} operands given")
        if reasons:
            raise OperandError(f"`{self}` takes ({', '.join(('x', *self.operands))}); {'; '.join(reasons)}")
        given.update(named)
        return tuple(given[n] for n in self.operands)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"dualop.chain({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __reduce__(self) -> Any:
        return parse, (self.text,)


def joined(*stages: str | Call | Chain) -> tuple[Call, ...]:
    """Return the calls of texts (each one or more stages), single calls and chains, in order. Raises ChainError."""
    calls: list[Call] = []
    for stage in stages:
        if isinstance(stage, Call):
            calls.append(stage)
        elif isinstance(stage, (str, Chain)):
            calls.extend((parse(stage) if isinstance(stage, str) else stage).calls)
        else:
            raise ChainError(f"a chain is made of texts and stages, not of {type(stage).__name__}")
    return tuple(calls)


@lru_cache(maxsize=4096)
def parse(text: str) -> Chain:
    """Return the chain that `text` writes. The same text gives the same object."""
    return Chain(tuple(_Parser(text).chain()))


class _Parser:
    """Recursive descent over the tokens of one text; every token is matched or the text is refused."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, at = text, [], 0
        end = len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None:
                self.fail(at, "cannot be read")
            assert match is not None and match.lastgroup is not None
            self.tokens.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            at = match.end()
        self.tokens.append(("end", "", end))
        self.next = 0

    def fail(self, at: int, problem: str) -> None:
        before, after = self.text[max(at - 60, 0) : at], self.text[at : at + 60]
        start, end = "..." if at > 60 else "", "..." if len(self.text) > at + 60 else ""
        raise ChainError(f"{problem} at position {at + 1} of the chain: {start}{before}⟨here⟩{after}{end}")

    def accept(self, kind: str, value: str | None = None) -> str | None:
        found, text, _ = self.tokens[self.next]
        if found != kind or (value is not None and text != value):
            return None
        self.next += 1
        return text

    def expect(self, kind: str, value: str | None, what: str) -> str:
        at = self.tokens[self.next][2]
        text = self.accept(kind, value)
        if text is None:
            self.fail(at, f"expected {what}")
        assert text is not None
        return text

    def chain(self) -> Iterator[Call]:
        yield self.stage()
        while self.accept("mark", "|"):
            yield self.stage()
        self.expect("end", None, "| or the end")

    def stage(self) -> Call:
        name = self.expect("name", None, "a stage's name")
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        if self.accept("mark", "(") and not self.accept("mark", ")"):
            while True:
                at = self.tokens[self.next][2]
                follows = self.tokens[self.next + 1 : self.next + 2]
                key = self.accept("name") if follows and follows[0][1] == "=" else None
                if key:
                    self.expect("mark", "=", "=")
                    if key in keywords:
                        self.fail(at, f"{key} given twice")
                    keywords[key] = self.value()
                elif keywords:
                    self.fail(at, "a positional argument after a keyword")
                else:
                    positional.append(self.value())
                if not self.accept("mark", ","):
                    break
            self.expect("mark", ")", ", or )")
        return call(name, *positional, **keywords)

    def value(self) -> float | str:
        at = self.tokens[self.next][2]
        if (number := self.accept("number")) is not None:
            if math.isinf(float(number)) and "inf" not in number:
                self.fail(at, "a number beyond float64 (write inf)")
            return float(number)
        if (word := self.accept("word")) is not None:
            return word[1:-1]
        return self.expect("name", None, "a number, a word or a tensor's name")
