// Smooth stages of one exponential, from elu to tanhshrink. ../stages.cuh says what each has.
#pragma once

namespace dualop::stage {

template <number_bits alpha> struct elu {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return z < T(0) ? value<T>(alpha) * math::expm1<bits>(z) : z;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return z <= T(0) ? gy * value<T>(alpha) * math::exp_neg<bits>(-z) : gy;
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        return z < T(0) ? value<T>(alpha) * math::exp<bits>(z) : T(0);
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
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        return T(scale) * elu<number(alpha)>::second<bits>(z);
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
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        constexpr T inverse = T(1 / value<double>(alpha));
        return z < T(0) ? inverse * math::exp<bits>(z * inverse) : T(0);
    }
};

struct sigmoid {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::sigmoid_alone<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T inner(T z) { return math::sigmoid<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return gy * math::sigmoid_slope<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return math::sigmoid_second<bits>(z); }
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
    // 2 s' + z s''
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        return T(2) * math::sigmoid_slope<bits>(z) + z * math::sigmoid_second<bits>(z);
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
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        return T(-2) * math::tanh_far<bits>(z) * math::sech2<bits>(z);
    }
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
    template <int bits, class T> DUALOP_FUN static T second(T z) { return -tanh::second<bits>(z); }
};

}  // namespace dualop::stage
