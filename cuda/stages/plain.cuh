// Plain functions. ../stages.cuh says what each has.
#pragma once

namespace dualop::stage {

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
    template <int bits, class T> DUALOP_FUN static T second(T) { return T(2); }
};

struct sqrt {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return ::sqrt(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return math::divide<bits>(gy, T(2) * ::sqrt(z)); }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return math::divide<bits>(T(-0.25), z * ::sqrt(z)); }
};

struct reciprocal {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::divide<bits>(T(1), z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) {
        const T r = math::divide<bits>(T(1), z);
        return -gy * (r * r);
    }
    template <int bits, class T> DUALOP_FUN static T second(T z) {
        const T r = math::divide<bits>(T(1), z);
        return T(2) * r * r * r;
    }
};

struct exp {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::exp<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * math::exp<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return math::exp<bits>(z); }
};

struct sin {
    template <int bits, class T> DUALOP_FUN static T forward(T z) { return math::sin(z); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy) { return gy * math::cos(z); }
    template <int bits, class T> DUALOP_FUN static T second(T z) { return -math::sin(z); }
};

}  // namespace dualop::stage
