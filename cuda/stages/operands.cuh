// Operand stages: forward(z, b) and backward(z, b, gy, gb). ../stages.cuh says what each has.
#pragma once

namespace dualop::stage {

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
    template <int bits, class T> DUALOP_FUN static T forward(T z, T b) { return math::divide<bits>(z, b); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T b, T gy, T& gb) {
        gb = -gy * math::divide<bits>(math::divide<bits>(z, b), b);
        return math::divide<bits>(gy, b);
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

}  // namespace dualop::stage
