"""Produce all numbers of a dtype, NaN and infinities included, in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dualop.backends.base import Planned
from dualop.language.syntax import Chain
from dualop.numerics.cases import DTYPES

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
INTEGERS = {32: torch.int32, 16: torch.int16}
COLUMNS = 8192  # inputs lie in rows of so many, operands along them
MOST_AT_ONCE = 2**26
SAMPLED_STRIDE = 2**14  # of float32 where kernels are interpreted

Progress = Callable[[int, int], None]


@dataclass
class Sweep:
    """Describe the inputs of a chain of so many stages.

    `stride` (a power of two) takes every so many-th float32 only.
    """

    device: torch.device
    stride: int
    stages: int

    def __post_init__(self) -> None:
        self.at_once = MOST_AT_ONCE
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            # In float64: an input of every stage and its gradient, and the temporaries of a comparison.
            while self.at_once * 8 * (3 * self.stages + 32) > free and self.at_once > COLUMNS:
                self.at_once //= 2

    def count(self, dtype: str) -> int:
        return 2 ** BITS[dtype] // self.stride_of(dtype)

    def stride_of(self, dtype: str) -> int:
        return self.stride if dtype == "float32" else 1

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
        stride, count, half = self.stride_of(dtype), self.count(dtype), 2 ** (BITS[dtype] - 1)
        for start in range(0, count, self.at_once):
            i = torch.arange(start, min(start + self.at_once, count), device=self.device)
            bits = i * stride + i * 7919 % stride - half
            yield bits.to(INTEGERS[BITS[dtype]]).view(DTYPES[dtype]).view(-1, COLUMNS)


def bits_text(value: Tensor) -> str:
    """Return the bits of one number, such as 0x3f800000."""
    size = 8 * value.element_size()
    return f"0x{value.view(INTEGERS[size]).item() % 2**size:0{size // 4}x}"


def calls(chains: Iterable[Chain], dtypes: Iterable[str], device: torch.device) -> list[Planned]:
    """Return a call for each chain and dtype that a sweep takes, shaped as its own, without operands' gradients."""
    made = []
    for chain in chains:
        sweep = Sweep(device, 1, len(chain.calls))
        needs = (True, *[False] * len(chain.operands))
        for dtype in (d for d in dtypes if d in BITS):
            x, vector = (torch.empty(s, dtype=DTYPES[dtype], device="meta") for s in (sweep.shape(dtype), (COLUMNS,)))
            made.append(Planned(chain, (x, *[vector] * len(chain.operands)), device, needs))
    return made
