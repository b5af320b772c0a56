"""Define the two ops for torch once in a process, with an implementation that can be replaced.

    ops.define()                            torch.ops.dualop has the ops from now on
    ops.implement("forward", CPU=f, ...)    f runs for this op and dispatch key from now on

A module may run again: by importlib.reload, a notebook's autoreload, or a test that purges sys.modules. torch does not
allow a second definition of an op, and removing a definition crashes every holder of the op: an older chain, a compiled
graph. So the definition stays, and what torch calls looks up the newest implementation in a table. Library and table
are kept beside the ops, where no purge of this package reaches them.

The kernels in C++ that replay known calls (dualop/replay/operators.h) stand before these once the extension is loaded.
They stay registered, too, and look up the records of the newest import.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch

from dualop.errors import DualopError
from dualop.torch_private import FUNCTION

SCHEMAS = {
    "forward": "(Tensor x, Tensor[] operands, str chain, str backend) -> Tensor",
    # With order 2, the gradients are those of the chain's slope: of gy f'(x) in x and gy, which is the only operand.
    "backward": "(Tensor gy, Tensor x, Tensor[] operands, str chain, str backend, bool[] needs, int order=1)"
    " -> Tensor[]",
}
KEYS = {"forward": ("CPU", "CUDA"), "backward": ("CPU", "CUDA", "Batched")}  # Batched: of the legacy vmap

Table = dict[tuple[str, str], Callable[..., Any]]


def define() -> None:
    """Define the ops unless they are defined. Raises DualopError if an older version of dualop defined other ones."""
    defined = _state().setdefault("schemas", SCHEMAS)
    if defined != SCHEMAS:
        raise DualopError("this process had another version of dualop, whose ops torch still has: start Python anew")
    if "library" in _state():
        return
    library = _state()["library"] = torch.library.Library("dualop", "DEF")
    table: Table = _state()["table"]
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name in SCHEMAS:
        for key in KEYS[name]:
            library.impl(name, _newest(table, name, key), key)
        if FUNCTION.works:  # this kernel gets the set of dispatch keys as its first argument
            library.impl(name, _newest(table, name, "Autograd"), "Autograd", with_keyset=True)
        else:
            keep = lambda ctx, inputs, output, name=name: table[name, "setup_context"](ctx, inputs, output)
            backward = _newest(table, name, "backward")
            torch.library.register_autograd(f"dualop::{name}", backward, setup_context=keep, lib=library)
        torch.library.register_fake(f"dualop::{name}", _newest(table, name, "fake"), lib=library)
        torch.library.register_vmap(f"dualop::{name}", _newest(table, name, "vmap"), lib=library)


def implement(name: str, **functions: Callable[..., Any]) -> None:
    """Run these functions for an op from now on: "fake", "vmap", and one for each dispatch key.

    "setup_context" and "backward" serve in place of "Autograd" where this torch lacks the names of FUNCTION.
    """
    _state()["table"].update({(name, key): function for key, function in functions.items()})


def entry() -> CodeType:
    """Return the code of what torch calls; it calls the functions given to `implement`."""
    return _state()["entry"]


def _newest(table: Table, name: str, key: str) -> Callable[..., Any]:
    place = name, key

    def call(*arguments: Any) -> Any:
        return table[place](*arguments)

    _state()["entry"] = call.__code__
    return call


def _state() -> dict[str, Any]:
    namespace = vars(torch.ops.dualop)
    return namespace.setdefault("_dualop", {"table": {}})
