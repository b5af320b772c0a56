// The functions that stages are made of, each as accurate as a result of `bits` significant bits needs it.
// triton_kernels/math.py has the same functions in the same order.
//
// 16-bit results (bits <= 11) use the GPU's approximate instructions: ex2 and rcp are good to about 2^-22, and
// tanh.approx to 2^-11, so that one serves bfloat16 only. float32 takes what float32.cuh has, float64 CUDA's own
// functions.
#pragma once
#include "float32.cuh"

namespace dualop::math {

// Templates, so that a chain that uses none of them draws no warning.
template <class T> constexpr T log2_e = T(1.4426950408889634);
template <class T> constexpr T sqrt_half = T(0.7071067811865476);
template <class T> constexpr T inverse_sqrt_2pi = T(0.3989422804014327);

template <int bits> constexpr bool lean = bits <= 11;

// a / b, rounded once in float32 and float64. That takes a subroutine where a or b is very large or very small, and 16
// bits do not show it.
template <int bits, class T> DUALOP_FUN T divide(T a, T b) {
    if constexpr (lean<bits>) return div_full(a, b);
    else return a / b;
}

template <int bits, class T> DUALOP_FUN T rcp(T z) {
    if constexpr (bits == 53) return 1.0 / z;
    else return rcp_approx(z);
}

template <int bits, class T> DUALOP_FUN T exp(T z) {
    if constexpr (bits == 53) return ::exp(z);
    else if constexpr (lean<bits>) return ex2_approx(z * log2_e<T>);
    else return ::expf(z);
}

// exp(z) - 1
template <int bits, class T> DUALOP_FUN T expm1(T z) {
    if constexpr (bits == 53) return ::expm1(z);
    else if constexpr (!lean<bits>) return ::expm1f(z);
    else {
        const float series = z + z * z * (0.5f + z * (1.0f / 6 + z * (1.0f / 24 + z * (1.0f / 120))));
        return ::fabsf(z) < 0.25f ? series : exp<bits>(z) - 1.0f;
    }
}

// log(1 + z) for 0 <= z <= 1, by minimax polynomials.
template <int bits, class T> DUALOP_FUN T log1p(T z) {
    if constexpr (bits == 53) return ::log1p(z);
    else if constexpr (lean<bits>)
        return z * (0.999998748f + z * (-0.499869645f + z * (0.331094474f + z * (-0.235038549f + z * (0.149223775f
            + z * (-0.0664017126f + z * 0.0141409943f))))));
    else {
        const float p = -0.15305604f + z * (0.106036745f + z * (-0.0569597147f + z * (0.0198515505f + z * -0.00324404356f)));
        const float q = -0.499999017f + z * (0.333299637f + z * (-0.249541342f + z * (0.196759433f + z * p)));
        return ::fmaf(z * z, q, z);
    }
}

// exp(-n a) for a >= 0. In float32 it is 0 beyond n a = 88; at infinity r would be infinity - infinity.
template <int bits, int n = 1, class T> DUALOP_FUN T exp_neg(T a) {
    if constexpr (bits == 53) return ::exp(T(-n) * a);
    else if constexpr (lean<bits>) return ex2_approx(a * (-n * log2_e<T>));
    else return exp_below<n>(min_nan(a, 89.0f / n));
}

// n / (1 + e) for 0 <= e <= 1. In float32 with a Newton step on e itself, since 1 + e has lost its last bits.
template <int bits, int n = 1, class T> DUALOP_FUN T rcp_1p(T e) {
    if constexpr (bits != 24) return rcp<bits>(n == 1 ? T(1) + e : T(1.0 / n) + T(1.0 / n) * e);
    else {
        const float r = rcp_approx(1.0f + e);
        return n * ::fmaf(r, ::fmaf(-r, e, 1.0f - r), r);
    }
}

// With e = exp(-|z|): sigmoid(|z|) = 1 / (1 + e), sigmoid(-|z|) = e / (1 + e) = v, and their product, in float32
// v - v^2, is the derivative. Nothing overflows, and v <= 1/2 cancels nothing.
template <int bits, class T> DUALOP_FUN T sigmoid(T z) {
    const T e = exp_neg<bits>(::fabs(z));
    if constexpr (bits == 24) {
        const float v = quotient(e, e);
        return z < 0.0f ? v : 1.0f - v;
    } else {
        const T r = rcp_1p<bits>(e);
        return z < T(0) ? e * r : r;
    }
}
// Where its derivative is not wanted too, there is a shorter way for 16-bit results.
template <int bits, class T> DUALOP_FUN T sigmoid_alone(T z) {
    if constexpr (lean<bits>) return rcp_approx(1.0f + ex2_approx(z * -log2_e<T>));
    else return sigmoid<bits>(z);
}
template <int bits, class T> DUALOP_FUN T sigmoid_slope(T z) {
    const T e = exp_neg<bits>(::fabs(z));
    if constexpr (bits == 24) {
        const float v = quotient(e, e);
        return ::fmaf(-v, v, v);
    } else {
        const T r = rcp_1p<bits>(e);
        return e * r * r;
    }
}

// sigmoid's second derivative, (1 - 2 sigmoid) sigmoid': with e = exp(-|z|) nothing overflows.
template <int bits, class T> DUALOP_FUN T sigmoid_second(T z) {
    const T e = exp_neg<bits>(::fabs(z)), r = rcp_1p<bits>(e), bent = (e * r * r) * ((T(1) - e) * r);
    return z < T(0) ? bent : -bent;
}

// The factor T of tanh(z) = z - z^3 T as a minimax polynomial in u = z^2 for |z| < 1.2.
template <int bits> DUALOP_FUN float tanhshrink_series(float u) {
    if constexpr (lean<bits>)
        return 0.333331853f + u * (-0.133259162f + u * (0.0533416271f + u * (-0.0198468771f + u * (0.0056736893f
            + u * -0.000836071617f))));
    else
        return 0.333333343f + u * (-0.133333087f + u * (0.0539635606f + u * (-0.0218348168f + u * (0.00873210374f
            + u * (-0.00330401724f + u * (0.00106209004f + u * (-0.000240167908f + u * 2.68460608e-05f)))))));
}

// tanh(|z|) = 1 - 2 e / (1 + e) with e = exp(-2 |z|): good to 2^-23 of 1, so of no use for small z where that matters.
template <int bits, class T> DUALOP_FUN T tanh_far(T z) {
    const T e = exp_neg<bits, 2>(::fabs(z));
    return ::copysign(T(1) - e * rcp_1p<bits, 2>(e), z);
}

template <int bits, class T> DUALOP_FUN T tanh(T z) {
    if constexpr (bits == 53) return ::tanh(z);
    else if constexpr (lean<bits>) {
        // A minimax quotient, off by at most 1.3e-6 of the result; from 4.7 on tanh rounds to 1.
        const float c = min_nan(max_nan(z, -4.7f), 4.7f), u = c * c;
        const float p = 0.999998715f + u * (0.117111504f + u * 0.00167329065f);
        return c * p * rcp_approx(1.0f + u * (0.45043405f + u * (0.0184998655f + u * 6.70261213e-05f)));
    } else return tanh_long(z);
}

// 1 - tanh(z)^2, which cancels where tanh saturates: 4 e / (1 + e)^2 with e = exp(-2 |z|) does not.
template <int bits, class T> DUALOP_FUN T sech2(T z) {
    if constexpr (bits == 24) {
        const Factored t = tanh_slope(min_nan(::fabsf(z), 44.0f), -0.0f);
        return slope(t.factor, t.more);
    } else {
        const T e = exp_neg<bits, 2>(::fabs(z)), r = rcp_1p<bits, 2>(e);
        return (e * r) * r;
    }
}

// The density of the normal distribution.
template <int bits, class T> DUALOP_FUN T normpdf(T z) { return inverse_sqrt_2pi<T> * exp_neg<bits>(T(0.5) * z * z); }

// The distribution function of the normal distribution, (1 + erf(z / sqrt(2))) / 2. The lean form is Abramowitz and
// Stegun's 7.1.26 for erfc(|z| / sqrt(2)), off by at most 1.5e-7.
template <int bits, class T> DUALOP_FUN T normcdf(T z) {
    if constexpr (!lean<bits>) return T(0.5) * ::erfc(-z * sqrt_half<T>);
    else {
        const float t = rcp<bits>(1.0f + 0.3275911f * sqrt_half<T> * ::fabsf(z));
        const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        const float tail = 0.5f * p * exp_neg<bits>(0.5f * z * z);
        return z < 0.0f ? tail : 1.0f - tail;
    }
}

// Phi for |z| <= 1, by a minimax polynomial: no exponential, no branch. float64 has no need of it.
template <int bits, class T> DUALOP_FUN T normcdf_unit(T z) {
    const T u = z * z;
    if constexpr (bits == 53) return normcdf<bits>(z);
    else if constexpr (lean<bits>)
        return 0.5f + z * (0.398941547f + u * (-0.0664662942f + u * (0.00985012297f + u * -0.000981363701f)));
    else
        return 0.5f + z * (0.398942292f + u * (-0.0664903596f + u * (0.00997333135f + u * (-0.00118635304f
            + u * (0.000113512659f + u * -7.66467929e-06f)))));
}

// gelu's derivative Phi(z) + z Phi'(z) for |z| <= 1, again by polynomials. In float32 by one that has the zero as a factor.
template <int bits, class T> DUALOP_FUN T gelu_slope_unit(T z) {
    if constexpr (bits == 53) return normcdf<bits>(z) + z * normpdf<bits>(z);
    else if constexpr (lean<bits>) {
        const float u = z * z;
        const float p = -0.265952706f + u * (0.0597694553f + u * (-0.00929194223f + u * 0.000906444388f));
        return 0.5f + z * (0.797884405f + u * p);
    } else {
        const float p = 0.00667734817f + z * (-0.00886739511f + z * (-0.000823385722f + z * (0.00106718601f
            + z * (8.22413931e-05f + z * (-8.44386304e-05f + z * -6.25826169e-06f)))));
        const float q = 0.17665346f + z * (-0.234976366f + z * (-0.0412148908f + z * (0.0548188388f + z * p)));
        return ((z + 0.751791537f) - 1.21144499e-08f) * (0.665077984f + z * q);
    }
}

// The same for -0.5 <= z <= 1, where it is not small and half plus an odd polynomial (off by 2^-27) will do.
template <int bits, class T> DUALOP_FUN T gelu_slope_upper(T z) {
    if constexpr (bits != 24) return gelu_slope_unit<bits>(z);
    else {
        const float u = z * z;
        const float p = -0.265960544f + u * (0.0598340444f + u * (-0.00947522186f + u * (0.0011175595f + u * -8.48879208e-05f)));
        return ::fmaf(z, ::fmaf(u, p, 0.797884524f), 0.5f);
    }
}

// Sine and cosine, off by up to 0.8 ulps at every number of float32, and by up to 2.5 at the 4 million numbers of float64
// that were tried. CUDA's own reduce large numbers in local memory, which gives every kernel a stack frame. 16-bit results
// take what float32 has.
//
// z = quarters pi / 2 + rest - less with |rest| <= 0.79; only `quarters` modulo 4 counts, and `less` is what rounding
// left of it.
template <class T> struct Angle { int quarters; T rest, less; };

// 64 bits of 2 / pi behind 37 zeros, beginning with bit 64 i.
DUALOP_FUN unsigned long long two_over_pi(unsigned i) {
    static constexpr unsigned long long words[] = {
        0x000000000517cc1b, 0x727220a94fe13abe, 0x8fa9a6ee06db14ac, 0xc9e21c820ff28b1d, 0x5ef5de2b0db92371,
        0xd2126e9700324977, 0x504e8c90e7f0ef58, 0xe5894d39f74411af, 0xa975da24274ce381, 0x35a2fbf209cc8eb1,
        0xcc1a99cfa4e422fc, 0x5defc941d8ffc4bf, 0xfef02cc07f79788c, 0x5ad05368fb69b3f6, 0x793e584dba7a31fb,
        0x34f2ff516ba93dd6, 0x3f5f2f8bd9e839cf, 0xbc529497535fdafd, 0x88fc6ae842b01982};
    return words[i];
}
DUALOP_FUN unsigned long long shifted(unsigned long long high, unsigned long long low, unsigned shift) {
    return high << shift | low >> 1 >> (63 - shift);
}

// For |z| >= 2^17, by Payne and Hanek: z is an integer times 2^e, so that the bits of 2 / pi that stand for multiples
// of 4 are left out, and the product with the next ones is exact, in units of 2^-126 quarters.
template <class T> DUALOP_FUN Angle<T> far_angle(T z) {
    const unsigned long long bits = bits_of(static_cast<double>(::fabs(z)));
    const unsigned at = static_cast<unsigned>(bits >> 52) - 1040, word = at / 64, shift = at % 64;
    const unsigned long long digits = (bits & 0xfffffffffffff) | 0x10000000000000;
    const unsigned long long second = two_over_pi(word + 1), third = two_over_pi(word + 2);
    const unsigned long long middle = digits * shifted(second, third, shift);
    const unsigned long long low = middle + __umul64hi(digits, shifted(third, two_over_pi(word + 3), shift));
    const unsigned long long high = digits * shifted(two_over_pi(word), second, shift)
        + __umul64hi(digits, shifted(second, third, shift)) + (low < middle);
    const unsigned long long quarters = (high + (1ull << 61)) >> 62;
    const double exact = ::fma(static_cast<double>(static_cast<long long>(high - (quarters << 62))),
        3.4061215800865545e-19, static_cast<double>(low) * 1.8464622084398007e-38);  // pi / 2 by 2^62 and 2^126
    const T rest = static_cast<T>(exact) + (z - z), less = static_cast<T>(rest - exact);  // NaN at infinity
    const int turns = static_cast<int>(quarters);
    return z < T(0) ? Angle<T>{-turns, -rest, -less} : Angle<T>{turns, rest, less};
}

// For smaller ones by Cody and Waite: what the first part of pi / 2 leaves is exact. All parts are positive: -0 stays.
template <class T> DUALOP_FUN Angle<T> angle(T z) {
    if (!(::fabs(z) < T(131072))) return far_angle(z);
    constexpr T integers = sizeof(T) == 8 ? 6755399441055744.0 : 12582912.0;  // beyond this there are integers only
    const T sum = ::fma(z, T(0.6366197723675814), integers), q = sum - integers;
    const int quarters = static_cast<int>(bits_of(sum));
    if constexpr (sizeof(T) == 8) {
        const T near = ::fma(q, -6.1232339957367648e-17, ::fma(q, -1.5707963267948966, z));
        return {quarters, ::fma(q, -1.0828566739219139e-32, near), 0.0};
    } else {
        const float near = ::fmaf(q, -1.57079625f, z), product = q * 7.54978942e-08f, rest = minus_rounded(near, product);
        const float less = ::fmaf(q, 5.39030253e-15f, ::fmaf(q, 7.54978942e-08f, -product));
        return {quarters, rest, less - minus_rounded(near - rest, product)};
    }
}

// The sine of an angle, by minimax polynomials of u = rest^2 for (sin(rest) / rest - 1) / u and
// ((cos(rest) - 1) / u + 1/2) / u.
template <class T> DUALOP_FUN T sine(Angle<T> a) {
    const T u = a.rest * a.rest;
    T s, c;
    if constexpr (sizeof(T) == 8) {
        s = 2.7557313707070068e-06 + u * (-2.5050760253406863e-08 + u * 1.5896909952115501e-10);
        s = -0.16666666666666632 + u * (0.0083333333333224895 + u * (-0.00019841269829857949 + u * s));
        c = -2.7557314351390663e-07 + u * (2.0875723212981748e-09 + u * -1.1359647557788195e-11);
        c = 0.0416666666666666019 + u * (-0.0013888888888874110 + u * (2.4801587289476729e-05 + u * c));
    } else {
        s = -0.166666672f + u * (0.00833338592f + u * (-0.000198559923f + u * 2.86567956e-06f));
        c = 0.0416666567f + u * (-0.00138877297f + u * 2.44677067e-05f);
    }
    const T half = T(0.5) * u, most = T(1) - half;
    const T odd = most + ((T(1) - most) - half + ::fma(u * u, c, a.rest * a.less));
    const T even = a.rest + ::fma(::fma(a.rest, u, T(0)), s, a.less * -most);  // with 0 and minus, -0 stays
    const T y = a.quarters & 1 ? odd : even;
    return a.quarters & 2 ? -y : y;
}

template <class T> DUALOP_FUN T sin(T z) { return sine(angle(z)); }
template <class T> DUALOP_FUN T cos(T z) {
    const Angle<T> a = angle(z);
    return sine(Angle<T>{a.quarters + 1, a.rest, a.less});
}

}  // namespace dualop::math
