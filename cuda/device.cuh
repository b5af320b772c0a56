// The names that the kernels use beyond CUDA C++ itself, with their meaning on a GPU; host.cuh gives the same names a
// meaning on the CPU.
//
// cuda_fp16.h and cuda_bf16.h stay out: they would double the time a chain takes to compile, and 16-bit numbers are
// needed for nothing but being converted. They travel as their bits: unsigned short, or unsigned for a pair.
#pragma once

#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "dualop needs compute capability 8.0 or later: take older ones off TORCH_CUDA_ARCH_LIST"
#endif

#define DUALOP_FUN __device__ __forceinline__
#define DUALOP_CONST __host__ __device__ constexpr
#define DUALOP_EXPORT extern "C" __attribute__((visibility("default")))

namespace dualop {

// ---- bits -----------------------------------------------------------------------------------------------------------

DUALOP_FUN unsigned bits_of(float x) { return __float_as_uint(x); }
DUALOP_FUN unsigned long long bits_of(double x) { return __double_as_longlong(x); }
DUALOP_FUN float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
DUALOP_FUN double double_of_bits(unsigned long long bits) { return __longlong_as_double(bits); }

// ---- special functions: one instruction each, subnormals taken as and flushed to zero unless said otherwise ---------

DUALOP_FUN float ex2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DUALOP_FUN float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Relative error up to 2^-11; keeps subnormals.
DUALOP_FUN float tanh_approx(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// a / b, off by up to 2 ulps, subnormals included: a divisor beyond 2^126 or below 2^-126 is scaled first.
DUALOP_FUN float div_full(float a, float b) {
    float y;
    asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// a - b, where b may be a product: a compiler that made one fma of both would take b before it was rounded.
DUALOP_FUN float minus_rounded(float a, float b) { return __fsub_rn(a, b); }

// ---- 16-bit floats: round to nearest even, overflow to infinity, NaN becomes 0x7fff ---------------------------------

DUALOP_FUN unsigned short to_bf16(float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DUALOP_FUN unsigned short to_f16(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DUALOP_FUN float from_bf16(unsigned short x) { return float_of_bits(static_cast<unsigned>(x) << 16); }

DUALOP_FUN float from_f16(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// A pair lies in memory as lo, hi: lo in the low half of the word. PTX names the high half first.
DUALOP_FUN unsigned pack_bf16x2(float lo, float hi) {
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

DUALOP_FUN unsigned pack_f16x2(float lo, float hi) {
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

DUALOP_FUN void unpack_bf16x2(unsigned pair, float& lo, float& hi) {
    lo = float_of_bits(pair << 16);
    hi = float_of_bits(pair & 0xffff0000u);
}

DUALOP_FUN void unpack_f16x2(unsigned pair, float& lo, float& hi) {
    lo = from_f16(static_cast<unsigned short>(pair));
    hi = from_f16(static_cast<unsigned short>(pair >> 16));
}

// ---- minimum and maximum that keep NaN, as torch's do; the float forms order -0 below +0 ----------------------------

DUALOP_FUN float min_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

DUALOP_FUN float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// Where a is NaN it is taken by the second test; where b is, both tests fail and b is taken.
DUALOP_FUN double min_nan(double a, double b) { return a < b || a != a ? a : b; }
DUALOP_FUN double max_nan(double a, double b) { return a > b || a != a ? a : b; }

// ---- raw memory: one access of 1, 2, 4, 8 or 16 bytes, aligned to its width -----------------------------------------

// `word` holds the bytes in memory order, 32 bits each where there are that many.
template <int bytes> struct Bytes;
template <> struct Bytes<1> { using Vector = unsigned char; unsigned char word[1]; };
template <> struct alignas(2) Bytes<2> { using Vector = unsigned short; unsigned short word[1]; };
template <> struct alignas(4) Bytes<4> { using Vector = unsigned; unsigned word[1]; };
template <> struct alignas(8) Bytes<8> { using Vector = uint2; unsigned word[2]; };
template <> struct alignas(16) Bytes<16> { using Vector = uint4; unsigned word[4]; };

namespace raw {  // between a Bytes and the built-in vector type that the compiler moves in one instruction
template <class V> DUALOP_FUN void put(unsigned char* w, V v) { w[0] = v; }
template <class V> DUALOP_FUN void put(unsigned short* w, V v) { w[0] = v; }
DUALOP_FUN void put(unsigned* w, unsigned v) { w[0] = v; }
DUALOP_FUN void put(unsigned* w, uint2 v) { w[0] = v.x, w[1] = v.y; }
DUALOP_FUN void put(unsigned* w, uint4 v) { w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w; }
DUALOP_FUN unsigned char get(const Bytes<1>& b) { return b.word[0]; }
DUALOP_FUN unsigned short get(const Bytes<2>& b) { return b.word[0]; }
DUALOP_FUN unsigned get(const Bytes<4>& b) { return b.word[0]; }
DUALOP_FUN uint2 get(const Bytes<8>& b) { return make_uint2(b.word[0], b.word[1]); }
DUALOP_FUN uint4 get(const Bytes<16>& b) { return make_uint4(b.word[0], b.word[1], b.word[2], b.word[3]); }
}  // namespace raw

template <int bytes> DUALOP_FUN Bytes<bytes> load_raw(const void* from) {
    Bytes<bytes> result;
    raw::put(result.word, *static_cast<const typename Bytes<bytes>::Vector*>(from));
    return result;
}

// 16 bytes from any address, out of the two aligned accesses that hold them.
DUALOP_FUN Bytes<16> load_unaligned_raw(const void* from) {
    const unsigned long long address = reinterpret_cast<unsigned long long>(from), skip = address & 15;
    const uint4* aligned = reinterpret_cast<const uint4*>(address - skip);
    const uint4 low = aligned[0], high = aligned[1];
    const unsigned word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    unsigned two[6], one[5];
#pragma unroll
    for (int i = 0; i < 6; i++) two[i] = skip & 8 ? word[i + 2] : word[i];
#pragma unroll
    for (int i = 0; i < 5; i++) one[i] = skip & 4 ? two[i + 1] : two[i];
    Bytes<16> result;
#pragma unroll
    for (int i = 0; i < 4; i++) result.word[i] = __funnelshift_r(one[i], one[i + 1], static_cast<unsigned>(skip & 3) * 8);
    return result;
}

// In PTX, since the compiler splits a store of uint4 into four where it also sees the store of a single element.
template <int bytes> DUALOP_FUN void store_raw(void* to, Bytes<bytes> value) {
    const auto& w = value.word;
    if constexpr (bytes == 16) {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
    } else if constexpr (bytes == 8) {
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(to), "r"(w[0]), "r"(w[1]) : "memory");
    } else {
        *static_cast<typename Bytes<bytes>::Vector*>(to) = raw::get(value);
    }
}

// ---- launching ------------------------------------------------------------------------------------------------------

// Every kernel begins with the first. A block calls the second when only its sums are left to do, or just ends.
DUALOP_FUN void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DUALOP_FUN void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Whether all that was compiled here waits as it should, for whichever GPU.
constexpr bool waits() {
    constexpr int architectures[] = {__CUDA_ARCH_LIST__};
    for (int architecture : architectures) {
        if (architecture < 900) return false;
    }
    return true;
}

// Queues a kernel on a cudaStream_t given as void*. From compute capability 9.0 on (programmatic dependent launch) its
// blocks are launched once all blocks of the kernel before have called let_next_kernel_begin(), or ended. A bad
// configuration shows in last_error() only.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, void* stream, A... args) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early, config.numAttrs = waits();
    cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

// 0, or the cudaError_t of the calling thread's last failure, which it clears.
inline int last_error() { return static_cast<int>(cudaGetLastError()); }
inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dualop
