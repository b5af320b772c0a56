// Piecewise linear stages, and hardswish, which is piecewise quadratic. ../stages.cuh says what each has.
#pragma once

namespace dualop::stage {

// at_bound: the derivative at the bounds, 1 or 0, as the installed torch has it. An infinite bound is none: 1 there.
template <number_bits min, number_bits max, number_bits at_bound> struct clamp {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return min_nan(max_nan(z, value<T>(min)), value<T>(max));
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        constexpr T low = value<T>(min), high = value<T>(max);
        constexpr bool at_low = at_bound != 0 || min == number(-__builtin_huge_val());
        constexpr bool at_high = at_bound != 0 || max == number(__builtin_huge_val());
        return (at_low ? z >= low : z > low) && (at_high ? z <= high : z < high) ? gy : T(0);
    }
};

struct relu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z <= T(0) ? T(0) : z; }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return z <= T(0) ? T(0) : gy; }
};

template <number_bits min_val, number_bits max_val> struct hardtanh {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return min_nan(max_nan(z, value<T>(min_val)), value<T>(max_val));
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z <= value<T>(min_val) || z >= value<T>(max_val) ? T(0) : gy;
    }
};

struct relu6 : hardtanh<number(0.0), number(6.0)> {};

template <number_bits negative_slope> struct leaky_relu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z > T(0) ? z : z * value<T>(negative_slope); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z > T(0) ? gy : gy * value<T>(negative_slope);
    }
};

template <number_bits threshold_, number_bits replacement> struct threshold {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return z <= value<T>(threshold_) ? value<T>(replacement) : z;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return z <= value<T>(threshold_) ? T(0) : gy; }
};

template <number_bits lambd> struct hardshrink {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return z >= -value<T>(lambd) && z <= value<T>(lambd) ? T(0) : z;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z >= -value<T>(lambd) && z <= value<T>(lambd) ? T(0) : gy;
    }
};

template <number_bits lambd> struct softshrink {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        constexpr T l = value<T>(lambd);
        return z > l ? z - l : z < -l ? z + l : z * T(0);  // z * 0 keeps NaN
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z >= -value<T>(lambd) && z <= value<T>(lambd) ? T(0) : gy;
    }
};

struct hardsigmoid {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        const T sixfold = min_nan(max_nan(z + T(3), T(0)), T(6));
        return math::lean<bits> ? sixfold * T(1.0 / 6) : sixfold / T(6);
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z > T(-3) && z < T(3) ? gy * T(1.0 / 6) : T(0);
    }
};

struct hardswish {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z * hardsigmoid::forward<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z <= T(-3) ? T(0) : z < T(3) ? gy * ((z + T(1.5)) * T(1.0 / 3)) : gy;
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return z > T(-3) && z < T(3) ? T(1.0 / 3) : T(0); }
};

}  // namespace dualop::stage
