"""cuda/host.cuh means what a GPU means: conversions, barriers, shuffles, memory, limits."""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dualop.build import build, toolchain
from dualop.build.build import Build
from dualop.build.sources import cuda_header

KERNELS = r"""
namespace dualop {

__global__ void to_16(const float* x, unsigned short* bf16, unsigned short* f16, unsigned* bf16x2, unsigned* f16x2) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    bf16[i] = to_bf16(x[i]), f16[i] = to_f16(x[i]);
    if (i % 2 == 0) bf16x2[i / 2] = pack_bf16x2(x[i], x[i + 1]), f16x2[i / 2] = pack_f16x2(x[i], x[i + 1]);
}

__global__ void from_16(const unsigned* pairs, float* singles, float* both, int f16) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned short lo = pairs[i] & 0xffff, hi = pairs[i] >> 16;
    singles[2 * i] = f16 ? from_f16(lo) : from_bf16(lo), singles[2 * i + 1] = f16 ? from_f16(hi) : from_bf16(hi);
    if (f16) unpack_f16x2(pairs[i], both[2 * i], both[2 * i + 1]);
    else unpack_bf16x2(pairs[i], both[2 * i], both[2 * i + 1]);
}

__global__ void special(const float* x, float* y, unsigned n) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = ex2_approx(x[i]), y[n + i] = rcp_approx(x[i]), y[2 * n + i] = tanh_approx(x[i]);
}

template <class T> __global__ void extremes(const T* a, const T* b, T* low, T* high) {
    low[threadIdx.x] = min_nan(a[threadIdx.x], b[threadIdx.x]);
    high[threadIdx.x] = max_nan(a[threadIdx.x], b[threadIdx.x]);
}

// Threads past the row's end leave before the barriers, as kernels' tails do.
__global__ void __launch_bounds__(1024) sums(const float* __restrict__ x, double* y, int n) {
    __shared__ double part[1024];
    int t = threadIdx.x + blockDim.x * threadIdx.y, threads = blockDim.x * blockDim.y;
    if (t >= n) return;
    part[t] = 0;
    for (int i = t; i < n; i += threads) part[t] += __ldg(x + static_cast<long long>(blockIdx.x) * n + i);
    for (int half = 512; half > 0; half /= 2) {
        __syncthreads();
        if (t < half && t + half < threads && t + half < n) part[t] += part[t + half];
    }
    if (t == 0) y[blockIdx.x] = part[0];
}

template <class T> __global__ void warp_sums(const T* x, T* y) {
    __shared__ T part[32];
    T sum = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : T(0);
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(~0u, sum, delta);
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

__global__ void shuffles(int* got, int by, int width) {
    int lane = threadIdx.x, n = blockDim.x;
    got[lane] = __shfl_xor_sync(~0u, lane, by, width);
    got[n + lane] = __shfl_down_sync(~0u, lane, by, width);
    got[2 * n + lane] = __shfl_sync(~0u, lane, by, width);
    unsigned half = lane % 32 < 16 ? 0xffffu : 0xffff0000u;  // two groups that meet on their own
    got[3 * n + lane] = lane % 32 < 16 ? __shfl_xor_sync(half, lane, 1) : __shfl_xor_sync(half, lane, 2);
    __syncwarp();
}

__global__ void half_shuffle(float* got) {  // the upper half is not there
    if (threadIdx.x < 16) got[threadIdx.x] = __shfl_down_sync(0xffffu, 1.0f, 8);
}

__global__ void places(int* seen, int threads) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    __syncthreads();  // a thread keeps its place across a switch
    int again = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    seen[block * threads + thread] += thread == again ? 1 : 100;
}

template <int bytes> __global__ void copy(const void* from, void* to) {
    long long at = (blockIdx.x * blockDim.x + threadIdx.x) * bytes;
    store_raw(static_cast<char*>(to) + at, load_raw<bytes>(static_cast<const char*>(from) + at));
}

__global__ void lost_barrier() {
    if (threadIdx.x < 16) __syncthreads();
    else __syncwarp();
}
__global__ void lost_lane() {
    if (threadIdx.x == 0) __syncwarp(2u);
}

}  // namespace dualop

using namespace dualop;
using f32 = float;
using f64 = double;

DUALOP_EXPORT int run_to_16(const f32* x, unsigned short* b, unsigned short* f, unsigned* b2, unsigned* f2, int n) {
    launch(to_16, n / 256, 256, nullptr, x, b, f, b2, f2);
    return last_error();
}
DUALOP_EXPORT int run_from_16(const unsigned* pairs, f32* singles, f32* both, int f16) {
    launch(from_16, 128, 256, nullptr, pairs, singles, both, f16);
    return last_error();
}
DUALOP_EXPORT int run_special(const f32* x, f32* y, int n) {
    launch(special, (n + 127) / 128, 128, nullptr, x, y, n);
    return last_error();
}
DUALOP_EXPORT int run_extremes(const f32* a, const f32* b, f32* low, f32* high, int n) {
    launch(extremes<f32>, 1, n, nullptr, a, b, low, high);
    return last_error();
}
DUALOP_EXPORT int run_extremes64(const f64* a, const f64* b, f64* low, f64* high, int n) {
    launch(extremes<f64>, 1, n, nullptr, a, b, low, high);
    return last_error();
}
DUALOP_EXPORT int run_sums(const f32* x, f64* y, int rows, int n, int block_x, int block_y) {
    launch(sums, rows, dim3(block_x, block_y), nullptr, x, y, n);
    return last_error();
}
DUALOP_EXPORT int run_warp_sums(const f32* x, f32* y, int rows, int n) {
    launch(warp_sums<f32>, rows, n, nullptr, x, y);
    return last_error();
}
DUALOP_EXPORT int run_warp_sums64(const f64* x, f64* y, int rows, int n) {
    launch(warp_sums<f64>, rows, n, nullptr, x, y);
    return last_error();
}
DUALOP_EXPORT int run_shuffles(int* got, int n, int by, int width) {
    launch(shuffles, 1, n, nullptr, got, by, width);
    return last_error();
}
DUALOP_EXPORT int run_half_shuffle(f32* got) {
    launch(half_shuffle, 1, 32, nullptr, got);
    return last_error();
}
DUALOP_EXPORT int run_places(int* seen, const int* g, const int* b) {
    launch(places, dim3(g[0], g[1], g[2]), dim3(b[0], b[1], b[2]), nullptr, seen, b[0] * b[1] * b[2]);
    return last_error();
}
DUALOP_EXPORT int run_copy(const char* from, char* to, int width, int n) {
    switch (width) {
        case 1: launch(copy<1>, 1, n, nullptr, from, to); break;
        case 2: launch(copy<2>, 1, n, nullptr, from, to); break;
        case 4: launch(copy<4>, 1, n, nullptr, from, to); break;
        case 8: launch(copy<8>, 1, n, nullptr, from, to); break;
        case 16: launch(copy<16>, 1, n, nullptr, from, to); break;
    }
    return last_error();
}
DUALOP_EXPORT int run_lost_barrier() { launch(lost_barrier, 2, 32, nullptr); return last_error(); }
DUALOP_EXPORT int run_lost_lane() { launch(lost_lane, 1, 32, nullptr); return last_error(); }
DUALOP_EXPORT const char* text_of(int error) { return error_text(error); }
"""


def source(header: str) -> str:
    return cuda_header(header, host=header == "host.cuh") + KERNELS


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = Build("host_header", source("host.cuh"), host=True).load()
    loaded.text_of.restype = ctypes.c_char_p
    return loaded


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run(function, *arguments: np.ndarray | int) -> None:
    assert function(*(address(a) if isinstance(a, np.ndarray) else a for a in arguments)) == 0


def floats_to_round() -> np.ndarray:
    """Every 16-bit number, every tie between two of them with its neighbours, and random bits."""
    numbers = np.arange(1 << 16, dtype=np.uint16)
    bf16 = numbers.astype(np.uint32) << 16
    f16 = torch.from_numpy(numbers.view(np.int16)).view(torch.float16).float().numpy().view(np.uint32)
    parts = [bf16, f16]
    for every, half_a_step in ((bf16, 1 << 15), (f16, 1 << 12)):
        parts += [every + np.uint32(half_a_step + off) for off in (-1, 0, 1)]
    # float16's subnormals lie 2^-24 apart, so their ties at odd multiples of 2^-25.
    ties = (np.arange(1 << 13) * 2.0**-25).astype(np.float32)
    parts += [tie.view(np.uint32) for tie in (ties, -ties, *(np.nextafter(ties, np.float32(to)) for to in (-1, 1)))]
    parts += [np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)]
    return np.concatenate(parts).view(np.float32)


def test_rounding_to_16_bits_is_torchs(library: ctypes.CDLL) -> None:
    x = floats_to_round()
    assert len(x) % 256 == 0
    bf16, f16, bf16x2, f16x2 = (np.full(len(x), 0x5555, np.uint16) for _ in range(4))
    run(library.run_to_16, x, bf16, f16, bf16x2, f16x2, len(x))
    nan = np.isnan(x)
    assert nan.sum() > 1000
    for got, packed, dtype in ((bf16, bf16x2, torch.bfloat16), (f16, f16x2, torch.float16)):
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(got[~nan], expected[~nan])
        assert (got[nan] == 0x7FFF).all()  # what a GPU gives
        np.testing.assert_array_equal(packed, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_becomes_the_right_float(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    singles, both = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    run(library.run_from_16, bits, singles, both, int(dtype == torch.float16))
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(np.isnan(singles), np.isnan(expected))
    kept = ~np.isnan(expected)
    np.testing.assert_array_equal(singles[kept].view(np.uint32), expected[kept].view(np.uint32))  # -0 too
    np.testing.assert_array_equal(both.view(np.uint32), singles.view(np.uint32))


def test_special_functions(library: ctypes.CDLL, rng: torch.Generator) -> None:
    x = torch.cat([torch.randn(5000, generator=rng) * 30, torch.logspace(-37, 37, 999)]).numpy()
    y = np.zeros((3, len(x)), np.float32)
    run(library.run_special, x, y, len(x))
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        exact = np.stack([np.exp2(wide), 1 / wide, np.tanh(wide)]).astype(np.float32)
    normal = np.abs(exact) >= 2.0**-126
    normal[2] = True
    np.testing.assert_allclose(y[normal], exact[normal], rtol=2.0**-22)
    assert (y[:2][~normal[:2] & ~np.isnan(exact[:2])] == 0).all()


def test_special_functions_flush_subnormals_as_a_gpu_does(library: ctypes.CDLL) -> None:
    x = np.array([-130, 1e-40, -1e-40, 2.0**127, 0.0, np.inf, -np.inf, np.nan], np.float32)
    y = np.zeros((3, len(x)), np.float32)
    run(library.run_special, x, y, len(x))
    ex2, rcp, _ = y
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(ex2, [0, 1, 1, inf, 1, inf, 0, nan])
    np.testing.assert_array_equal(rcp[1:], [inf, -inf, 0, inf, 0, 0, nan])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minimum_and_maximum_keep_nan(library: ctypes.CDLL, dtype: type) -> None:
    values = np.array([-np.inf, -1, -0.0, 0.0, 2, np.inf, np.nan], dtype)
    a, b = (np.ascontiguousarray(grid.ravel()) for grid in np.meshgrid(values, values))
    low, high = np.zeros_like(a), np.zeros_like(a)
    run(library.run_extremes if dtype == np.float32 else library.run_extremes64, a, b, low, high, len(a))
    np.testing.assert_array_equal(low, np.minimum(a, b))
    np.testing.assert_array_equal(high, np.maximum(a, b))
    if dtype == np.float32:
        zeros = (a == 0) & (b == 0)
        np.testing.assert_array_equal(np.signbit(low[zeros]), np.signbit(a[zeros]) | np.signbit(b[zeros]))
        np.testing.assert_array_equal(np.signbit(high[zeros]), np.signbit(a[zeros]) & np.signbit(b[zeros]))


@pytest.mark.parametrize("block", [(1024, 1), (256, 1), (100, 1), (32, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("n", [1, 31, 1000, 3001])
def test_block_reduction(library: ctypes.CDLL, rng: torch.Generator, n: int, block: tuple[int, int]) -> None:
    x = torch.randn(5, n, generator=rng)
    y = np.full(5, np.nan)
    run(library.run_sums, x.numpy(), y, 5, n, *block)
    np.testing.assert_allclose(y, x.double().sum(1).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_warp_reduction(library: ctypes.CDLL, rng: torch.Generator, threads: int, dtype: torch.dtype) -> None:
    x = torch.randint(-1000, 1000, (7, threads), generator=rng).to(dtype)  # exact in any order
    y = np.full(7, np.nan, x.numpy().dtype)
    run(library.run_warp_sums if dtype == torch.float32 else library.run_warp_sums64, x.numpy(), y, 7, threads)
    np.testing.assert_array_equal(y, x.sum(1).numpy())


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("by", [0, 1, 3, 8, 31])
def test_shuffles(library: ctypes.CDLL, by: int, width: int) -> None:
    got = np.full((4, 64), -7, np.int32)
    run(library.run_shuffles, got, 64, by, width)
    lane = np.arange(64)
    last = lane | (width - 1)
    xor, down = lane ^ by, lane + by
    expected = [
        np.where(xor <= last, xor, lane),
        np.where(down <= last, down, lane),
        (lane & ~(width - 1)) | (by & (width - 1)),
        lane ^ np.where(lane % 32 < 16, 1, 2),
    ]
    np.testing.assert_array_equal(got, expected)


def test_shuffle_from_a_lane_that_is_not_there_is_nan(library: ctypes.CDLL) -> None:
    got = np.zeros(16, np.float32)
    run(library.run_half_shuffle, got)
    np.testing.assert_array_equal(got, [1] * 8 + [np.nan] * 8)


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("block", [(33, 1, 1), (4, 5, 6)], ids=str)
def test_every_thread_of_every_block_runs_once(library: ctypes.CDLL, grid: tuple, block: tuple) -> None:
    seen = np.zeros(np.prod(grid) * np.prod(block), np.int32)
    run(library.run_places, seen, np.array(grid, np.int32), np.array(block, np.int32))
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 1, 1), (1025, 1, 1)), ((1, 65536, 1), (1, 1, 1)), ((0, 1, 1), (1, 1, 1))], ids=str
)
def test_launch_that_cuda_refuses_is_refused(library: ctypes.CDLL, grid: tuple, block: tuple) -> None:
    seen = np.zeros(2000, np.int32)
    shape = [np.array(sizes, np.int32) for sizes in (grid, block)]
    error = library.run_places(address(seen), *map(address, shape))
    assert (error, library.text_of(error)) == (9, b"invalid configuration argument")
    assert not seen.any()
    run(library.run_places, seen, np.ones(3, np.int32), np.ones(3, np.int32))  # no error is left over


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_raw_access_moves_every_byte(library: ctypes.CDLL, width: int) -> None:
    data = np.random.default_rng(width).integers(0, 256, 64 * width + 16, dtype=np.uint8)
    start = -data.ctypes.data % 16
    data = data[start:]
    buffer = np.zeros(64 * width + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    to = buffer[start : start + 64 * width]
    run(library.run_copy, data, to, width, 64)
    np.testing.assert_array_equal(to, data[: 64 * width])


def test_launches_of_two_threads_take_turns(library: ctypes.CDLL, rng: torch.Generator) -> None:
    x = torch.randint(-1000, 1000, (2, 50, 256), generator=rng).float().numpy()
    y = np.full((2, 20, 50), np.nan, np.float32)

    def many(thread: int) -> None:
        for turn in range(20):  # ctypes lets go of the interpreter's lock
            run(library.run_warp_sums, x[thread], y[thread, turn], 50, 256)

    threads = [threading.Thread(target=many, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(y, np.broadcast_to(x.sum(-1)[:, None], y.shape))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("run_lost_barrier()", r"block \(0, 0, 0\).*can never be completed.* 32 live .* 16 wait .* 16 in a warp"),
        ("run_lost_lane()", "mask does not name the calling lane"),
        ("run_copy(buffer + 4, buffer + 64, 16, 1)", "misaligned access of 16 bytes"),
        ("run_copy(buffer, buffer + 66, 4, 1)", "misaligned access of 4 bytes"),
    ],
    ids=["barrier", "mask", "load", "store"],
)
def test_what_a_gpu_would_not_survive_aborts(library: ctypes.CDLL, call: str, said: str) -> None:
    script = (
        f"import ctypes, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"class library: pass\n"
        f"loaded = ctypes.CDLL({library._name!r})\n"
        f"for name in ('run_copy', 'run_lost_barrier', 'run_lost_lane'):\n"
        f"    setattr(library, name, getattr(loaded, name))\n"
        f"library.run_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)\n"
        f"raw = ctypes.create_string_buffer(1024)\n"
        f"buffer = (ctypes.addressof(raw) + 63) & ~63\n"
        f"library.{call}\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGABRT
    assert re.search(said, ended.stderr)


def test_libraries_do_not_share_their_shared_memory() -> None:
    """g++ makes a template's static storage one object in the whole process, whatever its size, unless told not to."""
    kernel = """
namespace dualop {
template <class T> __global__ void where(T** y) { __shared__ T storage[%d]; *y = storage; }
}
DUALOP_EXPORT void* run_where() {
    float* y;
    dualop::launch(dualop::where<float>, 1, 1, nullptr, &y);
    return y;
}
"""
    text = cuda_header("host.cuh", host=True)
    libraries = [Build("host_storage", text + kernel % size, host=True).load() for size in (4, 4096)]
    for library in libraries:
        library.run_where.restype = ctypes.c_void_p
    assert libraries[0].run_where() != libraries[1].run_where()


def test_both_headers_give_the_same_names() -> None:
    function = re.compile(r"^(?:template <.*?> )?(?:DUALOP_FUN|inline|void)[\w<> ,*]*?[ *](\w+)\(", re.MULTILINE)
    other = re.compile(r"^(?:#define |template <> struct (?:alignas\(\d+\) )?)(DUALOP_\w+|Bytes<\d+>)", re.MULTILINE)

    def names(header: str) -> set[str]:
        text = cuda_header(header, host=header == "host.cuh")
        return {*function.findall(text), *other.findall(text)}

    device, host = names("device.cuh"), names("host.cuh")
    assert {"ex2_approx", "pack_f16x2", "load_raw", "launch", "error_text", "Bytes<16>", "DUALOP_EXPORT"} <= device
    assert device - {"put", "get"} <= host


@pytest.mark.skipif(toolchain.cuda_home() is None, reason="no nvcc")
def test_nvcc_takes_the_same_kernels_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "kernels.cu").write_text(source("device.cuh"))
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]
    flags = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", *build.CUDA_FLAGS]
    command = [toolchain.cuda_home() / "bin" / "nvcc", *flags, *targets, "-c", "kernels.cu", "-o", "kernels.o"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    assert "warning" not in compiled.stderr
    for stack, spilled in re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", compiled.stderr):
        assert (stack, spilled) == ("0", "0")


@pytest.mark.parametrize("flags", [("-Wall", "-Wextra", "-Werror"), ("-D_FORTIFY_SOURCE=2",)], ids=str)
def test_host_compiler(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Without a warning; and a fortified build, the default of some distributions, may switch stacks."""
    (tmp_path / "kernels.cpp").write_text(source("host.cuh"))
    command = [toolchain.find_cxx(), *build.HOST_FLAGS, *flags, "-shared", "kernels.cpp", "-o", "kernels.so"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    got = np.full((4, 64), -7, np.int32)
    run(ctypes.CDLL(str(tmp_path / "kernels.so")).run_shuffles, got, 64, 1, 32)
    np.testing.assert_array_equal(got[0], np.arange(64) ^ 1)
