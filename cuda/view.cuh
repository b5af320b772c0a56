// Inputs and their gradients as a thread sees them: `unroll` rows, blockDim.y apart, of `vec` neighbouring columns.
//
// At row r and column c an input's element is
//     data[(r / div % mod) * row_stride + r / (div * mod) * outer_stride + c]
// and its kind says which terms there are (dualop/layout.py makes the views). What varies along neither is loaded once, what varies along the columns only
// is shared by the thread's rows.
#pragma once
#include "chain.cuh"

namespace dualop {

constexpr int COLUMN = 1, ROW = 2, WRAP = 4, SPLIT = 8, FULL = COLUMN | ROW;
constexpr int THREADS = 256, UNROLL = 4;

using index_t = long long;

template <class T, int kind_> struct Input {
    using type = T;
    static constexpr int kind = kind_;
};

// One input in a launch's arguments. All members have 8 bytes: Python packs them.
struct View {
    const void* data;
    index_t div, mod, row_stride, outer_stride;
    void* gradient;                         // of this input, or its partial sums, or null where nobody wants it
    void* sum;                              // where the partial sums' sum goes, or null
    index_t outer, kept, inner, columns;    // the partial sums' shape; summed over outer and inner
};

// A thread's place: its rows, its first column, and how many of its columns exist in each row.
template <int vec> struct Place {
    index_t row[UNROLL], column;
    int valid[UNROLL], valid_column;

    DUALOP_FUN Place(index_t first_row, index_t first_column, index_t cols, index_t total) {
        column = first_column + static_cast<index_t>(threadIdx.x) * vec;
        valid_column = clip(cols - column);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            row[u] = first_row + threadIdx.y + u * static_cast<index_t>(blockDim.y);
            const index_t left = total - row[u] * cols;  // a folded last row is short, rows behind it have none
            valid[u] = clip((left < cols ? left : cols) - column);
        }
    }
    DUALOP_FUN static int clip(index_t n) { return n < 0 ? 0 : n > vec ? vec : static_cast<int>(n); }
};

// The values of one input at a place, still packed as in memory.
template <class I, int vec> struct Fragment {
    using T = typename I::type;
    static constexpr bool by_row = I::kind & ROW, by_column = I::kind & COLUMN;
    static constexpr int width = by_column ? vec : 1;
    Pack<T, width> pack[by_row ? UNROLL : 1];

    DUALOP_FUN void load(const View& view, const Place<vec>& at) {
        const T* data = static_cast<const T*>(view.data);
        if constexpr (!by_row) {
            pack[0].load(by_column ? data + at.column : data, by_column ? at.valid_column : 1);
        } else {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const index_t row = at.row[u];
                index_t offset = by_column ? at.column : 0;
                if constexpr (I::kind & WRAP) offset += row / view.div % view.mod * view.row_stride;
                else if constexpr (I::kind & SPLIT) {
                    const index_t outer = row / view.mod;
                    offset += outer * view.outer_stride + (row - outer * view.mod) * view.row_stride;
                } else offset += row * view.row_stride;
                pack[u].load(data + offset, by_column ? at.valid[u] : at.valid[u] > 0);
            }
        }
    }

    template <class R> DUALOP_FUN void values(int u, R (&out)[vec]) const {
        if constexpr (by_column) {
            pack[by_row ? u : 0].unpack(out);
        } else {
            R one[1];
            pack[by_row ? u : 0].unpack(one);
#pragma unroll
            for (int v = 0; v < vec; v++) out[v] = one[0];
        }
    }
};

// Sums value[0..n) over a group of `count` (a power of two) threads whose numbers lie `unit` apart, in a fixed order.
// The thread at `position` 0 has the sum afterwards.
template <class R, int n> DUALOP_FUN void group_sum(R (&value)[n], int position, int count, int unit) {
    __shared__ R buffer[n][THREADS];
    const int me = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();  // the buffer may still be read by a sum before this one
#pragma unroll
    for (int i = 0; i < n; i++) buffer[i][me] = value[i];
    for (int half = count / 2; half > 0; half /= 2) {
        __syncthreads();
        if (position < half) {
#pragma unroll
            for (int i = 0; i < n; i++) buffer[i][me] += buffer[i][me + half * unit];
        }
    }
#pragma unroll
    for (int i = 0; i < n; i++) value[i] = buffer[i][me];
}

// The gradient of one input: written row by row where it has the result's size, otherwise summed over the thread's
// elements, then over the block, and left as one partial sum a program.
template <class I, int vec, class R> struct Gradient {
    static constexpr bool whole = (I::kind & FULL) == FULL;
    static constexpr int count = whole ? 1 : I::kind == COLUMN ? vec : I::kind & ROW ? UNROLL : 1;
    R sum[count] = {};

    DUALOP_FUN void add(const View& view, const Place<vec>& at, int u, index_t cols, const R (&g)[vec]) {
        if constexpr (whole) {
            if (view.gradient == nullptr || at.valid[u] == 0) return;
            const index_t offset = at.row[u] * cols + at.column;
            if constexpr (I::kind & WRAP) store(static_cast<R*>(view.gradient) + offset, g, at.valid[u]);
            else store(static_cast<typename I::type*>(view.gradient) + offset, g, at.valid[u]);
        } else {
#pragma unroll
            for (int v = 0; v < vec; v++) {
                const R kept = v < at.valid[u] ? g[v] : R(0);
                sum[I::kind == COLUMN ? v : I::kind & ROW ? u : 0] += kept;
            }
        }
    }

    template <class T> DUALOP_FUN static void store(T* to, const R (&g)[vec], int valid) {
        Pack<T, vec> pack;
        pack.pack(g);
        pack.store(to, valid);
    }

    DUALOP_FUN void finish(const View& view, const Place<vec>& at, index_t cols, index_t row_program, index_t col_program,
                           index_t col_programs) {
        if constexpr (!whole) {
            if (view.gradient == nullptr) return;
            R* out = static_cast<R*>(view.gradient);
            const int x = threadIdx.x, y = threadIdx.y;
            if constexpr (I::kind == COLUMN) {
                if (blockDim.y > 1) group_sum(sum, y, blockDim.y, blockDim.x);
#pragma unroll
                for (int v = 0; v < vec; v++) {
                    if (y == 0 && v < at.valid_column) out[row_program * cols + at.column + v] = sum[v];
                }
            } else if constexpr (I::kind & ROW) {
                group_sum(sum, x, blockDim.x, 1);
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    if (x == 0 && at.valid[u] > 0) out[at.row[u] * col_programs + col_program] = sum[u];
                }
            } else {
                group_sum(sum, y * blockDim.x + x, THREADS, 1);
                if (x == 0 && y == 0) out[row_program * col_programs + col_program] = sum[0];
            }
        }
    }
};

// The same for all inputs, one after the other.
template <int vec, class R, class... Inputs> struct Fragments {
    DUALOP_FUN void load(const View*, const Place<vec>&) {}
    DUALOP_FUN void values(int, R (*)[vec]) const {}
};
template <int vec, class R, class First, class... Rest> struct Fragments<vec, R, First, Rest...> {
    Fragment<First, vec> first;
    Fragments<vec, R, Rest...> rest;
    DUALOP_FUN void load(const View* view, const Place<vec>& at) {
        first.load(view[0], at);
        rest.load(view + 1, at);
    }
    DUALOP_FUN void values(int u, R (*out)[vec]) const {
        first.values(u, out[0]);
        rest.values(u, out + 1);
    }
};

template <int vec, class R, class... Inputs> struct Gradients {
    DUALOP_FUN void add(const View*, const Place<vec>&, int, index_t, const R (*)[vec]) {}
    DUALOP_FUN void finish(const View*, const Place<vec>&, index_t, index_t, index_t, index_t) {}
};
template <int vec, class R, class First, class... Rest> struct Gradients<vec, R, First, Rest...> {
    Gradient<First, vec, R> first;
    Gradients<vec, R, Rest...> rest;
    DUALOP_FUN void add(const View* view, const Place<vec>& at, int u, index_t cols, const R (*g)[vec]) {
        first.add(view[0], at, u, cols, g[0]);
        rest.add(view + 1, at, u, cols, g + 1);
    }
    DUALOP_FUN void finish(const View* view, const Place<vec>& at, index_t cols, index_t row_program, index_t col_program,
                           index_t col_programs) {
        first.finish(view[0], at, cols, row_program, col_program, col_programs);
        rest.finish(view + 1, at, cols, row_program, col_program, col_programs);
    }
};

}  // namespace dualop
