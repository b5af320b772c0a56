// Every stage: forward(z) -> y and backward(z, gy) -> gz; an operand stage has forward(z, b) and
// backward(z, b, gy, gb) -> gz, which also sets gb. Where the value on the way in a backward can be had cheaper than by
// forward, or out of what the derivative needs anyhow, inner(z) gives it. triton_kernels/stages.py has the same names in
// the same order with the same formulas; dualop/language/stages.py says what they mean in torch. `bits` is how accurate a result
// has to be.
//
// Gradients at kinks are torch's. Masked gradients are selected, not multiplied by 0, so that an infinite gy stays out.
#pragma once
#include "math.cuh"

namespace dualop::stage {

// ---- operand stages ------------------------------------------------------------------------------------------------

struct add {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return z + b; }
    template <int bits, class T> DUALOP_FUN static T backward(T, T, T gy, T& gb) { gb = gy; return gy; }
};

struct sub {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return z - b; }
    template <int bits, class T> DUALOP_FUN static T backward(T, T, T gy, T& gb) { gb = -gy; return gy; }
};

struct rsub {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return b - z; }
    template <int bits, class T> DUALOP_FUN static T backward(T, T, T gy, T& gb) { gb = gy; return -gy; }
};

struct mul {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return z * b; }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T b, T gy, T& gb) { gb = gy * z; return gy * b; }
};

struct div {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return z / b; }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T b, T gy, T& gb) {
        gb = -gy * ((z / b) / b);
        return gy / b;
    }
};

// A tie gives each side half.
struct minimum {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return min_nan(z, b); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T b, T gy, T& gb) {
        const T share = z == b ? gy * T(0.5) : gy;
        gb = z < b ? T(0) : share;
        return z > b ? T(0) : share;
    }
};

struct maximum {
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return max_nan(z, b); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T b, T gy, T& gb) {
        const T share = z == b ? gy * T(0.5) : gy;
        gb = z > b ? T(0) : share;
        return z < b ? T(0) : share;
    }
};

// ---- piecewise linear stages ---------------------------------------------------------------------------------------

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
};

// ---- smooth stages -------------------------------------------------------------------------------------------------

template <number_bits alpha> struct elu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return z < T(0) ? value<T>(alpha) * math::expm1<bits>(z) : z;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z <= T(0) ? gy * value<T>(alpha) * math::exp_neg<bits>(-z) : gy;
    }
};

// Klambauer et al. 2017: the constants for which mean 0 and variance 1 are a fixed point.
struct selu {
    static constexpr double scale = 1.0507009873554804934193349852946, alpha = 1.6732632423543772848170429916717;
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return z <= T(0) ? T(scale * alpha) * math::expm1<bits>(z) : T(scale) * z;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return T(scale) * elu<number(alpha)>::backward<bits>(z, gy);
    }
};

template <number_bits alpha> struct celu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        constexpr T a = value<T>(alpha), inverse = T(1 / value<double>(alpha));
        return z <= T(0) ? a * math::expm1<bits>(z * inverse) : z;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        constexpr T inverse = T(1 / value<double>(alpha));
        if constexpr (bits == 24 && inverse > 0)
            return z <= 0.0f ? gy * math::exp_ratio(z, value<float>(alpha), inverse) : gy;
        else return z <= T(0) ? gy * math::exp<bits>(z * inverse) : gy;
    }
};

struct sigmoid {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::sigmoid_alone<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T inner(T z) { return math::sigmoid<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return gy * math::sigmoid_slope<bits>(z);
    }
};

// y' = s + z s'
struct silu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 24) return math::silu(z);
        else return z * math::sigmoid_alone<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        if constexpr (bits == 24) {
            const math::Factored s = math::silu_slope(z);
            return gy * math::slope(s.factor, s.more);
        } else if constexpr (math::lean<bits>) {
            const T s = math::sigmoid_alone<bits>(z);
            return gy * (s + (z * s) * (T(1) - s));
        } else return gy * (math::sigmoid<bits>(z) + z * math::sigmoid_slope<bits>(z));
    }
};

struct tanh {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::tanh<bits>(z); }
    // A 16-bit gradient does not show its error, which is 2^-23 of 1.
    template <int bits, class T> DUALOP_FUN static T inner(T z) {
        if constexpr (math::lean<bits>) return math::tanh_far<bits>(z);
        else return math::tanh<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * math::sech2<bits>(z); }
};

// tanh where nothing behind it can enlarge its error; chosen by dualop/language/program.py.
struct tanh_approx : tanh {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 8) return dualop::tanh_approx(z);
        else return tanh::forward<bits>(z);
    }
};

// tanh(silu(z)) in one, since tanh's slope multiplies what silu was rounded by with 2 y; chosen by dualop/language/program.py.
struct silu_tanh {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 24) return math::tanh_short(math::silu(z));
        else return tanh::forward<bits>(silu::forward<bits>(z));
    }
    template <int bits, class T> DUALOP_FUN static T inner(T z) {
        if constexpr (bits == 24) {
            const math::Factored s = math::silu_slope(z);
            return math::tanh_slope(s.value, s.rest).value;
        } else return tanh::inner<bits>(silu::forward<bits>(z));
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        if constexpr (bits == 24) {
            const math::Factored s = math::silu_slope(z);
            const math::Factored t = math::tanh_slope(s.value, s.rest);
            // The product of both: the factor not taken is 1.
            return gy * math::slope(z < 0.0f ? s.factor : t.factor, ::fmaf(s.more, t.more, s.more + t.more));
        } else return silu::backward<bits>(z, tanh::backward<bits>(silu::forward<bits>(z), gy));
    }
};
struct silu_tanh_approx : silu_tanh {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 8) return tanh_approx::forward<bits>(silu::forward<bits>(z));
        else return silu_tanh::forward<bits>(z);
    }
};

// z - tanh(z), by a polynomial where that cancels. float64 cancels, as torch does.
struct tanhshrink {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 53) return z - math::tanh<bits>(z);
        else {
            const float u = z * z, near = (z * u) * math::tanhshrink_series<bits>(u), far = z - math::tanh_far<bits>(z);
            return ::fabsf(z) < 1.2f ? near : far;
        }
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T t = tanh::inner<bits>(z);
        return gy * (t * t);
    }
};

template <number_bits beta, number_bits threshold> struct softplus {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        const T s = z * value<T>(beta), e = math::exp_neg<bits>(::fabs(s));
        const T y = ((s > T(0) ? s : T(0)) + math::log1p<bits>(e)) * T(1 / value<double>(beta));
        return s > value<T>(threshold) ? z : y;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T s = z * value<T>(beta);
        return s > value<T>(threshold) ? gy : gy * math::sigmoid<bits>(s);
    }
};

struct logsigmoid {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return min_nan(z, T(0)) - math::log1p<bits>(math::exp_neg<bits>(::fabs(z)));
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * math::sigmoid<bits>(-z); }
};

// tanh(softplus(z)) = n / (n + 2) with n = e (e + 2), e = exp(z); beyond z = 20 it is 1 in every dtype.
struct mish {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 24) return math::mish(z);
        else {
            const T e = math::exp<bits>(min_nan(z, T(20))), n = e * (e + T(2));
            return z * (n * math::rcp<bits>(n + T(2)));
        }
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        if constexpr (bits == 24) return gy * math::mish_slope(z);
        else {
            const T near = min_nan(z, T(20)), e = math::exp<bits>(near), n = e * (e + T(2));
            const T r = math::rcp<bits>(n + T(2));
            return gy * (n * r + near * (T(4) * e * (T(1) + e) * (r * r)));
        }
    }
};

struct softsign {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z / (T(1) + ::fabs(z)); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T d = T(1) + ::fabs(z);
        return gy / d / d;
    }
};

// z Phi(z), Phi the normal distribution (Hendrycks and Gimpel 2016)
struct gelu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 24) return math::gelu(z);
        else return z * math::normcdf<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        if constexpr (bits == 24) return gy * math::gelu_slope(z);
        else return gy * (math::normcdf<bits>(z) + z * math::normpdf<bits>(z));
    }
};

// gelu for |z| <= 1, for instance behind tanh; chosen by dualop/language/program.py.
struct gelu_unit {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z * math::normcdf_unit<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return gy * math::gelu_slope_unit<bits>(z);
    }
};

// gelu for -0.5 <= z <= 1, for instance behind silu and tanh; chosen by dualop/language/program.py.
struct gelu_upper : gelu_unit {
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return gy * math::gelu_slope_upper<bits>(z);
    }
};

// z (1 + tanh(u)) / 2 = z sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3)
struct gelu_tanh {
    static constexpr double slope = 1.5957691216057308, cubic = 0.044715;  // slope: 2 sqrt(2 / pi)
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 24) return math::gelu_tanh(z);
        else return z * math::sigmoid_alone<bits>(T(slope) * z * (T(1) + T(cubic) * z * z));
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        if constexpr (bits == 24) return gy * math::gelu_tanh_slope(z);
        else {
            // The second term has long vanished at |z| = 20, before its cube overflows.
            const T near = min_nan(max_nan(z, T(-20)), T(20)), z2 = near * near;
            const T u = T(slope) * near * (T(1) + T(cubic) * z2);
            return gy * (math::sigmoid<bits>(u)
                + near * math::sigmoid_slope<bits>(u) * (T(slope) * (T(1) + T(3 * cubic) * z2)));
        }
    }
};

// ---- plain functions -----------------------------------------------------------------------------------------------

struct abs {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return ::fabs(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return z > T(0) ? gy : z < T(0) ? -gy : gy * T(0); }
};

struct neg {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return -z; }
    template <int bits, class T> DUALOP_FUN static T backward(T, T gy) { return -gy; }
};

struct square {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z * z; }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * (T(2) * z); }
};

struct sqrt {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return ::sqrt(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy / (T(2) * ::sqrt(z)); }
};

struct reciprocal {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return T(1) / z; }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T r = T(1) / z;
        return -gy * (r * r);
    }
};

struct exp {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::exp<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * math::exp<bits>(z); }
};

}  // namespace dualop::stage
