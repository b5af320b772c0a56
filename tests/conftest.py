"""Settings of the whole suite: where kernels run, where builds are kept, and seeds.

On a machine without a GPU the kernels run interpreted. That switch and the cache folder are read when dualop and triton
are imported, so they are set here, before any test module is. Run `-m gpu` tests with `make test-gpu`.
"""

from __future__ import annotations

import contextlib
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ["DUALOP_INTERPRET"] = "1"
INTERPRETED = os.environ.get("DUALOP_INTERPRET", "") not in ("", "0")
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # a test module may import triton before dualop

# Builds are named by their content, so that a later run may take those of an earlier one.
os.environ.setdefault("DUALOP_CACHE_DIR", str(ROOT / ".cache" / "dualop"))
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already

with contextlib.suppress(ImportError):
    import hypothesis

    # No deadline: the first call of a chain compiles it. The same examples in every run, so that CI does not flicker.
    hypothesis.settings.register_profile("dualop", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("dualop")


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if HAS_GPU else "no GPU"
    return f"dualop: torch {torch.__version__}, {where}, kernels {'interpreted' if INTERPRETED else 'on the GPU'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU and not INTERPRETED:
        return
    why = "DUALOP_INTERPRET is set" if HAS_GPU else "no CUDA GPU"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session", autouse=True)
def _native() -> None:
    """The C++ of the short way is there from the beginning, not from whenever a thread has compiled it."""
    from dualop import replay

    replay.load()


@pytest.fixture
def python_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that put something in the place of a backend's method: every call comes by there."""
    from dualop import replay

    monkeypatch.setattr(replay, "on", False)
    replay.known.clear()
    yield
    replay.known.clear()


@pytest.fixture
def nothing_known() -> Iterator[None]:
    """For tests of what C++ replays: it knows nothing before and after."""
    from dualop import replay

    replay.known.clear()
    yield
    replay.known.clear()


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the kernels' backends that go Python's way."""
    from dualop.backends.registry import BACKENDS

    seen: list[str] = []

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            seen.append(name)
            return original(*given)

        return call

    for backend in ("cuda", "triton"):
        for name in ("forward", "backward"):
            monkeypatch.setattr(BACKENDS[backend], name, noting(name, getattr(BACKENDS[backend], name)))
    return seen


@pytest.fixture
def pair(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x of shape (4, 5), and an operand of shape (5,)."""
    return torch.randn(4, 5, device=device), torch.randn(5, device=device)


def _seed(node: pytest.Item) -> int:
    """A number of the test's own: the same whatever else runs, in whatever order, in whichever worker."""
    return zlib.crc32(node.nodeid.encode())


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(_seed(request.node))
    random.seed(_seed(request.node))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A seeded CPU generator for `torch.randn(..., generator=rng)`."""
    return torch.Generator().manual_seed(_seed(request.node))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU when interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")
