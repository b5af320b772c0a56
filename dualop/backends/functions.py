"""What the kernel languages have: which functions a chain needs of one, and which of them its sources lack."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from dualop.build.sources import folder
from dualop.language.program import curved, steps
from dualop.language.slopes import Slope, is_slope
from dualop.language.syntax import Chain


class Language(NamedTuple):
    """Where a kernel language has its functions: folder, files of stages and of second derivatives; how each begins.

    `parts` are the endings of the functions that make up a stage.
    """

    folder: str
    stages: str
    second: str
    begin: str
    parts: tuple[str, ...]


LANGUAGES = {
    "cuda": Language("cuda", "stages.cuh", "second.cuh", r"^(?:template <[^>]*> )?struct (\w+)", ("",)),
    "triton": Language("triton_kernels", "stages.py", "second.py", r"^def ([a-z]\w*)\(", ("", "_backward")),
}


@lru_cache(maxsize=None)
def functions(language: str, second: bool = False) -> tuple[str, ...]:
    """The kernel functions of a language in the order of its file; `second`: those with a second derivative."""
    one = LANGUAGES[language]
    text = (folder(one.folder) / (one.second if second else one.stages)).read_text(encoding="utf-8")
    return tuple(re.findall(one.begin, text.partition("}  // namespace")[0], re.MULTILINE))


@lru_cache(maxsize=4096)
def lacking(language: str, chain: Chain | Slope) -> tuple[str, ...]:
    """What keeps a language from having a kernel of the chain: each missing function, with the file it belongs into."""
    one = LANGUAGES[language]
    needed = [(one.stages, step.function + part, functions(language)) for step in steps(chain) for part in one.parts]
    if is_slope(chain):
        needed += [(one.second, name, functions(language, second=True)) for name in sorted(curved(chain))]
    found = [f"{one.folder}/{file} has no function {name}" for file, name, there in needed if name not in there]
    return tuple(dict.fromkeys(found))
