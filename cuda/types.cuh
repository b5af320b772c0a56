// The types of memory and of arithmetic, and `Pack`: neighbouring elements moved in accesses of up to 16 bytes.
#pragma once
#include "platform.cuh"

namespace dualop {

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

template <bool condition, class A, class B> struct Select { using type = A; };
template <class A, class B> struct Select<false, A, B> { using type = B; };

// `bits`: significant bits of the result, 8 (bfloat16), 11 (float16), 24 (float32) or 53 (float64). Arithmetic is
// float32 below 53, and only as accurate as a result of so many bits can show.
template <int bits> using real = typename Select<bits == 53, double, float>::type;
template <class T> constexpr int significant_bits = 24;
template <> constexpr int significant_bits<bfloat16> = 8;
template <> constexpr int significant_bits<float16> = 11;
template <> constexpr int significant_bits<double> = 53;

// A double as a template argument: its bits, since C++17 takes no double there.
using number_bits = unsigned long long;
DUALOP_CONST number_bits number(double x) { return __builtin_bit_cast(number_bits, x); }
template <class T> DUALOP_CONST T value(number_bits x) { return static_cast<T>(__builtin_bit_cast(double, x)); }

DUALOP_FUN void unpack_pair(unsigned pair, float& lo, float& hi, bfloat16) { unpack_bf16x2(pair, lo, hi); }
DUALOP_FUN void unpack_pair(unsigned pair, float& lo, float& hi, float16) { unpack_f16x2(pair, lo, hi); }
DUALOP_FUN unsigned pack_pair(float lo, float hi, bfloat16) { return pack_bf16x2(lo, hi); }
DUALOP_FUN unsigned pack_pair(float lo, float hi, float16) { return pack_f16x2(lo, hi); }
DUALOP_FUN float unpack_one(unsigned short x, bfloat16) { return from_bf16(x); }
DUALOP_FUN float unpack_one(unsigned short x, float16) { return from_f16(x); }
DUALOP_FUN unsigned short pack_one(float x, bfloat16) { return to_bf16(x); }
DUALOP_FUN unsigned short pack_one(float x, float16) { return to_f16(x); }

// n neighbouring elements of type T as they lie in memory. n is 1 or a multiple of 2.
template <class T, int n> struct Pack {
    static constexpr int bytes = n * static_cast<int>(sizeof(T)), chunk = bytes < 16 ? bytes : 16;
    static constexpr int per_chunk = chunk / static_cast<int>(sizeof(T));
    static constexpr int per_element = sizeof(T) < 4 ? 1 : static_cast<int>(sizeof(T)) / 4;  // words
    Bytes<chunk> part[bytes / chunk];

    DUALOP_FUN void load(const T* from) {
#pragma unroll
        for (int i = 0; i < bytes / chunk; i++) part[i] = load_raw<chunk>(from + i * per_chunk);
    }
    DUALOP_FUN void store(T* to) const {
#pragma unroll
        for (int i = 0; i < bytes / chunk; i++) store_raw<chunk>(to + i * per_chunk, part[i]);
    }

    // One element, as a whole of its own.
    DUALOP_FUN void set(int i, const Pack<T, 1>& element) {
        auto& word = part[i / per_chunk].word;
        const int at = i % per_chunk;
        if constexpr (sizeof(T) == 2 && n > 1) {
            const unsigned bits = element.part[0].word[0];
            word[at / 2] = at % 2 ? (word[at / 2] & 0xffffu) | bits << 16 : bits;
        } else {
#pragma unroll
            for (int w = 0; w < per_element; w++) word[per_element * at + w] = element.part[0].word[w];
        }
    }
    DUALOP_FUN Pack<T, 1> get(int i) const {
        const auto& word = part[i / per_chunk].word;
        const int at = i % per_chunk;
        Pack<T, 1> element;
        if constexpr (sizeof(T) == 2 && n > 1) {
            element.part[0].word[0] = static_cast<unsigned short>(word[at / 2] >> 16 * (at % 2));
        } else {
#pragma unroll
            for (int w = 0; w < per_element; w++) element.part[0].word[w] = word[per_element * at + w];
        }
        return element;
    }

    template <class R> DUALOP_FUN void unpack(R (&out)[n]) const {
#pragma unroll
        for (int i = 0; i < n; i++) {
            const auto& word = part[i / per_chunk].word;
            const int at = i % per_chunk;
            if constexpr (sizeof(T) == 8) {
                out[i] = static_cast<R>(double_of_bits(word[2 * at] | static_cast<number_bits>(word[2 * at + 1]) << 32));
            } else if constexpr (sizeof(T) == 4) {
                out[i] = static_cast<R>(float_of_bits(word[at]));
            } else if constexpr (n == 1) {
                out[i] = static_cast<R>(unpack_one(word[0], T{}));
            } else if (i % 2 == 0) {
                float lo, hi;
                unpack_pair(word[at / 2], lo, hi, T{});
                out[i] = static_cast<R>(lo);
                out[i + 1] = static_cast<R>(hi);
            }
        }
    }

    template <class R> DUALOP_FUN void pack(const R (&in)[n]) {
#pragma unroll
        for (int i = 0; i < n; i++) {
            auto& word = part[i / per_chunk].word;
            const int at = i % per_chunk;
            if constexpr (sizeof(T) == 8) {
                const number_bits x = bits_of(static_cast<double>(in[i]));
                word[2 * at] = static_cast<unsigned>(x);
                word[2 * at + 1] = static_cast<unsigned>(x >> 32);
            } else if constexpr (sizeof(T) == 4) {
                word[at] = bits_of(static_cast<float>(in[i]));
            } else if constexpr (n == 1) {
                word[0] = pack_one(static_cast<float>(in[0]), T{});
            } else if (i % 2 == 0) {
                word[at / 2] = pack_pair(static_cast<float>(in[i]), static_cast<float>(in[i + 1]), T{});
            }
        }
    }
};

}  // namespace dualop
