"""Make the inputs: samples of many shapes and layouts for `dualop check`, every number for `dualop verify`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualop.language.stages import STAGES
from dualop.language.syntax import Chain
from dualop.numerics.ulp import INTEGERS

DEFAULT_CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# ---- samples ---------------------------------------------------------------------------------------------------------
# Several operands, one used twice, a number, the input itself. The default chain never reaches its clamp; these do.
FORMS = (
    "add(bias) | clamp(-1, 1) | mul(scale) | tanh | mul(2)",
    'add | gelu(approximate="tanh") | hardtanh(-0.1, 0.5)',
    "sigmoid | mul(x)",
    "mish | add(x)",
    "mul(scale) | add(bias) | leaky_relu(0.2) | mul(scale)",
    "softplus(2, 10) | threshold(1, -3) | elu(0.5) | celu(2)",
)

# Kinks of the stages, zeros of both signs, what overflows, what is no number. All of them exist in every dtype.
KINKS = sorted({kink for stage in STAGES.values() for kink in stage.kinks or ()} - {0.0})
LARGE = (100.0, -100.0, 1e4, -1e4, 2.0**-14, -(2.0**-14))
SPECIAL = (0.0, -0.0, *KINKS, *(torch.tensor(LARGE).bfloat16().double().tolist()), torch.inf, -torch.inf, torch.nan)


@dataclass(frozen=True)
class Case:
    """Describe one call of a chain, without its chain and dtype.

    `operands` gives the forms of the operands in turn (see OPERAND_FORMS), `arrange`, `operand_arrange` and `gradient`
    how x, operands of full size and gy lie in memory (see ARRANGEMENTS; gy may also lie as the `result`, or be dense
    and of `one sign`, so that the terms of a sum do not cancel). `special` puts special values into every third element
    of x, and zeros among the operands. `gpu` cases are too large for interpreted kernels. `mixed` gives the operands
    another dtype.
    """

    name: str
    shape: tuple[int, ...]
    operands: tuple[str, ...] = ("last",)
    arrange: str = "dense"
    gradient: str = "dense"
    special: bool = False
    mixed: torch.dtype | None = None
    gpu: bool = False
    operand_arrange: str = "dense"

    def has(self, dtype: str) -> bool:
        """Return True if the case is worth a call in `dtype`: mixing a dtype with itself is not."""
        return self.mixed is None or DTYPES[dtype].itemsize < self.mixed.itemsize


# For every stage: tails in both directions with special values, and whole vectors.
STAGE_CASES = (Case("tails, special values", (13, 37), special=True), Case("whole vectors", (8, 128)))
CASES = (
    *STAGE_CASES,
    Case("scalar operand", (9, 70), ("scalar",)),
    Case("operand like x", (9, 70), ("full",)),
    Case("operand a row", (33, 20), ("row", "last")),
    Case("NCHW, channel", (2, 5, 4, 6), ("channel", "scalar")),
    Case("channels_last, channel", (2, 5, 4, 6), ("channel", "full"), "channels_last"),
    Case("operand without the middle", (4, 3, 10), ("outer",)),
    Case("x broadcast", (1, 24), ("taller", "last")),
    Case("sliced x", (6, 33), ("last",), "sliced", "sliced"),
    Case("misaligned x", (6, 64), ("last",), "offset", "offset"),
    Case("inner columns of x", (6, 30), ("last",), "inner", "result"),
    Case("every second element of x", (6, 33), ("last",), "every second"),
    Case("interleaved x and operand", (6, 32), ("full",), "every second", "result", operand_arrange="beside"),
    Case("transposed x", (12, 20), ("last",), "transposed"),
    Case("transposed x and gy", (12, 20), ("last",), "transposed", "result"),
    Case("transposed operand", (12, 20), ("full",), operand_arrange="transposed"),
    Case("heads, operand a position", (2, 3, 4, 8), ("position",), "heads", "result"),
    Case("heads, operand dense", (2, 3, 4, 8), ("full",), "heads", "result"),
    Case("heads, operand heads", (2, 3, 4, 8), ("full",), "heads", "result", operand_arrange="heads"),
    Case("transposed gy", (12, 20), ("last",), gradient="transposed"),
    Case("gy of a sum", (12, 20), ("last",), gradient="expanded"),
    Case("one dimension", (1000,), ("last", "scalar")),
    Case("no dimension", (), ("scalar",)),
    Case("no rows", (0, 8)),
    Case("no columns", (8, 0)),
    Case("many rows", (1500, 12)),
    Case("float32 operands", (16, 40), mixed=torch.float32),
    Case("more rows than a grid", (70_000, 40), gpu=True),
    Case("long rows", (3, 300_000), ("last", "row"), gpu=True),
    Case("many columns and rows", (4099, 4099), gpu=True),
    Case("a million rows", (1_000_000, 8), gpu=True),
    Case("a million rows of one sign", (1_000_000, 8), gradient="one sign", gpu=True),
)


@dataclass(frozen=True)
class Sample:
    """Hold the tensors of one call. `gy` has the result's shape and dtype."""

    x: Tensor
    operands: tuple[Tensor, ...]
    gy: Tensor
    dtype: str
    layout: str


def checked_chains() -> list[tuple[str, tuple[Case, ...]]]:
    """Return the chains of `dualop check`: the default chain in all cases, some forms of chains, every stage alone."""
    forms = [(text, (*STAGE_CASES, CASES[4], CASES[5])) for text in FORMS]
    return [(DEFAULT_CHAIN, CASES), *forms, *((stage.example, STAGE_CASES) for stage in STAGES.values())]


# The shape of an operand for x of a given shape.
OPERAND_FORMS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "last": lambda shape: shape[-1:],
    "row": lambda shape: (*shape[:-1], 1),
    "channel": lambda shape: (shape[1], *[1] * (len(shape) - 2)),
    "position": lambda shape: (*[1] * (len(shape) - 2), *shape[-2:]),
    "outer": lambda shape: (shape[0], *[1] * (len(shape) - 2), shape[-1]),
    "taller": lambda shape: (7, *shape[1:]),
    "scalar": lambda shape: (),
    "full": lambda shape: shape,
}


def _swapped(a: int, b: int) -> Callable[..., Tensor]:
    """Return an arrangement that is a contiguous tensor with two dimensions swapped."""

    def allocate(shape: tuple[int, ...], **like: Any) -> Tensor:
        order = list(range(len(shape)))
        order[a], order[b] = order[b], order[a]
        return torch.zeros([shape[d] for d in order], **like).permute(order)

    return allocate


# How a tensor may lie in memory: a function that allocates it, given its shape, dtype and device.
ARRANGEMENTS: dict[str, Callable[..., Tensor]] = {
    "dense": lambda shape, **like: torch.zeros(shape, **like),
    "channels_last": lambda shape, **like: torch.zeros(shape, **like).to(memory_format=torch.channels_last),
    "inner": lambda shape, **like: torch.zeros((*shape[:-1], shape[-1] + 2), **like)[..., 1:-1],
    "sliced": lambda shape, **like: torch.zeros((*shape[:-1], shape[-1] + 7), **like)[..., 3:-4],
    "offset": lambda shape, **like: torch.zeros(math.prod(shape) + 1, **like)[1:].view(shape),
    "every second": lambda shape, **like: torch.zeros((*shape[:-1], 2 * shape[-1]), **like)[..., ::2],
    "transposed": _swapped(0, -1),
    "heads": _swapped(1, 2),  # (batch, heads, length, size) of attention, as a linear layer gives them
}


def allocated(shape: Sequence[int], how: str, dtype: torch.dtype, device: Any, x: Tensor | None = None) -> Tensor:
    """Return zeros that lie in memory as `how` says; `beside` is between the elements of x, which is `every second`."""
    if how == "beside":
        assert x is not None and x.shape == tuple(shape) and x.stride(-1) == 2
        return x.as_strided(x.shape, x.stride(), x.storage_offset() + 1)
    return ARRANGEMENTS[how](tuple(shape), dtype=dtype, device=device)


def arranged(values: Tensor, how: str, x: Tensor | None = None) -> Tensor:
    """Return the same values, laid out in memory as `how` says; `expanded` repeats the first of them."""
    if how == "expanded":
        return values.flatten()[0].expand(values.shape)
    return allocated(values.shape, how, values.dtype, values.device, x).copy_(values)


def sample(chain: Chain, case: Case, dtype: str, device: torch.device | str, seed: int) -> Sample:
    """Make fresh random tensors: the same for the same arguments, whatever else is checked."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {chain} {case.name} {dtype}".encode()))

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    # A few numbers must not all lie where the chain is flat: there is no S that says how small their gradients are.
    x = (3.0 if math.prod(case.shape) > 32 else 0.5) * normal(case.shape)
    if case.special:
        flat = x.view(-1)
        count = flat[::3].numel()
        flat[::3] = torch.tensor(SPECIAL, dtype=torch.float64).repeat(count // len(SPECIAL) + 1)[:count]
    x = arranged(x.to(device, DTYPES[dtype]), case.arrange)
    operands = []
    for i, _ in enumerate(chain.operands):
        form = case.operands[i % len(case.operands)]
        values = normal(OPERAND_FORMS[form](case.shape))
        values = torch.where(values < 0, values - 0.25, values + 0.25)  # a divisor near zero drowns all else
        if case.special and values.numel() > 1:
            values.view(-1)[::2] = 0.0
        values = values.to(device, case.mixed or DTYPES[dtype])
        operands.append(arranged(values, case.operand_arrange if form == "full" else "dense", x))
    result = sum(operands, x)  # torch promotes and broadcasts
    gy = normal(result.shape).to(result)
    if case.gradient == "result":
        gy = torch.empty_like(result).copy_(gy)
    else:
        gy = gy.abs() if case.gradient == "one sign" else arranged(gy, case.gradient)
    mixed = f", {str(case.mixed).removeprefix('torch.')} operands" if case.mixed else ""
    return Sample(x, tuple(operands), gy, dtype, case.name + mixed)


# ---- every number ----------------------------------------------------------------------------------------------------

SWEPT = ("float32", "bfloat16", "float16")  # float64 has too many
COLUMNS = 8192  # inputs lie in rows of so many, operands along them
MOST_AT_ONCE = 2**26
SAMPLED_STRIDE = 2**14  # of float32 where kernels are interpreted


@dataclass
class Sweep:
    """Describe all numbers of a dtype, NaN and infinities included, in pieces that fit into memory.

    They are the inputs of a chain of `stages` stages. `stride` (a power of two) takes every so many-th float32 only.
    """

    device: torch.device
    stride: int
    stages: int
    at_once: int = MOST_AT_ONCE

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            # In float64: an input of every stage and its gradient, and the temporaries of a comparison.
            while self.at_once * 8 * (3 * self.stages + 32) > free and self.at_once > COLUMNS:
                self.at_once //= 2

    def stride_of(self, dtype: str) -> int:
        return self.stride if dtype == "float32" else 1

    def count(self, dtype: str) -> int:
        return 2 ** (8 * DTYPES[dtype].itemsize) // self.stride_of(dtype)

    def pieces(self, dtype: str) -> int:
        """Return how many tensors `inputs` yields."""
        return -(-self.count(dtype) // self.at_once)

    def shape(self, dtype: str) -> tuple[int, int]:
        """Return the shape of a tensor that `inputs` yields."""
        return min(self.count(dtype), self.at_once) // COLUMNS, COLUMNS

    def inputs(self, dtype: str) -> Iterator[Tensor]:
        """Yield tensors of rows of COLUMNS, on the device: from -0 down to the negative NaNs, then from 0 up.

        With a stride, the lower bits of the float32 numbers differ from one number to the next.
        """
        stride, count, size = self.stride_of(dtype), self.count(dtype), DTYPES[dtype].itemsize
        for start in range(0, count, self.at_once):
            i = torch.arange(start, min(start + self.at_once, count), device=self.device)
            bits = i * stride + i * 7919 % stride - 2 ** (8 * size - 1)
            yield bits.to(INTEGERS[size]).view(DTYPES[dtype]).view(-1, COLUMNS)
