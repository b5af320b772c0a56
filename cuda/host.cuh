// The meaning on a CPU of what the kernels are written in: CUDA's own names and those of device.cuh. A kernel file
// compiled with g++ against this header runs its own indexing, tails, barriers, reductions and mathematics, one block
// after the other, its threads as fibers (fibers.cuh). It is slow and it is the same code.
//
// Stricter than a GPU: a misaligned access, a barrier that can never be completed and a warp operation by a lane that
// its mask does not name abort the process with a message; a shuffle from a lane that does not take part gives
// all-ones bits, a NaN. Not covered: dynamic shared memory, streams, atomics, textures.
#pragma once
#include "fibers.cuh"

// ---- CUDA's barriers and warp shuffles ------------------------------------------------------------------------------

inline void __syncthreads() { dualop::host::machine->block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
    dualop::host::machine->meet(mask, dualop::host::machine->lane(), 0);
}

// Segments of `width` lanes; a source outside the segment means the lane itself, as in the PTX manual.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    int lane = dualop::host::machine->lane();
    return dualop::host::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = dualop::host::machine->lane(), source = lane + static_cast<int>(delta & 31);
    return dualop::host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = dualop::host::machine->lane(), source = lane - static_cast<int>(delta & 31);
    return dualop::host::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    int lane = dualop::host::machine->lane(), source = lane ^ (lanes & 31);
    return dualop::host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <class T> T __ldg(const T* address) {
    dualop::host::check_aligned(address, alignof(T));
    return *address;
}

namespace dualop {

// ---- bits -----------------------------------------------------------------------------------------------------------

template <class To, class From> To bit_copy(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
DUALOP_FUN unsigned bits_of(float x) { return bit_copy<unsigned>(x); }
DUALOP_FUN unsigned long long bits_of(double x) { return bit_copy<unsigned long long>(x); }
DUALOP_FUN float float_of_bits(unsigned bits) { return bit_copy<float>(bits); }
DUALOP_FUN double double_of_bits(unsigned long long bits) { return bit_copy<double>(bits); }

// ---- special functions: correct to about an ulp, where a GPU's are off by up to about 2^-22 (tanh: 2^-11).
// So the host shows whether the formula is right, and only a GPU whether the approximations are good enough for it.
// Subnormals are flushed as there: a formula that divides by one fails here too.

DUALOP_FUN float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
DUALOP_FUN float ex2_approx(float x) { return flush(exp2f(flush(x))); }
DUALOP_FUN float rcp_approx(float x) { return flush(1.0f / flush(x)); }
DUALOP_FUN float tanh_approx(float x) { return tanhf(x); }
DUALOP_FUN float div_full(float a, float b) { return a / b; }

DUALOP_FUN float minus_rounded(float a, float b) { return a - b; }

// ---- 16-bit floats: round to nearest even, overflow to infinity, NaN becomes 0x7fff ---------------------------------

DUALOP_FUN unsigned short to_bf16(float x) {
    unsigned bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

DUALOP_FUN unsigned short to_f16(float x) {
    unsigned bits = bits_of(x), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fff;
    if (bits >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 65520, half way to 2^16
    if (bits < 0x38800000u) {  // below 2^-14: floats from 0.5 on lie 2^-24 apart, as half's subnormals do
        return static_cast<unsigned short>(sign | (bits_of(float_of_bits(bits) + 0.5f) - bits_of(0.5f)));
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return static_cast<unsigned short>(sign | ((bits - 0x38000000u) >> 13));
}

DUALOP_FUN float from_bf16(unsigned short x) { return float_of_bits(static_cast<unsigned>(x) << 16); }

DUALOP_FUN float from_f16(unsigned short x) {
    unsigned sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) return copysignf(static_cast<float>(magnitude) * 0x1p-24f, float_of_bits(sign));
    return float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
}

// A pair lies in memory as lo, hi: lo in the low half of the word.
DUALOP_FUN unsigned pack_bf16x2(float lo, float hi) { return to_bf16(lo) | static_cast<unsigned>(to_bf16(hi)) << 16; }
DUALOP_FUN unsigned pack_f16x2(float lo, float hi) { return to_f16(lo) | static_cast<unsigned>(to_f16(hi)) << 16; }

DUALOP_FUN void unpack_bf16x2(unsigned pair, float& lo, float& hi) {
    lo = float_of_bits(pair << 16);
    hi = float_of_bits(pair & 0xffff0000u);
}

DUALOP_FUN void unpack_f16x2(unsigned pair, float& lo, float& hi) {
    lo = from_f16(static_cast<unsigned short>(pair));
    hi = from_f16(static_cast<unsigned short>(pair >> 16));
}

// ---- minimum and maximum that keep NaN, as torch's do; the float forms order -0 below +0 ----------------------------

DUALOP_FUN float min_nan(float a, float b) { return a < b || a != a || (a == b && signbit(a)) ? a : b; }
DUALOP_FUN float max_nan(float a, float b) { return a > b || a != a || (a == b && !signbit(a)) ? a : b; }
DUALOP_FUN double min_nan(double a, double b) { return a < b || a != a ? a : b; }
DUALOP_FUN double max_nan(double a, double b) { return a > b || a != a ? a : b; }

// ---- raw memory: one access of 1, 2, 4, 8 or 16 bytes, aligned to its width -----------------------------------------

template <int bytes> struct Bytes;
template <> struct Bytes<1> { unsigned char word[1]; };
template <> struct alignas(2) Bytes<2> { unsigned short word[1]; };
template <> struct alignas(4) Bytes<4> { unsigned word[1]; };
template <> struct alignas(8) Bytes<8> { unsigned word[2]; };
template <> struct alignas(16) Bytes<16> { unsigned word[4]; };

template <int bytes> DUALOP_FUN Bytes<bytes> load_raw(const void* from) {
    host::check_aligned(from, bytes);
    Bytes<bytes> result;
    memcpy(&result, from, bytes);
    return result;
}

DUALOP_FUN Bytes<16> load_unaligned_raw(const void* from) {
    Bytes<16> result;
    memcpy(&result, from, 16);
    return result;
}

template <int bytes> DUALOP_FUN void store_raw(void* to, Bytes<bytes> value) {
    host::check_aligned(to, bytes);
    memcpy(to, &value, bytes);
}

// ---- launching ------------------------------------------------------------------------------------------------------

// Runs the whole grid before it returns; the stream is ignored. Launches of two OS threads take turns.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, void*, A... args) {
    auto thread = [&] { kernel(static_cast<P>(args)...); };
    host::run(grid, block, [](void* it) { (*static_cast<decltype(thread)*>(it))(); }, &thread);
}

DUALOP_FUN void wait_for_kernel_before() {}
DUALOP_FUN void let_next_kernel_begin() {}

// 0, or 9 after a launch with a grid or block that CUDA would refuse; clears it.
inline int last_error() {
    int error = host::pending_error;
    host::pending_error = 0;
    return error;
}
inline const char* error_text(int error) { return error == 0 ? "no error" : "invalid configuration argument"; }

}  // namespace dualop
