"""Read once whether kernels run on CPU tensors: Triton fixes that when it is imported."""

from __future__ import annotations

import os
import sys

INTERPRET = os.environ.get("DUALOP_INTERPRET", "0") not in ("", "0")
# Triton imported without its interpreter has compiled functions where the interpreter needs Python ones.
TRITON_TOO_EARLY = INTERPRET and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if INTERPRET and not TRITON_TOO_EARLY:
    os.environ["TRITON_INTERPRET"] = "1"

CPU_REASON = "takes CUDA tensors; with DUALOP_INTERPRET=1 in the environment it runs CPU tensors too, slowly, for tests"
