"""Collect every private name of torch that dualop uses: the reason, and the public way that was tried instead.

No other module imports a private name. Names that serve one purpose form a `Purpose`, which works as a whole or not at
all. Where this torch lacks one of its names, or a trial finds that one behaves differently, dualop gives the purpose
up, warns once, and uses the public fallback. Results stay right, and calls become slower.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import DispatchKey, DispatchKeySet


@dataclass(frozen=True)
class Name:
    """Describe a private name of torch: why it is needed, and which public way was tried instead."""

    path: str
    reason: str
    instead: str


@dataclass
class Purpose:
    """Describe what some private names are for, and which public fallback replaces them."""

    text: str
    fallback: str
    names: list[Name] = field(default_factory=list)
    why_not: str = ""

    @property
    def works(self) -> bool:
        return not self.why_not

    def give_up(self, why: str) -> None:
        """Use the fallback from now on, and warn the first time."""
        if self.works:
            self.why_not = why
            warnings.warn(
                f"torch {torch.__version__}: {why}, so dualop does without {self.text}: {self.fallback}. "
                "Results stay right. `dualop doctor` lists the tested versions of torch.",
                RuntimeWarning,
                stacklevel=2,
            )

    def name(self, path: str, reason: str, instead: str) -> Any:
        """Return the value of the private name `path`; without it, give the purpose up and return None."""
        self.names.append(Name(path, reason, instead))
        module, _, attribute = path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            self.give_up(f"{path} is missing")
            return None


FUNCTION = Purpose(
    "the autograd.Function as the op's own Autograd kernel",
    "the Function is applied above the op, and torch refuses torch.compile over torch.func",
)
after_autograd_keyset = FUNCTION.name(
    "torch._C._after_autograd_keyset",
    "a call that needs no gradient is redispatched below autograd, without a node",
    "a second op without an Autograd kernel: nested transforms of torch.func then lose the outer gradient silently",
)
below_autograd = FUNCTION.name(
    "torch._C._AutoDispatchBelowAutograd",
    "the Function's forward calls the same op again, below autograd",
    "a second op without an Autograd kernel, as above",
)
single_level_function = FUNCTION.name(
    "torch.autograd.function._SingleLevelFunction",
    "torch calls an op's Autograd kernel once for each level of torch.func, and the kernel makes a node of that level "
    "alone; this apply also saves the 25 us that Function.apply of torch 2.13 takes to bind a signature",
    "torch.autograd.Function.apply: it hands all levels over to functorch, which fails inside of a kernel",
)
single_level_allowed = FUNCTION.name(
    "torch._functorch.utils.enable_single_level_autograd_function",
    "while a transform is active, torch refuses a single-level Function unless this context allows it",
    "none: no public function allows it",
)
set_forward_mode_enabled = FUNCTION.name(
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "apply disables forward mode inside of forward, but outer levels of torch.func need it",
    "torch.enable_grad, which enables reverse mode only: a gradient of a jvp is silently 0",
)
forward_mode_enabled = FUNCTION.name(
    "torch._C._is_fwd_grad_enabled",
    "a forward-mode derivative of the backward op needs a formula of its own, except inside of the Function's own jvp",
    "forward_ad.unpack_dual, which returns tangents even while forward mode is disabled",
)
peek_interpreter_stack = FUNCTION.name(
    "torch._C._functorch.peek_interpreter_stack",
    "it tells whether the innermost transform of torch.func is a jvp",
    "forward_ad.unpack_dual, which reads the outer levels when a kernel calls it",
)
transform_type = FUNCTION.name(
    "torch._C._functorch.TransformType",
    "it names the kind of that transform",
    "forward_ad.unpack_dual, as above",
)

SHORT_WAY = Purpose("the short way past the dispatcher", "each call goes through the dispatcher")
dispatch_keys = SHORT_WAY.name(
    "torch._C._dispatch_keys",
    "dispatch keys distinguish a plain tensor from a negated, batched, functional or lazily zero one",
    "is_neg(), is_conj() and the like: none recognises batched, functional or lazily zero tensors",
)
dispatch_modes = SHORT_WAY.name(
    "torch._C._len_torch_dispatch_stack",
    "it tells whether a TorchDispatchMode would see the op",
    "none: torch.utils._python_dispatch is private as well",
)
profiling = SHORT_WAY.name(
    "torch._C._autograd._profiler_enabled",
    "it tells whether the profiler records the op",
    "none: torch.profiler does not say whether it is recording",
)
forward_levels = SHORT_WAY.name(
    "torch.autograd.forward_ad._current_level",
    "it tells whether dual tensors may exist; the C++ code of dualop/replay reads it as well",
    "forward_ad.unpack_dual of each tensor: it takes a microsecond each, and C++ cannot call it",
)
del forward_levels  # the number changes, so `transformed` reads it every time

transforms_active = SHORT_WAY.name(
    "torch._C._are_functorch_transforms_active",
    "it tells whether a transform of torch.func is active",
    "none: torch.func does not say whether a transform is active",
)
if transforms_active is None:
    FUNCTION.give_up("torch._C._are_functorch_transforms_active is missing")

DYNAMO = Purpose("having Dynamo skip dualop's own functions", "torch.compile may trace more than it needs to")
frame_strategy = DYNAMO.name(
    "torch._C._dynamo.eval_frame._FrameExecStrategy",
    "after a graph break, Dynamo tries to compile every Python function that is called",
    "torch.compiler.disable, which imports all of Dynamo with dualop and takes seconds",
)
frame_action = DYNAMO.name(
    "torch._C._dynamo.eval_frame._FrameAction",
    "a strategy consists of two of these",
    "torch.compiler.disable, as above",
)
set_frame_strategy = DYNAMO.name(
    "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "it gives a function its strategy",
    "torch.compiler.disable, as above",
)

FOLD = Purpose("folding a Linear's bias into the chain", "LinearChain calls its Linear as it is")
has_global_hooks = FOLD.name(
    "torch.nn.modules.module._has_any_global_hook",
    "hooks of all modules do not run where LinearChain folds the bias and does not call its Linear",
    "none: torch.nn.modules.module registers such hooks and does not say whether there are any",
)

BENCH = Purpose("timing a compiled backward more than once", "torch may refuse to time a compiled backward")
functorch_setting = BENCH.name(
    "torch._functorch.config.patch",
    "unless donated_buffer is off, a compiled backward reuses the forward's buffers and can run only once",
    "retain_graph=True, which torch refuses for a graph with donated buffers",
)

DTENSOR = Purpose("sharding rules for DTensor", "chains of DTensors run as torch's own functions")
PURPOSES = (FUNCTION, SHORT_WAY, DYNAMO, FOLD, BENCH, DTENSOR)
_SCHEMA_REASON = "the backward op returns a list whose length depends on which gradients are needed, and needs a rule"
_SCHEMA_INSTEAD = (
    "torch.distributed.tensor.experimental.register_sharding: it counts a list as one result, and its cache does not "
    "distinguish which gradients are needed"
)


def skip_frames(functions: Sequence[CodeType]) -> None:
    """Make Dynamo run the functions of these codes as they are when they are called outside of a trace."""
    if DYNAMO.works:
        skip = frame_strategy(frame_action.SKIP, frame_action.SKIP)
        for code in functions:
            set_frame_strategy(code, skip)


def as_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make Dynamo call the function while it traces, and use its result as a constant.

    torch.compiler.assume_constant_result sets the same attribute, but imports all of Dynamo. A version of torch that
    does not read the attribute traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def single_level(function: type[torch.autograd.Function]) -> Any:
    """Return the Function made single-level, for an op's Autograd kernel, or unchanged where torch cannot do that."""
    if not FUNCTION.works:
        return function
    names = ("forward", "setup_context", "backward", "jvp", "_compiled_autograd_key")
    own = {name: inspect.getattr_static(function, name) for name in names if hasattr(function, name)}
    return type(function.__name__, (single_level_function,), own)


def kept_buffers() -> AbstractContextManager[Any]:
    """Make torch.compile produce backwards that can run more than once, while this context is active."""
    return functorch_setting(donated_buffer=False) if BENCH.works else nullcontext()


def transformed() -> bool:
    """Return True if a transform of torch.func is active or dual tensors may exist, or if torch does not say."""
    return not SHORT_WAY.works or transforms_active() or torch.autograd.forward_ad._current_level >= 0


def sharding_names() -> tuple[Any, Any, Any] | None:
    """Return (DTensor's propagator, RuntimeSchemaInfo, expand_to_full_mesh_op_strategy); None where one is missing."""
    DTENSOR.names.clear()
    dtensor = DTENSOR.name("torch.distributed.tensor.DTensor", _SCHEMA_REASON, _SCHEMA_INSTEAD)
    info = DTENSOR.name("torch.distributed.tensor._op_schema.RuntimeSchemaInfo", _SCHEMA_REASON, _SCHEMA_INSTEAD)
    expand = DTENSOR.name(
        "torch.distributed.tensor._ops.utils.expand_to_full_mesh_op_strategy", _SCHEMA_REASON, _SCHEMA_INSTEAD
    )
    propagator = getattr(getattr(dtensor, "_op_dispatcher", None), "sharding_propagator", None)
    if propagator is None:
        DTENSOR.give_up("torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator is missing")
    return (propagator, info, expand) if DTENSOR.works else None


def _keys(*names: str) -> int:
    keys = DispatchKeySet(getattr(DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | DispatchKeySet(getattr(DispatchKey, name))
    return keys.raw_repr()


# The dispatch keys of an ordinary strided tensor, and those of one that was made in inference mode.
PLAIN_KEYS = frozenset(
    _keys(device, f"Autocast{device}", *more)
    for device in ("CPU", "CUDA")
    for more in ((), ("ADInplaceOrView", f"Autograd{device}"))
)
