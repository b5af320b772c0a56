"""On a GPU: the consistency matrix, and what only a GPU shows: streams, graphs, memory, sizes beyond 32 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import test_stages
import torch
from test_consistency import CASES, DEFAULT, Case, check_case, d, default, make
from torch import Tensor

import dualop
from dualop.backends.base import Planned
from dualop.backends.registry import BACKENDS
from dualop.errors import BackendUnavailable, DeviceError

pytestmark = pytest.mark.gpu
KERNELS = ("cuda", "triton")
OP = dualop.chain(DEFAULT)

LARGER = [
    default("more rows than a grid's second axis", d(70_001, 40), d(40)),
    default("long rows", d(3, 300_001), d(3, 1)),
    default("many rows and columns", d(4099, 4097), d(4097)),
    default("many channels", d(64, 300, 14, 14), d(300, 1, 1)),
    default("many elements, bfloat16", d(5000, 8192), d(8192), dtypes=(torch.bfloat16,)),
    # A program for each multiprocessor, and tiles of more tensors than its shared memory holds three times.
    default("tall tiles, bfloat16", d(3001, 8192), d(8192), dtypes=(torch.bfloat16,)),
    default("tall tiles, float32", d(2500, 4096), d(4096)),
    Case("many full operands", "add(a) | " + " | ".join(f"add(b{i})" for i in range(7)), d(4100, 4096),
         (d(4096), *[d(4100, 4096)] * 7)),
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    """All CUDA libraries at once, in as many processes as there are cores."""
    if not torch.cuda.is_available() or dualop.backends.registry.interpreting():
        return
    calls = []
    for case in (*CASES, *LARGER):
        x, operands, _ = make(case, "cuda")
        calls.append((dualop.chain(case.text), x, operands))
    for dtype in test_stages.DTYPES.values():
        x = torch.ones(64, dtype=dtype, device="cuda")
        calls += [(dualop.chain(text), x, ()) for text in test_stages.UNARY]
        calls += [(dualop.chain(name), x, (x,)) for name in test_stages.OPERAND_STAGES]
    BACKENDS["cuda"].prepare([Planned.of(*call) for call in calls])


def features(dtype: torch.dtype = torch.float32, rows: int = 512, columns: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """x and a bias that require gradients, and gy."""
    x = torch.randn(rows, columns, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(columns, device="cuda", dtype=dtype, requires_grad=True)
    return x, bias, torch.randn(rows, columns, device="cuda", dtype=dtype)


def expected(x: Tensor, bias: Tensor, gy: Tensor) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (x, bias)]
    y = dualop.reference(OP, leaves[0], leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.double())]


def close(got: Tensor, right: Tensor) -> None:
    scale = right.abs().max().item()
    tolerance = 8 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double().cpu(), right.cpu(), rtol=tolerance, atol=tolerance * scale)


# ---- the same as on the CPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *LARGER], ids=lambda case: case.name)
def test_backends_agree(case: Case) -> None:
    check_case(case, "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", test_stages.DTYPES)
@pytest.mark.parametrize("text", test_stages.UNARY)
def test_stage(text: str, dtype: str, backend: str) -> None:
    """Accuracy with the GPU's own special functions, which the interpreted kernels do not have."""
    test_stages.check_stage(text, dtype, backend, "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", test_stages.DTYPES)
@pytest.mark.parametrize("name", test_stages.OPERAND_STAGES)
def test_operand_stage(name: str, dtype: str, backend: str) -> None:
    test_stages.check_operand_stage(name, dtype, backend, "cuda")
    test_stages.check_operand_stage_with_infinities_and_nan(name, dtype, backend, "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(dtype: torch.dtype, backend: str) -> None:
    """The default chain on all 65,536 values, against float64."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda").view(dtype)
    op = dualop.chain("swish | tanh | gelu | hardtanh(-1, 1)")
    y = op(x, backend=backend)
    exact = dualop.reference(op, x.double())
    finite = x.isfinite()
    errors = test_stages.ulp_errors(y, exact, exact[finite].abs().max().item())
    assert errors[finite].max() <= 1.0
    assert y[x.isnan()].isnan().all()


# ---- the device ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_gpu() -> None:
    x, bias, _ = features()
    assert dualop.explain(OP, x, bias).chosen == "cuda"
    assert OP(x, bias).is_cuda


@pytest.mark.parametrize("backend", KERNELS)
def test_cpu_tensors_are_refused(backend: str) -> None:
    with pytest.raises(BackendUnavailable, match="DUALOP_INTERPRET=1"):
        OP(torch.randn(4, 8), torch.randn(8), backend=backend)


@pytest.mark.parametrize("backend", ("reference", *KERNELS))
def test_mixed_devices(backend: str) -> None:
    x, bias, gy = features()
    with pytest.raises(DeviceError):
        OP(x, bias.cpu(), backend=backend)
    with pytest.raises(DeviceError):
        OP(x.detach().cpu(), bias, backend=backend)
    # A number may lie on the CPU, as with torch's own functions; its gradient comes back there.
    number = torch.tensor(0.25, requires_grad=True)
    gx, g = torch.autograd.grad(OP(x, number, backend=backend), (x, number), gy)
    assert gx.is_cuda and g.device.type == "cpu"
    right = expected(x, number.cuda(), gy)
    close(gx, right[1])
    close(g, right[2])
    tangents = torch.func.jvp(lambda x, a: OP(x, a, backend=backend), (x, number), (torch.ones_like(x), torch.ones(())))
    assert tangents[1].is_cuda


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu_while_the_first_is_current(backend: str) -> None:
    x, bias, gy = (t.detach().to("cuda:1").requires_grad_() for t in features())
    y = OP(x, bias, backend=backend)
    got = [y, *torch.autograd.grad(y, (x, bias), gy)]
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in got)
    for one, right in zip(got, expected(x, bias, gy), strict=True):
        close(one, right)


# ---- streams and graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_a_side_stream(backend: str) -> None:
    """The input is written late on that stream: a launch on any other would read what was there before."""
    x, bias, gy = features()
    source = x.detach().clone()
    late = torch.full_like(source, torch.nan)
    OP(x, bias, backend=backend).sum().backward()  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        leaf = late.detach().requires_grad_()
        y = OP(leaf, bias, backend=backend)
    gradients = torch.autograd.grad(y, (leaf, bias), gy)  # autograd goes back to the stream of the forward
    torch.cuda.synchronize()
    for got, right in zip([y, *gradients], expected(source, bias, gy), strict=True):
        close(got, right)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_cuda_graph(backend: str) -> None:
    x, bias, gy = features()

    def step() -> list[Tensor]:
        y = OP(x, bias, backend=backend)
        return [y, *torch.autograd.grad(y, (x, bias), gy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(3):
        with torch.no_grad():
            for t in (x, bias, gy):
                t.copy_(torch.randn_like(t))
        graph.replay()
        for got, right in zip(results, expected(x, bias, gy), strict=True):
            close(got, right)


def in_sequence(
    x: Tensor, bias: Tensor, backends: Sequence[str], between: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """Kernels that each read what others have just written: ours, torch's, copies, and one of another stream."""
    turn, y, side, results = itertools.cycle(backends), x, torch.cuda.Stream(), []

    def forward(z: Tensor, operand: Tensor) -> Tensor:
        z = OP(z, operand, backend=next(turn))
        between()
        return z

    for _ in range(6):
        y = forward(forward(y, bias), bias)
        other = forward(y + 1, bias)
        gx, gb = torch.ops.dualop.backward(other.clone(), y, [bias], OP.text, next(turn), [True, True])
        between()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            far = forward(gx, gb)
        y = forward(torch.empty_like(y).zero_(), gb)
        torch.cuda.current_stream().wait_stream(side)
        y = forward(y - far, bias) * 3 - 1
        between()
        results += [y, gx, gb, far]
    return results


@pytest.mark.parametrize("backend", [("cuda",), ("triton",), ("cuda", "triton", "triton")], ids="-".join)
@pytest.mark.parametrize("shape", [(8, 64), (700, 4100), (2048, 8192)], ids=str)
def test_a_kernel_waits_for_the_one_before(shape: tuple[int, int], backend: tuple[str, ...]) -> None:
    """Its blocks may begin before that has ended; what they read must not show it, not in a graph either."""
    x, bias, _ = (t.detach() for t in features(torch.bfloat16, *shape))
    right = in_sequence(x, bias, backend, torch.cuda.synchronize)
    same = lambda results: [torch.equal(a, b) for a, b in zip(results, right, strict=True)]
    assert all(r.isfinite().all() for r in right)
    for _ in range(5):
        assert all(same(in_sequence(x, bias, backend)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = in_sequence(x, bias, backend)
    for _ in range(5):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        assert all(same(results))


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


SYNC_CASES = ["features", "channel", "per row", "full", "x transposed, operand not", "operand expanded", "gy of a sum"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", [*SYNC_CASES, "a number on the CPU"])
def test_no_synchronisation(name: str, backend: str, no_synchronisation: None) -> None:
    case = next((c for c in CASES if c.name == name), None)
    x, operands, gy = make(case or CASES[0], "cuda")
    if case is None:
        operands = [torch.tensor(0.25)]
    # The gradient of a number on the CPU would have to come to the CPU.
    leaves = [t.detach().requires_grad_(t.is_cuda) for t in (x, *operands)]
    wanted = [t for t in leaves if t.requires_grad]
    torch.autograd.grad(OP(*leaves, backend=backend), wanted, gy)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.autograd.grad(OP(*leaves, backend=backend), wanted, gy)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak(function: object) -> tuple[object, int]:
    """What a function returns, and the most bytes that it held at once beyond those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()  # type: ignore[operator]
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slices", [False, True])
def test_memory(backend: str, dtype: torch.dtype, slices: bool) -> None:
    """Forward allocates its result; backward the gradients and few partial sums. A slice of rows is not copied."""
    x, bias, gy = features(dtype, 8192, 4096)
    if slices:
        x = torch.randn(8192, 5000, device="cuda", dtype=dtype)[:, 8 : 8 + 4096].requires_grad_()
    torch.autograd.grad(OP(x, bias, backend=backend), (x, bias), gy)
    size, slack = gy.numel() * gy.element_size(), 4096
    partials = 16 * 2**20  # one for each program and column: as many, however large the data is
    y, used = peak(lambda: OP(x, bias, backend=backend))
    assert size <= used <= size + slack
    _, used = peak(lambda: torch.autograd.grad(y, (x, bias), gy, retain_graph=True))
    assert size <= used <= size + partials + slack
    # A gradient that nobody wants costs nothing.
    y = OP(x.detach(), bias, backend=backend)
    _, used = peak(lambda: torch.autograd.grad(y, bias, gy, retain_graph=True))
    assert used <= partials + slack


@pytest.mark.parametrize("backend", KERNELS)
def test_only_inputs_are_kept_for_backward(backend: str) -> None:
    x, bias, _ = features(torch.float32, 8192, 4096)
    before = torch.cuda.memory_allocated()
    y = OP(x, bias, backend=backend)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= y.numel() * 4 + 4096


# ---- more elements than 32 bits count --------------------------------------------------------------------------------

large = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
    reason="needs 60 GiB",
)


@large
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("operand", ["features", "per row", "full"])
def test_more_than_2_to_the_31_elements(backend: str, operand: str) -> None:
    """Rows at both ends and in the middle are those of a call on these rows alone."""
    rows, columns = 262_147, 8192  # 3 rows more than 2^31 elements
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    x, gy = normal(rows, columns), normal(rows, columns)
    assert x.numel() > 2**31
    a = normal(*{"features": (columns,), "per row": (rows, 1), "full": (rows, columns)}[operand])
    leaves = [x.requires_grad_(), a.requires_grad_()]
    y = OP(*leaves, backend=backend)
    gx, ga = torch.autograd.grad(y, leaves, gy)
    total = torch.zeros(columns, dtype=torch.float64, device="cuda")
    for part in (slice(0, 5), slice(rows - 7, rows), slice(131_070, 131_075)):
        pieces = [t.detach().requires_grad_() for t in (x[part], a if operand == "features" else a[part])]
        y_part = OP(*pieces, backend=backend)
        gradients = torch.autograd.grad(y_part, pieces, gy[part])
        torch.testing.assert_close(y[part], y_part)
        torch.testing.assert_close(gx[part], gradients[0])
        if operand != "features":
            torch.testing.assert_close(ga[part], gradients[1])
    if operand == "features":
        for start in range(0, rows, 16384):
            piece = x[start : start + 16384].detach()
            bias = a.detach().float().requires_grad_()
            (g,) = torch.autograd.grad(OP(piece, bias, backend=backend), bias, gy[start : start + 16384].float())
            total += g.double()
        scale = total.abs().max().item()
        torch.testing.assert_close(ga.double(), total, rtol=2**-8, atol=2**-7 * scale)


@large
@pytest.mark.parametrize("backend", KERNELS)
def test_one_dimension_of_more_than_2_to_the_31_elements(backend: str) -> None:
    n = 2**31 + 8192 * 3 + 5
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16).requires_grad_()
    number = torch.tensor(0.5, device="cuda", dtype=torch.bfloat16)
    y = OP(x, number, backend=backend)
    (gx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=torch.bfloat16).expand(n))
    for start in (0, 2**31 - 4096, n - 8197):
        piece = x.detach()[start : start + 8197].clone().requires_grad_()
        y_piece = OP(piece, number, backend=backend)
        (gx_piece,) = torch.autograd.grad(y_piece, piece, torch.ones_like(y_piece))
        torch.testing.assert_close(y[start : start + 8197], y_piece)
        torch.testing.assert_close(gx[start : start + 8197], gx_piece)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(backend: str, mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, b: OP(x * 2, b, backend=backend) + 1, mode=mode, fullgraph=True)
    for _ in range(3):  # the third replays a graph
        x, bias, gy = features()
        y = compiled(x, bias)
        gx, gb = torch.autograd.grad(y, (x, bias), gy)
        right = expected(2 * x, bias, gy)
        close(y.detach() - 1, right[0])
        close(gx, 2 * right[1])
        close(gb, right[2])
