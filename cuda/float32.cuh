// The functions whose float32 results are held to 4 ulps, slopes included. 16-bit results need none of this.
// triton_kernels/float32.py has the same functions in the same order.
//
// ex2 and rcp of the GPU are off by up to 2^-22.5 and 2^-23. So ex2 is taken for powers of two alone, where it is
// exact, and rcp with the remainder of what it divides. What is left are the roundings of float32 itself: a slope is
// made of few factors, and sums of small parts come before the one rounding that they share.
#pragma once
#include "types.cuh"

namespace dualop::math {

// exp(-n (a + rest)) = two (1 + p), a in [-0.3, 92 / n]: `two` is a power of two, and p in [-0.3, 0.42] is -n r + r^2
// bend with r = a + rest - k ln 2 / n. r is exact but for `rest` and for what ln 2 has beyond 24 bits, 2.8e-9 of a; the
// polynomial is good to 2^-28. So `two` and p have next to no error where they are used apart.
template <int n> struct ScaledExp { float two, r, bend; };
template <int n> DUALOP_FUN ScaledExp<n> scaled_exp(float a, float rest = -0.0f) {
    const float k = ::fmaf(a, n * -1.44269504f, 12582912.0f) - 12582912.0f;  // beyond 2^23 there are integers only
    const float r = ::fmaf(k, 0.693147182f / n, a) + rest;
    float bend = ::fmaf(r, n * n * n * n * n * n * 0.00138207339f, -n * n * n * n * n * 0.00836867746f);
    bend = ::fmaf(r, ::fmaf(r, bend, n * n * n * n * 0.0416682661f), -n * n * n * 0.166665211f);
    return {ex2_approx(k), r, ::fmaf(r, bend, n * n * 0.49999994f)};
}
template <int n> DUALOP_FUN float small(ScaledExp<n> e) { return ::fmaf(e.r * e.r, e.bend, -n * e.r); }
template <int n> DUALOP_FUN float whole(ScaledExp<n> e) { return ::fmaf(e.two, small(e), e.two); }
template <int n> DUALOP_FUN float exp_below(float a, float rest = -0.0f) { return whole(scaled_exp<n>(a, rest)); }

// exp(z / alpha) for z <= 0, alpha > 0, with the remainder of the quotient.
DUALOP_FUN float exp_ratio(float z, float alpha, float inverse) {
    const float a = -max_nan(z, -89.0f * alpha), s = a * inverse;
    return exp_below<1>(s, ::fmaf(-s, alpha, a) * inverse);
}

// x / (1 + e) for e >= 0, with the remainder, which takes e itself: as good as one rounding.
DUALOP_FUN float quotient(float x, float e) {
    const float r = rcp_approx(1.0f + e), t = x * r;
    return ::fmaf(r, ::fmaf(-t, e, minus_rounded(x, t)), t);
}

// z - z^3 P(z^2) with a minimax polynomial near 0, then 1 - 2 e / (1 + e) with e = exp(-2 |z|).
DUALOP_FUN float tanh_long(float z) {
    const float u = z * z, e = exp_below<2>(min_nan(::fabsf(z), 44.0f)), far = ::fmaf(-2.0f, quotient(e, e), 1.0f);
    const float p = 0.333333313f + u * (-0.133331209f + u * (0.0539106987f + u * (-0.0213160906f + u * 0.00662128581f)));
    const float near = ::fmaf(z * u, -p, z);
    return ::copysignf(::fabsf(z) < 0.55f ? near : far, z);
}

// The same in one piece, off by up to 1.8 ulps instead of 1.1: (1 - e) / (1 + e), where the two parts of e give the
// difference from 1 before it is rounded.
DUALOP_FUN float tanh_short(float z) {
    const ScaledExp<2> e = scaled_exp<2>(min_nan(::fabsf(z), 44.0f));
    return ::copysignf(quotient(::fmaf(-e.two, small(e), 1.0f - e.two), whole(e)), z);
}

// A function's slope as factor (1 + more), where more is far from -1: a product of slopes adds small numbers then.
// Beside it the function's value, rounded, and what the rounding left.
struct Factored { float factor, more, value, rest; };
DUALOP_FUN float slope(float factor, float more) { return ::fmaf(factor, more, factor); }

// tanh at y + rest, y > -0.3. 1 - tanh^2 is good while tanh is small. Then comes 4 e (1 - h)^2 with e = exp(-2 y) in
// its parts and h = e / (1 + e). Here tanh is as in tanh_short, there 1 - 2 h.
DUALOP_FUN Factored tanh_slope(float y, float rest) {
    const ScaledExp<2> s = scaled_exp<2>(y, rest);
    const bool near = y < 0.65f;
    const float p = small(s), e = whole(s), complement = ::fmaf(-s.two, p, 1.0f - s.two);
    const float h = quotient(near ? complement : e, e), far = ::fmaf(-2.0f, h, 1.0f);
    const float square = h * h, more = ::fmaf(1.0f + p, ::fmaf(-2.0f, h, square), p), factor = 4.0f * s.two;
    return {near ? 1.0f : factor, near ? -square : more, near ? h : far, 0.0f};
}

// max(z, 0), but NaN at minus infinity, as torch has it of z times 0.
DUALOP_FUN float upper(float z) { return z < 0.0f ? 0.0f * z : z; }

// z sigmoid(z) = max(z, 0) - a v with a = |z|, v = sigmoid(-a).
DUALOP_FUN float silu(float z) {
    const float a = min_nan(::fabsf(z), 89.0f), e = exp_below<1>(a);
    return ::fmaf(-a, quotient(e, e), upper(z));
}

// The same up to 89, and its slope: 1 + s for z >= 0 and -s for z < 0, with s = a k - v and k = v (1 - v). That is 0 at
// z = -1.278: close to it k m with m = 1 - a + exp(-a), where only the small parts of exp are rounded.
DUALOP_FUN Factored silu_slope(float z) {
    const bool negative = z < 0.0f;
    const float a = min_nan(::fabsf(z), 89.0f);
    const ScaledExp<1> e = scaled_exp<1>(a);
    const float bent = e.r * e.r * e.bend, m = ::fmaf(e.two, bent, ::fmaf(-e.two, e.r, (1.0f - a) + e.two));
    const float v = quotient(whole(e), whole(e)), k = ::fmaf(-v, v, v), s = ::fmaf(a, k, -v), close = k * m;
    const float top = negative ? 0.0f : a, y = ::fmaf(-a, v, top), rest = ::fmaf(-a, v, top - y);
    const float below = ::fabsf(m) < 0.47f ? close : -s;
    return {negative ? below : 1.0f, negative ? 0.0f : s, y, rest};
}

// Three more coefficients of a polynomial, from the last one to the first.
DUALOP_FUN float horner(float t, float p, float c0, float c1, float c2) {
    return ::fmaf(t, ::fmaf(t, ::fmaf(t, p, c0), c1), c2);
}

// exp(-a^2 / 2), without the error of a rounded square; 0 from 13.2 on.
DUALOP_FUN float bell(float a) {
    const float half = 0.5f * a, square = half * a;
    return exp_below<1>(square, ::fmaf(half, a, -square));
}

// z Phi(z) = max(z, 0) - a Phi(-a) with a = |z|, Phi the normal distribution. Phi(-a) exp(a^2 / 2) is a polynomial,
// good to 2^-25.6 of gelu or of 0.002.
DUALOP_FUN float gelu(float z) {
    const float a = min_nan(::fabsf(z), 13.5f), t = a - 1.5f;
    float p = ::fmaf(t, ::fmaf(t, 5.74304326e-10f, -1.07933502e-08f), 8.90310048e-08f);
    p = horner(t, p, -4.50695865e-07f, 1.77829179e-06f, -6.78457263e-06f);
    p = horner(t, p, 2.66290353e-05f, -0.000101807513f, 0.000368819863f);
    p = horner(t, p, -0.00126653037f, 0.00411022268f, -0.0124968858f);
    p = horner(t, p, 0.0351868756f, -0.0902712867f, 0.20578067f);
    return ::fmaf(-a, bell(a) * p, upper(z));
}

// Phi(-a) - a Phi'(-a), gelu's slope at -a; at a it is 1 less that. Again exp(-a^2 / 2) times a polynomial, which has
// the zero at a = 0.7518 as a factor and is good to 2^-24.7 of the slope or of 0.001.
DUALOP_FUN float gelu_slope(float z) {
    const float a = min_nan(::fabsf(z), 13.5f), t = a - 1.5f;
    float p = ::fmaf(t, -1.05373654e-09f, 1.71440551e-08f);
    p = horner(t, p, -1.20537678e-07f, 5.31802755e-07f, -2.02528668e-06f);
    p = horner(t, p, 8.17472483e-06f, -3.31814408e-05f, 0.000127143823f);
    p = horner(t, p, -0.000463323813f, 0.00161250238f, -0.00531720091f);
    p = horner(t, p, 0.0164755825f, -0.0475138687f, 0.524763823f);
    const float below = bell(a) * ::fmaf(0.7517915368f - a, p, -1.21144495e-08f * p);
    return z < 0.0f ? below : 1.0f - below;
}

// z sigmoid(u) with u = slope (z + cubic z^3). At a = |z|, u comes with what its roundings left, which exp(-u) makes an
// error of; beside it a u'(a).
struct Cubic { float u, rest, rise; };
DUALOP_FUN Cubic gelu_cubic(float a) {
    constexpr float s = 1.59576917f, s_rest = -4.53406805e-08f, c = 0.0713548139f, c_rest = 2.39883247e-09f;
    const float q = a * a, p = ::fmaf(c, q, s), u = a * p;
    const float p_rest = ::fmaf(c, q, s - p) + ::fmaf(c_rest, q, ::fmaf(c, ::fmaf(a, a, -q), s_rest));
    const float rest = ::fmaf(a, p_rest, ::fmaf(a, p, -u));
    return {u, rest, u + ::fmaf(a, 2.0f * c * q, rest)};
}
DUALOP_FUN float gelu_tanh(float z) {
    const float a = min_nan(::fabsf(z), 10.1f);
    const Cubic i = gelu_cubic(a);
    const float e = exp_below<1>(i.u, i.rest);
    return ::fmaf(-a, quotient(e, e), upper(z));
}

// With v = sigmoid(-u) the slope at -a is v n, n = 1 - a u' (1 - v), and 1 less that at a; v is two (1 + p) (1 - v).
// Around the zero at -0.7525 a polynomial, good to 2^-24.5.
DUALOP_FUN float gelu_tanh_slope(float z) {
    const Cubic i = gelu_cubic(min_nan(::fabsf(z), 10.1f));
    const ScaledExp<1> e = scaled_exp<1>(i.u, i.rest);
    const float v = quotient(whole(e), whole(e)), more = ::fmaf(-v, 1.0f + small(e), small(e));
    const float far = slope(e.two * ::fmaf(i.rise, v, 1.0f - i.rise), more);
    const float t = (z + 0.752461433f) - 1.13396283e-08f;
    float p = horner(t, -0.000920474995f, -0.00223021652f, 0.0052988017f, 0.0196351148f);
    p = horner(t, p, -0.016630888f, -0.113940619f, -0.0157818887f);
    p = ::fmaf(t, ::fmaf(t, p, 0.387518406f), 0.430400074f);
    const float close = t * p, below = ::fabsf(t + 0.05f) < 0.6f ? close : far;
    return z < 0.0f ? below : 1.0f - below;
}

// z tanh(softplus(z)) = max(z, 0) - a v with v = w / (1 + w) for z < 0 and v = square / (1 + w) for z >= 0, where
// a = |z|, square = u^2 / 2, w = u + square, and u = exp(-a) for z < 0, twice that for z >= 0.
struct MishParts { float u, half, square, w; };
DUALOP_FUN MishParts mish_parts(float a, bool negative) {
    const float u = (negative ? 1.0f : 2.0f) * exp_below<1>(a), half = 0.5f * u;
    return {u, half, half * u, ::fmaf(half, u, u)};
}
DUALOP_FUN float mish(float z) {
    const bool negative = z < 0.0f;
    const float a = min_nan(::fabsf(z), 89.0f);
    const MishParts m = mish_parts(a, negative);
    return ::fmaf(-a, quotient(negative ? m.w : m.square, m.w), upper(z));
}

// With d = 1 + w and h = 1 + u / 2 the slope is u (1 - a + u (h^2 + 1/2 - a)) / d^2 for z < 0, around whose zero at
// -1.1924 there is a polynomial, good to 2^-24.5; and for z >= 0 it is 1 + u^2 (a h / d - 1/2) / d.
DUALOP_FUN float mish_slope(float z) {
    const bool negative = z < 0.0f;
    const float a = min_nan(::fabsf(z), 89.0f), t = z + 1.19243121f;
    const MishParts m = mish_parts(a, negative);
    const float r = quotient(1.0f, m.w), h = 1.0f + m.half;
    const float x = m.u * ::fmaf(m.u, ::fmaf(h, h, 0.5f - a), 1.0f - a), far = ::fmaf(x, ::fmaf(r, r, -1.0f), x);
    const float above = ::fmaf(m.u * m.u * r, ::fmaf(a * h, r, -0.5f), 1.0f);
    float p = horner(t, -4.33991991e-05f, -0.000100244768f, 0.000274161459f, 0.00102499081f);
    p = horner(t, p, 0.00107128907f, -0.00336712599f, -0.0158150587f);
    p = horner(t, p, -0.0202716477f, 0.0419072025f, 0.204731271f);
    // The last number is what the zero has beyond 24 bits, times the slope's slope there.
    const float close = ::fmaf(t, ::fmaf(t, p, 0.266947925f), 8.12570985e-10f), below = z > -1.8f ? close : far;
    return negative ? below : above;
}

// The same for z >= -0.31, where tanh(softplus(z)) = (1 + u) / d, u = 2 exp(-z), is at least 1/2. It is `ratio`, and
// `rest` its remainder, which takes 1 + u unrounded. The slope is this quotient + z (1 + u / 2) (u / d)^2.
struct MishUpper { float e, r, share, ratio, rest; };
DUALOP_FUN MishUpper mish_upper_parts(float a) {
    const float e = exp_below<1>(a), u = 2.0f * e, w = ::fmaf(u, e, u), r = rcp_approx(1.0f + w);
    const float ratio = ::fmaf(u, r, r);
    return {e, r, u * r, ratio, (1.0f - ratio) + ::fmaf(-ratio, w, u)};
}
DUALOP_FUN float mish_upper(float z) {
    const float a = min_nan(z, 89.0f);
    const MishUpper m = mish_upper_parts(a);
    return ::fmaf(z, m.ratio, a * m.r * m.rest);
}
DUALOP_FUN float mish_upper_slope(float z) {
    const float a = min_nan(z, 89.0f);
    const MishUpper m = mish_upper_parts(a);
    return m.ratio + ::fmaf(m.r, m.rest, ::fmaf(a, m.e, a) * m.share * m.share);
}

}  // namespace dualop::math
