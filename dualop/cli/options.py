"""Define the options that several commands take, and what their texts mean (device, backends, dtypes)."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from dualop.bench.workloads import Workload

DEFAULT_CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to FILE, too.")]
Backends = Annotated[str, typer.Option("--backend", help="Those that `dualop doctor` lists, with commas, or all.")]
Dtypes = Annotated[str, typer.Option("--dtype", help="Several with commas, or all.")]
Operand = Annotated[
    str,
    typer.Option(
        help="Form of the operands: last (N,), channel (C, 1, ...), row (M, 1), position (M, N), scalar, full."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help="How x lies: dense, channels_last, inner (x[:, 1:-1]), sliced, offset, every second, transposed, heads."
    ),
]
Shapes = Annotated[str, typer.Option("--shape", help="Several with commas (16384x8192; a small one on the CPU).")]
Seed = Annotated[int, typer.Option(help="Of the random inputs.")]


def device() -> torch.device:
    """Return where kernels run, and turn interpreting on without a GPU: call it before importing dualop's modules."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DUALOP_INTERPRET", "1")
    from dualop.backends.registry import interpreting

    return torch.device("cuda" if gpu and not interpreting() else "cpu")


def backends(asked: str, chain: Any, device: torch.device) -> tuple[list[str], dict[str, list[str]]]:
    """Return the backends to run, and for `all` why the others cannot run; a backend chosen by name raises instead."""
    from dualop.backends.registry import BACKENDS, resolve
    from dualop.errors import BackendUnavailable

    if asked == "all":
        unavailable = {b.name: reasons for b in BACKENDS.values() if (reasons := b.reasons(chain, device))}
        return [name for name in BACKENDS if name not in unavailable], unavailable
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in names:
        if name not in BACKENDS:
            raise BackendUnavailable(f"unknown backend {name!r}; there are {', '.join(BACKENDS)} and all")
        resolve(name, chain, device)
    return names, {}


def dtypes(text: str) -> list[str]:
    """Return the dtypes named in a text with commas, short forms (bf16) included, or `all`. Raises DtypeError."""
    from dualop.errors import DtypeError
    from dualop.numerics.cases import DTYPES

    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}
    names = list(DTYPES) if text == "all" else [short.get(n.strip(), n.strip()) for n in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise DtypeError(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return names


def one_of(value: str, known: Collection[str], option: str) -> str:
    """Return the value of an option if it is known; raise BadParameter if not."""
    if value not in known:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    return value


def workloads(chain: Any, shape: str, default: str, dtype: str, operand: str, device: torch.device) -> list[Workload]:
    """Return the chain's workloads for every shape and dtype; without a shape, 16384x8192 or the `default` for CPUs."""
    from dualop.bench.workloads import Workload, parse_shape

    texts = (shape or ("16384x8192" if device.type == "cuda" else default)).split(",")
    return [Workload(chain, parse_shape(text), name, device, (operand,)) for text in texts for name in dtypes(dtype)]
