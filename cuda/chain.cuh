// A chain is a list of types, one a stage. Its backward is the recursion forward on the way down, backward on the way
// up, so that every intermediate stays in a register.
//
//     Chain<With<stage::add, Operand<1>>, Only<stage::silu>, With<stage::mul, Number<number(2.0)>>>
#pragma once
#include "stages.cuh"

namespace dualop {

// A gradient that is given in any number of parts. `empty` is known to the compiler, so a first part costs no addition.
template <class T> struct Parts {
    T sum;
    bool empty = true;
    DUALOP_FUN void add(T part) {
        sum = empty ? part : sum + part;
        empty = false;
    }
};

// What an operand stage takes: input number `index` (0 is x), or a number. `in` are all inputs at one element.
template <int index> struct Operand {
    template <class T> DUALOP_FUN static T get(const T* in) { return in[index]; }
    template <class T> DUALOP_FUN static void give(Parts<T>* gradients, T g) { gradients[index].add(g); }
};
template <number_bits bits> struct Number {
    template <class T> DUALOP_FUN static T get(const T*) { return value<T>(bits); }
    template <class T> DUALOP_FUN static void give(Parts<T>*, T) {}
};

template <class Stage, class = void> constexpr bool has_inner = false;
template <class Stage> constexpr bool has_inner<Stage, decltype(void(&Stage::template inner<24, float>))> = true;

// A stage as the recursion sees it: forward, the value on the way in a backward, and backward.
template <class Stage> struct Only {
    template <int bits, class T> DUALOP_FUN static T forward(T z, const T*) { return Stage::template forward<bits>(z); }
    template <int bits, class T> DUALOP_FUN static T inner(T z, const T*) {
        if constexpr (has_inner<Stage>) return Stage::template inner<bits>(z);
        else return Stage::template forward<bits>(z);
    }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy, const T*, Parts<T>*) {
        return Stage::template backward<bits>(z, gy);
    }
};
template <class Stage, class Source> struct With {
    template <int bits, class T> DUALOP_FUN static T forward(T z, const T* in) {
        return Stage::template forward<bits>(z, Source::get(in));
    }
    template <int bits, class T> DUALOP_FUN static T inner(T z, const T* in) { return forward<bits>(z, in); }
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy, const T* in, Parts<T>* gradients) {
        T gb;
        const T gz = Stage::template backward<bits>(z, Source::get(in), gy, gb);
        Source::give(gradients, gb);
        return gz;
    }
};

template <class... Stages> struct Chain;

template <> struct Chain<> {
    template <int bits, class T> DUALOP_FUN static T forward(T z, const T*) { return z; }
    template <int bits, class T> DUALOP_FUN static T backward(T, T gy, const T*, Parts<T>*) { return gy; }
};

template <class First, class... Rest> struct Chain<First, Rest...> {
    template <int bits, class T> DUALOP_FUN static T forward(T z, const T* in) {
        return Chain<Rest...>::template forward<bits>(First::template forward<bits>(z, in), in);
    }
    // Returns the gradient of z and adds those of the operands to `gradients`.
    template <int bits, class T> DUALOP_FUN static T backward(T z, T gy, const T* in, Parts<T>* gradients) {
        const T y = First::template inner<bits>(z, in);
        const T gz = Chain<Rest...>::template backward<bits>(y, gy, in, gradients);
        return First::template backward<bits>(z, gz, in, gradients);
    }
};

}  // namespace dualop
