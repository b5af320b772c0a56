// The double backward of a chain of one variable, compiled as a library of its own when it is first wanted: the slope of
// the chain, gy f'(z), as a function of the inputs (z, gy), whose backward is the kernel of kernels.cuh.
//
//     Slope<Curved<stage::silu>, With<stage::mul, Number<number(2.0)>>, Only<stage::relu>>
#pragma once
#include "library.cuh"

namespace dualop {

// A stage with its second derivative.
template <class Stage> struct Curved : Only<Stage> {
    template <int bits, class T> DUALOP_FUN static T second(T z) { return Stage::template second<bits>(z); }
};
template <class Stage> constexpr bool curved = false;
template <class Stage> constexpr bool curved<Curved<Stage>> = true;
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
