"""Find which functions a chain needs of a kernel language, and which of them its sources lack."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from dualop.build.sources import folder
from dualop.language.program import curved, steps
from dualop.language.slopes import Slope, is_slope
from dualop.language.syntax import Chain


class Language(NamedTuple):
    """Describe where a kernel language has its stages: a folder, and the file that lists its files in order.

    `begin` finds a function's name and what it takes over from another one; `parts` are the endings of the names that
    make up a stage, `second` is that of a second derivative.
    """

    folder: str
    listing: str
    listed: str
    begin: str
    parts: tuple[str, ...]
    second: str


LANGUAGES = {
    "cuda": Language(
        "cuda",
        "stages.cuh",
        r'^#include "(stages/\w+\.cuh)"',
        r"^(?:template <[^>]*> )?struct (\w+)(?: : (\w+))?",
        ("",),
        "::second",
    ),
    "triton": Language(
        "triton_kernels",
        "stages/__init__.py",
        r"^from \.(\w+) import \*",
        r"^def ([a-z]\w*)()\(",
        ("", "_backward"),
        "_second",
    ),
}


def stage_texts(language: str) -> dict[str, str]:
    """Return the texts of the files that hold a language's stages, by their paths in its folder, in order."""
    one = LANGUAGES[language]
    root = folder(one.folder)
    names = re.findall(one.listed, (root / one.listing).read_text("utf-8"), re.MULTILINE)
    paths = [name if name.endswith(".cuh") else f"stages/{name}.py" for name in names]
    return {path: (root / path).read_text("utf-8") for path in paths}


@lru_cache(maxsize=None)
def functions(language: str) -> tuple[str, ...]:
    """Return the kernel functions of a language in the order of its files; in C++, NAME::second is one of NAME."""
    one = LANGUAGES[language]
    found: list[str] = []
    for text in stage_texts(language).values():
        begins = list(re.finditer(one.begin, text, re.MULTILINE))
        for match, end in zip(begins, [*(m.start() for m in begins[1:]), len(text)], strict=True):
            name, base = match.groups()
            found.append(name)
            if " T second(" in text[match.end() : end] or (base and f"{base}::second" in found):
                found.append(f"{name}::second")
    return tuple(found)


@lru_cache(maxsize=4096)
def lacking(language: str, chain: Chain | Slope) -> tuple[str, ...]:
    """Return what keeps a language from having a kernel of the chain: each missing function, and where it belongs."""
    one, there = LANGUAGES[language], functions(language)
    needed = [step.function + part for step in steps(chain) for part in one.parts]
    if is_slope(chain):
        needed += [name + one.second for name in sorted(curved(chain))]
    return tuple(dict.fromkeys(f"{one.folder}/stages/ has no function {n}" for n in needed if n not in there))
