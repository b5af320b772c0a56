"""Find the kernels' sources: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import dualop

_INCLUDE = re.compile(r'^#include "([\w/]+\.cuh)"\n', re.MULTILINE)


def folder(name: str) -> Path:
    """Return the folder `name` ("cuda", "triton_kernels") that belongs to this installation of dualop."""
    for parent in dualop.__path__:
        if (Path(parent) / name).is_dir():
            return Path(parent) / name
    raise FileNotFoundError(f"dualop is installed without its folder {name}/: install it again")


@lru_cache(maxsize=None)
def cuda_header(name: str, host: bool) -> str:
    """Return the text of `cuda/NAME` with its included headers from the same folder inserted, each once.

    `host` selects the layer under the kernels: the header for the CPU or the one for the GPU.
    """
    seen: set[str] = set()

    def text(header: str) -> str:
        if header == "platform.cuh":
            header = "host.cuh" if host else "device.cuh"
        if header in seen:
            return ""
        seen.add(header)
        body = (folder("cuda") / header).read_text("utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: text(match[1]), body)

    return text(name)
