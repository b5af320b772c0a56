// The three kernels. A program (one block) covers a tile of blockDim.y * rows rows and blockDim.x * vec columns; in
// backward it makes `steps` such tiles, further down or, where a gradient is summed along rows, further to the right.
#pragma once
#include "view.cuh"

namespace dualop {

template <class F, int inputs> struct Arguments {
    word rows, cols, total;  // total: elements; less than rows * cols where the last row is short
    word steps, row_step, col_step;
    void* y;
    const void* gy;
    Divisor row_sizes[F::rows], col_sizes[F::cols];
    View<F> in[inputs];
};

// The rows that a thread works on at once, and how many blocks of THREADS have to fit into a multiprocessor's registers.
template <int rows_, int blocks_> struct Cut {
    static constexpr int rows = rows_, blocks = blocks_;
};

// What is compiled: a chain, how the two kernels are cut, the form of the layout, and how the result and the inputs lie, x
// first. The result's access is that to gy.
template <class Stages_, class Forward_, class Backward_, class F_, class Result, class... Inputs> struct Problem {
    using Stages = Stages_;
    using Forward = Forward_;
    using Backward = Backward_;
    using F = F_;
    using Y = typename Result::type;
    using Given = Result;
    static constexpr int inputs = sizeof...(Inputs), bits = significant_bits<Y>;
    static constexpr int gradient_bits = bits < 11 ? 11 : bits;  // float16's functions share parts with their derivatives
    static constexpr int vec = 16 / static_cast<int>(sizeof(Y));
    using R = real<bits>;
    template <class Cut> using At = Place<F, vec, Cut::rows>;
    template <class Cut> using Fragments = dualop::Fragments<F, vec, Cut::rows, R, Inputs...>;
    template <class Cut> using Gradients = dualop::Gradients<F, vec, Cut::rows, R, Inputs...>;
};

// The tiles of a program.
template <class P, class Cut> struct Walk {
    const Arguments<typename P::F, P::inputs>& arguments;
    index_t row, column, row_step, col_step;
    DUALOP_FUN explicit Walk(const Arguments<typename P::F, P::inputs>& a)
        : arguments(a), row(row_program() * static_cast<index_t>(blockDim.y * Cut::rows)),
          column(col_program() * static_cast<index_t>(blockDim.x * P::vec)),
          row_step(static_cast<index_t>(a.row_step)), col_step(static_cast<index_t>(a.col_step)) {}
    DUALOP_FUN typename P::template At<Cut> tile(index_t step) const {
        return typename P::template At<Cut>(row + step * row_step, column + step * col_step, arguments);
    }
};

template <class P>
__global__ void __launch_bounds__(THREADS, P::Forward::blocks) forward_kernel(const Arguments<typename P::F, P::inputs> a) {
    using R = typename P::R;
    constexpr int rows = P::Forward::rows, vec = P::vec;
    wait_for_kernel_before();
    const Walk<P, typename P::Forward> walk(a);
    const auto at = walk.tile(0);
    typename P::template Fragments<typename P::Forward> in;
    in.load(a.in, at, true);
#pragma unroll
    for (int u = 0; u < rows; u++) {
        if (!at.ok[u]) continue;
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
        write_pack(pack, static_cast<typename P::Y*>(a.y) + at.start(u), at, u);
    }
}

template <class P>
__global__ void __launch_bounds__(THREADS, P::Backward::blocks)
    backward_kernel(const Arguments<typename P::F, P::inputs> a) {
    using R = typename P::R;
    using Y = typename P::Y;
    constexpr int rows = P::Backward::rows, vec = P::vec;
    wait_for_kernel_before();
    const Walk<P, typename P::Backward> walk(a);
    typename P::template Gradients<typename P::Backward> gradients;
    typename P::template Fragments<typename P::Backward> in;
    for (index_t step = 0; step < static_cast<index_t>(a.steps); step++) {
        const auto at = walk.tile(step);
        in.load(a.in, at, step == 0 || walk.col_step != 0);
        Pack<Y, vec> gy[rows];
#pragma unroll
        for (int u = 0; u < rows; u++) {
            if (!at.ok[u]) continue;
            const Y* from = static_cast<const Y*>(a.gy) + at.start(u);
            if constexpr (P::Given::access == WIDE) read_pack(gy[u], from, at.left(u));
            else read_near(gy[u], from, at.total - at.start(u));
        }
#pragma unroll
        for (int u = 0; u < rows; u++) {
            if (!at.ok[u]) continue;
            R values[P::inputs][vec], g[P::inputs][vec], out[vec];
            in.values(u, values);
            gy[u].unpack(out);
#pragma unroll
            for (int v = 0; v < vec; v++) {
                R element[P::inputs];
                Parts<R> gradient[P::inputs];
#pragma unroll
                for (int i = 0; i < P::inputs; i++) element[i] = values[i][v];
                gradient[0].add(P::Stages::template backward<P::gradient_bits>(element[0], out[v], element, gradient));
#pragma unroll
                for (int i = 0; i < P::inputs; i++) g[i][v] = gradient[i].sum;
            }
            gradients.add(a.in, at, u, g);
        }
    }
    let_next_kernel_begin();
    gradients.finish(a.in, walk.tile(0));
}

constexpr int SUM_THREADS = 1024, TERMS = 8;  // at most, and for each of them: read at once, since latency counts

// sum[k, n] = the partial sums [outer, k, inner, n] over outer and inner, in float64 and in a fixed order: a thread for
// each output along x and every blockDim.y-th term along y.
template <class R, class T, class F> DUALOP_FUN void sum_partials(const View<F>& view) {
    __shared__ double buffer[SUM_THREADS];
    const index_t columns = static_cast<index_t>(view.columns), inner = static_cast<index_t>(view.inner);
    const index_t kept = static_cast<index_t>(view.kept), outputs = kept * columns;
    const index_t out = static_cast<index_t>(blockIdx.x * blockDim.x + threadIdx.x);
    const R* partial = static_cast<const R*>(view.gradient);
    double sum = 0;
    if (out < outputs) {
        const index_t k = kept == 1 ? 0 : out / columns, n = out - k * columns;
        const index_t terms = static_cast<index_t>(view.outer) * inner, by = static_cast<index_t>(blockDim.y);
        for (index_t first = static_cast<index_t>(threadIdx.y); first < terms; first += TERMS * by) {
            R value[TERMS];  // 0 beyond the last term, whose address is made and not used
#pragma unroll
            for (int t = 0; t < TERMS; t++) {
                const index_t term = first + t * by, o = kept == 1 ? 0 : term / inner, i = term - o * inner;
                const index_t at = ((o * kept + k) * inner + i) * columns + n;
                value[t] = term < terms ? partial[at] : R(0);
            }
#pragma unroll
            for (int t = 0; t < TERMS; t++) sum += value[t];
        }
    }
    let_next_kernel_begin();
    const int me = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x), wide = static_cast<int>(blockDim.x);
    buffer[me] = sum;
    for (int half = static_cast<int>(blockDim.y) / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.y) < half) buffer[me] += buffer[me + half * wide];
    }
    if (threadIdx.y == 0 && out < outputs) {
        const double total[1] = {buffer[me]};
        Pack<T, 1> pack;
        pack.pack(total);
        pack.store(static_cast<T*>(view.sum) + out);
    }
}

// blockIdx.y is the input whose partial sums this block adds up.
template <class R, class F, class... Inputs> struct Sums {
    DUALOP_FUN static void run(const View<F>*, int) {}
};
template <class R, class F, class First, class... Rest> struct Sums<R, F, First, Rest...> {
    DUALOP_FUN static void run(const View<F>* view, int input) {
        if (input > 0) return Sums<R, F, Rest...>::run(view + 1, input - 1);
        if constexpr (First::kind != FULL) {
            if (view->sum != nullptr) sum_partials<R, typename First::type>(*view);
        }
    }
};

template <class P> struct SumsOf;
template <class Stages, class Forward, class Backward, class F, class Result, class... Inputs>
struct SumsOf<Problem<Stages, Forward, Backward, F, Result, Inputs...>> {
    using type = Sums<real<significant_bits<typename Result::type>>, F, Inputs...>;
};

template <class P> __global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const Arguments<typename P::F, P::inputs> a) {
    wait_for_kernel_before();
    SumsOf<P>::type::run(a.in, static_cast<int>(blockIdx.y));
}

// Launches it for up to `outputs` outputs an input with up to `terms` terms each: as many threads side by side as there
// are outputs, at most a warp. So the order of a sum depends on which gradients are wanted, too.
template <class P>
int sum(word outputs, word terms, void* stream, const Arguments<typename P::F, P::inputs>& arguments) {
    unsigned x = 1, y = 1;
    while (x < 32 && x < outputs) x *= 2;
    while (y < SUM_THREADS / x && y * TERMS < terms) y *= 2;
    launch(sum_kernel<P>, dim3(static_cast<unsigned>((outputs + x - 1) / x), P::inputs), dim3(x, y), stream, arguments);
    return last_error();
}

}  // namespace dualop
