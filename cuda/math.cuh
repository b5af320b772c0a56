// The functions that stages are made of, each as accurate as a result of `bits` significant bits needs it.
// triton_kernels/math.py has the same functions in the same order.
//
// 16-bit results (bits <= 11) use the GPU's approximate instructions: ex2, lg2 and rcp are good to about 2^-22, and
// tanh.approx to 2^-11, so that one serves bfloat16 only. Where a formula would cancel near zero, a short series takes
// over. float32 and float64 results use CUDA's own functions (1 to 4 ulp).
#pragma once
#include "types.cuh"

namespace dualop::math {

// Templates, so that a chain that uses none of them draws no warning.
template <class T> constexpr T log2_e = T(1.4426950408889634);
template <class T> constexpr T ln_2 = T(0.6931471805599453);
template <class T> constexpr T sqrt_half = T(0.7071067811865476);
template <class T> constexpr T inverse_sqrt_2pi = T(0.3989422804014327);

template <int bits> constexpr bool lean = bits <= 11;

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

// log(1 + z) for z >= 0
template <int bits, class T> DUALOP_FUN T log1p(T z) {
    if constexpr (bits == 53) return ::log1p(z);
    else if constexpr (!lean<bits>) return ::log1pf(z);
    else return z < 0.01f ? z - 0.5f * z * z : lg2_approx(1.0f + z) * ln_2<T>;
}

// With e = exp(-|z|): sigmoid(|z|) = 1 / (1 + e), sigmoid(-|z|) = e / (1 + e), and their product is the derivative.
// Nothing cancels and nothing overflows.
template <int bits, class T> DUALOP_FUN T sigmoid(T z) {
    const T e = exp<bits>(-::fabs(z)), r = rcp<bits>(T(1) + e);
    return z < T(0) ? e * r : r;
}
template <int bits, class T> DUALOP_FUN T sigmoid_slope(T z) {
    const T e = exp<bits>(-::fabs(z)), r = rcp<bits>(T(1) + e);
    return e * r * r;
}

// The factor T of tanh(z) = z + z^3 T, a minimax polynomial for |z| < 0.3 (16-bit results) or 0.55 (float32).
template <int bits> constexpr float tanh_series_end = lean<bits> ? 0.3f : 0.55f;
template <int bits> DUALOP_FUN float tanh_series(float z) {
    const float u = z * z;
    if constexpr (lean<bits>) return -0.333281547f + u * 0.128647104f;
    else return -0.333333313f + u * (0.133331209f + u * (-0.0539106987f + u * (0.0213160906f + u * -0.00662128581f)));
}

template <int bits, class T> DUALOP_FUN T tanh(T z) {
    if constexpr (bits == 53) return ::tanh(z);
    else if constexpr (bits == 8) return tanh_approx(z);
    else {
        // (1 - e) / (1 + e) with e = exp(-2 |z|), which has no accuracy left near 0.
        const float e = exp<bits>(-2.0f * ::fabsf(z)), far = 1.0f - 2.0f * e * rcp<bits>(1.0f + e);
        return ::fabsf(z) < tanh_series_end<bits> ? z + z * z * z * tanh_series<bits>(z) : ::copysignf(far, z);
    }
}

// 1 - tanh(z)^2, which cancels where tanh saturates: 4 e / (1 + e)^2 with e = exp(-2 |z|) does not.
template <int bits, class T> DUALOP_FUN T sech2(T z) {
    const T e = exp<bits>(T(-2) * ::fabs(z)), r = rcp<bits>(T(1) + e);
    return T(4) * e * r * r;
}

// A derivative that has a zero at hi + lo, where its formula `far` cancels: within 0.25 of it, t P(t) with a minimax P.
// float32 only: 16-bit results do not show it, float64 has no such polynomial.
template <int bits, class T>
DUALOP_FUN T near_zero(T far, T z, float hi, float lo, float c0, float c1, float c2, float c3, float c4, float c5) {
    if constexpr (bits != 24) return far;
    else {
        const float t = (z - hi) - lo;
        const float near = t * (c0 + t * (c1 + t * (c2 + t * (c3 + t * (c4 + t * c5)))));
        return ::fabsf(t) < 0.25f ? near : far;
    }
}

// The density of the normal distribution.
template <int bits, class T> DUALOP_FUN T normpdf(T z) { return inverse_sqrt_2pi<T> * exp<bits>(T(-0.5) * z * z); }

// The distribution function of the normal distribution, (1 + erf(z / sqrt(2))) / 2. The lean form is Abramowitz and
// Stegun's 7.1.26 for erfc(|z| / sqrt(2)), off by at most 1.5e-7.
template <int bits, class T> DUALOP_FUN T normcdf(T z) {
    if constexpr (bits == 53) return 0.5 * ::erfc(-z * sqrt_half<T>);
    else if constexpr (!lean<bits>) return 0.5f * ::erfcf(-z * sqrt_half<T>);
    else {
        const float t = rcp<bits>(1.0f + 0.3275911f * sqrt_half<T> * ::fabsf(z));
        const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        const float tail = 0.5f * p * exp<bits>(-0.5f * z * z);
        return z < 0.0f ? tail : 1.0f - tail;
    }
}

// The same two for |z| <= 1, by minimax polynomials in z^2: no exponential, no branch. float64 has no need of them.
template <int bits, class T> DUALOP_FUN T normpdf_unit(T z) {
    const T u = z * z;
    if constexpr (bits == 53) return normpdf<bits>(z);
    else if constexpr (lean<bits>)
        return 0.398942113f + u * (-0.199463084f + u * (0.0498020686f + u * (-0.00812228862f + u * 0.000812059792f)));
    else
        return 0.398942292f + u * (-0.199471131f + u * (0.0498676896f + u * (-0.00831072591f + u * (0.00103725446f
            + u * (-0.000101399994f + u * 6.75949696e-06f)))));
}
template <int bits, class T> DUALOP_FUN T normcdf_unit(T z) {
    const T u = z * z;
    if constexpr (bits == 53) return normcdf<bits>(z);
    else if constexpr (lean<bits>)
        return 0.5f + z * (0.398941547f + u * (-0.0664662942f + u * (0.00985012297f + u * -0.000981363701f)));
    else
        return 0.5f + z * (0.398942292f + u * (-0.0664903596f + u * (0.00997333135f + u * (-0.00118635304f
            + u * (0.000113512659f + u * -7.66467929e-06f)))));
}

// gelu's derivative, given Phi and the density.
template <int bits, class T> DUALOP_FUN T gelu_slope(T z, T cdf, T pdf) {
    return near_zero<bits>(cdf + z * pdf, z, -0.751791537f, 1.21144499e-08f, 0.431494027f, 0.388284743f,
                           -0.018209355f, -0.113988124f, -0.0143532213f, 0.0190178882f);
}

}  // namespace dualop::math
