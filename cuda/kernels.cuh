// The three kernels. A program (one block) covers a tile of blockDim.y * UNROLL rows and blockDim.x * vec columns, and
// makes `steps` such tiles, one below the other or, where a gradient is summed along rows, one beside the other.
#pragma once
#include "view.cuh"

namespace dualop {

template <int inputs> struct Arguments {
    index_t rows, cols, total;  // total: elements; less than rows * cols where the last row is short
    index_t col_programs, steps, row_step, col_step;
    void* y;
    const void* gy;
    View in[inputs];
};

// What is compiled: a chain, the result's type and the inputs' types and kinds, x first.
template <class Stages_, class Y_, class... Inputs> struct Problem {
    using Stages = Stages_;
    using Y = Y_;
    static constexpr int inputs = sizeof...(Inputs), bits = significant_bits<Y>;
    // A bfloat16 gradient takes float16's functions, which share their parts with their derivatives.
    static constexpr int gradient_bits = bits < 11 ? 11 : bits;
    static constexpr int wide = 16 / static_cast<int>(sizeof(Y));
    using R = real<bits>;
    template <int vec> using Fragments = dualop::Fragments<vec, R, Inputs...>;
    template <int vec> using Gradients = dualop::Gradients<vec, R, Inputs...>;
};

// The first row and column of a program, and its numbers among the rows' and the columns' programs.
template <int vec> struct Tile {
    index_t row_program, col_program, row, column;
    template <int n> DUALOP_FUN explicit Tile(const Arguments<n>& a) {
        const unsigned programs = static_cast<unsigned>(a.col_programs);
        row_program = blockIdx.x / programs;
        col_program = blockIdx.x % programs;
        row = row_program * (a.row_step ? a.row_step * a.steps : static_cast<index_t>(blockDim.y) * UNROLL);
        column = col_program * (a.col_step ? a.col_step * a.steps : static_cast<index_t>(blockDim.x) * vec);
    }
};

template <class P, int vec> __global__ void __launch_bounds__(THREADS, 1) forward_kernel(const Arguments<P::inputs> a) {
    using R = typename P::R;
    const Tile<vec> tile(a);
    for (index_t step = 0; step < a.steps; step++) {
        const Place<vec> at(tile.row + step * a.row_step, tile.column + step * a.col_step, a.cols, a.total);
        typename P::template Fragments<vec> in;
        in.load(a.in, at);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            R values[P::inputs][vec], y[vec];
            in.values(u, values);
#pragma unroll
            for (int v = 0; v < vec; v++) {
                R element[P::inputs];
#pragma unroll
                for (int i = 0; i < P::inputs; i++) element[i] = values[i][v];
                y[v] = P::Stages::template forward<P::bits>(element[0], element);
            }
            Pack<typename P::Y, vec> pack;
            pack.pack(y);
            pack.store(static_cast<typename P::Y*>(a.y) + at.row[u] * a.cols + at.column, at.valid[u]);
        }
    }
}

template <class P, int vec> __global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Arguments<P::inputs> a) {
    using R = typename P::R;
    const Tile<vec> tile(a);
    typename P::template Gradients<vec> gradients;
    for (index_t step = 0; step < a.steps; step++) {
        const Place<vec> at(tile.row + step * a.row_step, tile.column + step * a.col_step, a.cols, a.total);
        typename P::template Fragments<vec> in;
        in.load(a.in, at);
        Pack<typename P::Y, vec> gy[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            gy[u].load(static_cast<const typename P::Y*>(a.gy) + at.row[u] * a.cols + at.column, at.valid[u]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            R values[P::inputs][vec], g[P::inputs][vec], out[vec];
            in.values(u, values);
            gy[u].unpack(out);
#pragma unroll
            for (int v = 0; v < vec; v++) {
                R element[P::inputs], gradient[P::inputs] = {};
#pragma unroll
                for (int i = 0; i < P::inputs; i++) element[i] = values[i][v];
                gradient[0] += P::Stages::template backward<P::gradient_bits>(element[0], out[v], element, gradient);
#pragma unroll
                for (int i = 0; i < P::inputs; i++) g[i][v] = gradient[i];
            }
            gradients.add(a.in, at, u, a.cols, g);
        }
    }
    const Place<vec> at(tile.row, tile.column, a.cols, a.total);
    gradients.finish(a.in, at, a.cols, tile.row_program, tile.col_program, a.col_programs);
}

constexpr int SUM_X = 32, SUM_Y = 32;

// sum[k, n] = the partial sums [outer, k, inner, n] over outer and inner, in float64 and in a fixed order.
template <class R, class T> DUALOP_FUN void sum_partials(const View& view) {
    __shared__ double buffer[SUM_Y][SUM_X];
    const index_t outputs = view.kept * view.columns, out = static_cast<index_t>(blockIdx.x) * SUM_X + threadIdx.x;
    const R* partial = static_cast<const R*>(view.gradient);
    double sum = 0;
    if (out < outputs) {
        const index_t k = out / view.columns, n = out % view.columns;
        for (index_t term = threadIdx.y; term < view.outer * view.inner; term += SUM_Y) {
            const index_t o = view.inner == 1 ? term : term / view.inner, i = term - o * view.inner;
            sum += partial[((o * view.kept + k) * view.inner + i) * view.columns + n];
        }
    }
    buffer[threadIdx.y][threadIdx.x] = sum;
    for (int half = SUM_Y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.y) < half) buffer[threadIdx.y][threadIdx.x] += buffer[threadIdx.y + half][threadIdx.x];
    }
    if (threadIdx.y == 0 && out < outputs) {
        const double total[1] = {buffer[0][threadIdx.x]};
        Pack<T, 1> pack;
        pack.pack(total);
        pack.store(static_cast<T*>(view.sum) + out, 1);
    }
}

// blockIdx.y is the input whose partial sums this block adds up.
template <class R, class... Inputs> struct Sums {
    DUALOP_FUN static void run(const View*, int) {}
};
template <class R, class First, class... Rest> struct Sums<R, First, Rest...> {
    DUALOP_FUN static void run(const View* view, int input) {
        if (input > 0) return Sums<R, Rest...>::run(view + 1, input - 1);
        if constexpr ((First::kind & ~SPLIT) != FULL) {
            if (view->sum != nullptr) sum_partials<R, typename First::type>(*view);
        }
    }
};

template <class P> struct SumsOf;
template <class Stages, class Y, class... Inputs> struct SumsOf<Problem<Stages, Y, Inputs...>> {
    using type = Sums<typename Problem<Stages, Y, Inputs...>::R, Inputs...>;
};

template <class P> __global__ void __launch_bounds__(SUM_X * SUM_Y) sum_kernel(const Arguments<P::inputs> a) {
    SumsOf<P>::type::run(a.in, blockIdx.y);
}

}  // namespace dualop
