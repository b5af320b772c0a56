// The double backward of a chain of one variable, compiled as a library of its own when it is first wanted: the slope of
// the chain, gy f'(z), as a function of the inputs (z, gy), whose backward is the kernel of kernels.cuh.
//
//     Slope<Curved<stage::silu, second::silu>, With<stage::mul, Number<number(2.0)>>, Only<stage::relu>>
//
// Every stage that is not made of straight lines has its second derivative here: at(z). triton_kernels/second.py has the
// same names in the same order with the same formulas, dualop/language/derivatives.py has them in torch.
#pragma once
#include "library.cuh"

namespace dualop::second {

// sigmoid(z), and its derivative's (1 - 2 sigmoid) sigmoid': with e = exp(-|z|) nothing overflows.
template <int bits, class T> DUALOP_FUN T bump_slope(T z) {
    const T e = math::exp_neg<bits>(::fabs(z)), r = math::rcp_1p<bits>(e), bent = (e * r * r) * ((T(1) - e) * r);
    return z < T(0) ? bent : -bent;
}

struct hardswish {
    template <int bits, class T> DUALOP_FUN static T at(T z) { return z > T(-3) && z < T(3) ? T(1.0 / 3) : T(0); }
};

template <number_bits alpha> struct elu {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        return z < T(0) ? value<T>(alpha) * math::exp<bits>(z) : T(0);
    }
};

struct selu {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        return T(stage::selu::scale) * elu<number(stage::selu::alpha)>::at<bits>(z);
    }
};

template <number_bits alpha> struct celu {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        constexpr T inverse = T(1 / value<double>(alpha));
        return z < T(0) ? inverse * math::exp<bits>(z * inverse) : T(0);
    }
};

struct sigmoid {
    template <int bits, class T> DUALOP_FUN static T at(T z) { return bump_slope<bits>(z); }
};

// 2 s' + z s''
struct silu {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        return T(2) * math::sigmoid_slope<bits>(z) + z * bump_slope<bits>(z);
    }
};

struct tanh {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        return T(-2) * math::tanh_far<bits>(z) * math::sech2<bits>(z);
    }
};

struct tanh_approx : tanh {};

struct tanhshrink {
    template <int bits, class T> DUALOP_FUN static T at(T z) { return -tanh::at<bits>(z); }
};

template <number_bits beta, number_bits threshold> struct softplus {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        const T s = z * value<T>(beta);
        return s > value<T>(threshold) ? T(0) : value<T>(beta) * math::sigmoid_slope<bits>(s);
    }
};

struct logsigmoid {
    template <int bits, class T> DUALOP_FUN static T at(T z) { return -math::sigmoid_slope<bits>(z); }
};

// With t = tanh(softplus(z)) and s = sigmoid(z): (1 - t^2) s (2 + z (1 - s - 2 t s)); see stage::mish.
struct mish {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        const T near = min_nan(z, T(20)), e = math::exp<bits>(near), n = e * (e + T(2)), r = math::rcp<bits>(n + T(2));
        const T s = math::sigmoid<bits>(near), t = n * r;
        return T(4) * e * (T(1) + e) * (r * r) * (T(2) + near * (T(1) - s - T(2) * t * s));
    }
};

struct softsign {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        const T d = T(1) + ::fabs(z), bent = T(2) / d / d / d;
        return z > T(0) ? -bent : z < T(0) ? bent : z;
    }
};

// (2 - z^2) Phi'(z), which is 0 from |z| = 40 on, before z^2 overflows
struct gelu {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        const T near = min_nan(max_nan(z, T(-40)), T(40));
        return (T(2) - near * near) * math::normpdf<bits>(near);
    }
};

struct gelu_unit : gelu {};
struct gelu_upper : gelu {};

// The second derivative of z sigmoid(u(z)); see stage::gelu_tanh.
struct gelu_tanh {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        constexpr T slope = T(stage::gelu_tanh::slope), cubic = T(stage::gelu_tanh::cubic);
        const T near = min_nan(max_nan(z, T(-20)), T(20)), z2 = near * near;
        const T u = slope * near * (T(1) + cubic * z2), u1 = slope * (T(1) + T(3) * cubic * z2);
        const T u2 = T(6) * slope * cubic * near;
        return math::sigmoid_slope<bits>(u) * (T(2) * u1 + near * u2) + near * (u1 * u1) * bump_slope<bits>(u);
    }
};

struct square {
    template <int bits, class T> DUALOP_FUN static T at(T) { return T(2); }
};

struct sqrt {
    template <int bits, class T> DUALOP_FUN static T at(T z) { return T(-0.25) / (z * ::sqrt(z)); }
};

struct reciprocal {
    template <int bits, class T> DUALOP_FUN static T at(T z) {
        const T r = T(1) / z;
        return T(2) * r * r * r;
    }
};

struct exp {
    template <int bits, class T> DUALOP_FUN static T at(T z) { return math::exp<bits>(z); }
};

}  // namespace dualop::second

namespace dualop {

// A stage with its second derivative.
template <class Stage, class Second> struct Curved : Only<Stage> {
    template <int bits, class T> DUALOP_FUN static T second(T z) { return Second::template at<bits>(z); }
};
template <class Stage> constexpr bool curved = false;
template <class Stage, class Second> constexpr bool curved<Curved<Stage, Second>> = true;
template <class... Stages> constexpr bool bent = (... || curved<Stages>);  // any of them

// A gradient on its way up the chain, and how it turns as z moves along the tangent.
template <class T> struct Turning {
    T gradient, turn;
};

template <class... Stages> struct Slope;

template <> struct Slope<> {
    template <int bits, class T> DUALOP_FUN static Turning<T> up(T, T tangent, const T* in, Parts<T>* gradients) {
        gradients[1].add(tangent);
        return {in[1], T(0)};
    }
};

template <class First, class... Rest> struct Slope<First, Rest...> {
    // With v the gradient of gy f'(z): v gy f''(z), and v f'(z) for the input gy. Each product is made by a stage's
    // backward, so that it is selected where that is.
    template <int bits, class T> DUALOP_FUN static T backward(T z, T v, const T* in, Parts<T>* gradients) {
        return up<bits>(z, v, in, gradients).turn;
    }

    template <int bits, class T> DUALOP_FUN static Turning<T> up(T z, T tangent, const T* in, Parts<T>* gradients) {
        const T y = First::template inner<bits>(z, in);
        const T below = First::template backward<bits>(z, tangent, in, gradients);
        const Turning<T> from = Slope<Rest...>::template up<bits>(y, below, in, gradients);
        T turn = T(0);  // behind the last curved stage, also beside an infinite slope
        if constexpr (bent<Rest...>) turn = First::template backward<bits>(z, from.turn, in, gradients);
        if constexpr (curved<First>) {
            const T more = First::template second<bits>(z) * tangent * from.gradient;
            turn = bent<Rest...> ? turn + more : more;
        }
        return {First::template backward<bits>(z, from.gradient, in, gradients), turn};
    }
};

}  // namespace dualop

// As DUALOP_LIBRARY, with the one launcher that a slope has.
#define DUALOP_SLOPE_LIBRARY(PROBLEM)                                                                                    \
    DUALOP_EXPORT int dualop_backward(const void* words) {                                                               \
        return static_cast<const dualop::Launch<PROBLEM>*>(words)->backward();                                           \
    }                                                                                                                    \
    DUALOP_EXPORT const char* dualop_error_text(int error) { return dualop::error_text(error); }
