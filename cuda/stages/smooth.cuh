// Smooth stages of more than that, from softplus to gelu. ../stages.cuh says what each has.
#pragma once

namespace dualop::stage {

template <number_bits beta, number_bits threshold> struct softplus {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        const T s = z * value<T>(beta), e = math::exp_neg<bits>(::fabs(s));
        const T y = ((s > T(0) ? s : T(0)) + math::log1p<bits>(e)) * T(1 / value<double>(beta));
        return s > value<T>(threshold) ? z : y;
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T s = z * value<T>(beta), below = gy * math::sigmoid<bits>(s);  // made on both sides: no branch
        return s > value<T>(threshold) ? gy : below;
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        const T s = z * value<T>(beta);
        return s > value<T>(threshold) ? T(0) : value<T>(beta) * math::sigmoid_slope<bits>(s);
    }
};

struct logsigmoid {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        return min_nan(z, T(0)) - math::log1p<bits>(math::exp_neg<bits>(::fabs(z)));
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * math::sigmoid<bits>(-z); }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return -math::sigmoid_slope<bits>(z); }
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
    // With t = tanh(softplus(z)) and s = sigmoid(z): (1 - t^2) s (2 + z (1 - s - 2 t s)); see stage::mish.
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        const T near = min_nan(z, T(20)), e = math::exp<bits>(near), n = e * (e + T(2)), r = math::rcp<bits>(n + T(2));
        const T s = math::sigmoid<bits>(near), t = n * r;
        return T(4) * e * (T(1) + e) * (r * r) * (T(2) + near * (T(1) - s - T(2) * t * s));
    }
};

// mish for z >= -0.31, for instance behind another mish; chosen by dualop/language/program.py.
struct mish_upper : mish {
    template <int bits, class T> DUALOP_FUN static T forward(T z) {
        if constexpr (bits == 24) return math::mish_upper(z);
        else return mish::forward<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        if constexpr (bits == 24) return gy * math::mish_upper_slope(z);
        else return mish::backward<bits>(z, gy);
    }
};

struct softsign {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::divide<bits>(z, T(1) + ::fabs(z)); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T d = T(1) + ::fabs(z);
        return math::divide<bits>(math::divide<bits>(gy, d), d);
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        const T d = T(1) + ::fabs(z);
        const T bent = math::divide<bits>(math::divide<bits>(math::divide<bits>(T(2), d), d), d);
        return z > T(0) ? -bent : z < T(0) ? bent : z;
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
    // (2 - z^2) Phi'(z), which is 0 from |z| = 40 on, before z^2 overflows
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        const T near = min_nan(max_nan(z, T(-40)), T(40));
        return (T(2) - near * near) * math::normpdf<bits>(near);
    }
};

// gelu for |z| <= 1, for instance behind tanh; chosen by dualop/language/program.py.
struct gelu_unit {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return z * math::normcdf_unit<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        return gy * math::gelu_slope_unit<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return gelu::second<bits>(z); }
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
    // The second derivative of z sigmoid(u(z)); see stage::gelu_tanh.
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        constexpr T slope = T(gelu_tanh::slope), cubic = T(gelu_tanh::cubic);
        const T near = min_nan(max_nan(z, T(-20)), T(20)), z2 = near * near;
        const T u = slope * near * (T(1) + cubic * z2), u1 = slope * (T(1) + T(3) * cubic * z2);
        const T u2 = T(6) * slope * cubic * near;
        return math::sigmoid_slope<bits>(u) * (T(2) * u1 + near * u2) + near * (u1 * u1) * math::sigmoid_second<bits>(u);
    }
};

}  // namespace dualop::stage
