// Inputs and their gradients as a thread sees them: `rows` rows, blockDim.y apart, of `vec` neighbouring columns.
//
// At row r and column c an input's element is
//     data[(r / div % mod) * row_stride + r / (div * mod) * outer_stride + c]
// and its kind says which terms there are (dualop/launch/layout.py makes the views). What varies along neither is loaded once,
// what varies along the columns only is shared by the thread's rows.
#pragma once
#include "chain.cuh"

namespace dualop {

constexpr int COLUMN = 1, ROW = 2, WRAP = 4, SPLIT = 8, FULL = COLUMN | ROW;
constexpr int THREADS = 256;  // of a block at most; always a power of two

using word = long long;  // Python packs all arguments as 8-byte words

// index_t, the type of rows, columns and offsets, is declared above these headers: int where all offsets fit in it.

template <class T, int kind_> struct Input {
    using type = T;
    static constexpr int kind = kind_;
};

// One input in a launch's arguments.
struct View {
    const void* data;
    word div, mod, row_stride, outer_stride;
    void* gradient;                      // of this input, or its partial sums, or null where nobody wants it
    void* sum;                           // where the partial sums' sum goes; null where there are none
    word outer, kept, inner, columns;    // the partial sums' shape; summed over outer and inner
};

// Which program this is, of how many.
DUALOP_FUN index_t row_program() { return static_cast<index_t>(blockIdx.z * gridDim.y + blockIdx.y); }
DUALOP_FUN index_t col_program() { return static_cast<index_t>(blockIdx.x); }
DUALOP_FUN index_t col_programs() { return static_cast<index_t>(gridDim.x); }

// A thread's place: its rows, its first column, and where they exist. The columns of an access exist all or none.
template <int vec, int rows> struct Place {
    index_t row[rows], column;
    bool ok[rows], ok_column;

    DUALOP_FUN Place(index_t first_row, index_t first_column, index_t cols, index_t total) {
        column = first_column + static_cast<index_t>(threadIdx.x * vec);
        ok_column = column < cols;
#pragma unroll
        for (int u = 0; u < rows; u++) {
            row[u] = first_row + static_cast<index_t>(threadIdx.y + u * blockDim.y);
            ok[u] = ok_column && row[u] * cols + column < total;  // a folded last row is short
        }
    }
};

// The values of one input at a place, still packed as in memory.
template <class I, int vec, int rows> struct Fragment {
    using T = typename I::type;
    static constexpr bool by_row = I::kind & ROW, by_column = I::kind & COLUMN;
    static constexpr int width = by_column ? vec : 1;
    Pack<T, width> pack[by_row ? rows : 1];

    // What does not vary along the rows is loaded only if `first`: if the columns are not those of the tile before.
    DUALOP_FUN void load(const View& view, const Place<vec, rows>& at, bool first) {
        const T* data = static_cast<const T*>(view.data);
        const index_t row_stride = static_cast<index_t>(view.row_stride), mod = static_cast<index_t>(view.mod);
        if constexpr (!by_row) {
            if (first) pack[0].load(by_column ? data + at.column : data, !by_column || at.ok_column);
        } else {
#pragma unroll
            for (int u = 0; u < rows; u++) {
                const index_t row = at.row[u];
                index_t offset = by_column ? at.column : 0;
                if constexpr (I::kind & WRAP) offset += row / static_cast<index_t>(view.div) % mod * row_stride;
                else if constexpr (I::kind & SPLIT) {
                    const index_t outer = row / mod;
                    offset += outer * static_cast<index_t>(view.outer_stride) + (row - outer * mod) * row_stride;
                } else offset += row * row_stride;
                pack[u].load(data + offset, at.ok[u]);
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

// Sums value[0..n) over a group of `count` (a power of two) threads whose numbers lie `unit` apart, in a fixed order: by
// eights, since each step waits for all threads. The thread at `position` 0 has the sum afterwards.
template <class R, int n> DUALOP_FUN void group_sum(R (&value)[n], int position, int count, int unit) {
    __shared__ R buffer[n][THREADS];
    const int me = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();  // the buffer may still be read by a sum before this one
#pragma unroll
    for (int i = 0; i < n; i++) buffer[i][me] = value[i];
    for (int left = count; left > 1;) {
        const int parts = left < 8 ? left : 8;
        left /= parts;
        __syncthreads();
        if (position < left) {
#pragma unroll
            for (int part = 1; part < 8; part++) {
                if (part >= parts) break;
#pragma unroll
                for (int i = 0; i < n; i++) value[i] += buffer[i][me + part * left * unit];
            }
#pragma unroll
            for (int i = 0; i < n; i++) buffer[i][me] = value[i];
        }
    }
}

// The gradient of one input: written row by row where it has the result's size, otherwise summed over the thread's
// elements, then over the block, and left as one partial sum a program; where one program has all of a sum, as the
// gradient itself.
template <class I, int vec, int rows, class R> struct Gradient {
    static constexpr bool whole = (I::kind & FULL) == FULL;
    static constexpr int count = whole ? 1 : I::kind == COLUMN ? vec : I::kind & ROW ? rows : 1;
    R sum[count] = {};

    // Of an element that exists.
    DUALOP_FUN void add(const View& view, const Place<vec, rows>& at, int u, index_t cols, const R (&g)[vec]) {
        if constexpr (whole) {
            if (view.gradient == nullptr) return;
            const index_t offset = at.row[u] * cols + at.column;
            if constexpr (I::kind & WRAP) store(static_cast<R*>(view.gradient) + offset, g);
            else store(static_cast<typename I::type*>(view.gradient) + offset, g);
        } else {
#pragma unroll
            for (int v = 0; v < vec; v++) sum[I::kind == COLUMN ? v : I::kind & ROW ? u : 0] += g[v];
        }
    }

    template <class T> DUALOP_FUN static void store(T* to, const R (&g)[vec]) {
        Pack<T, vec> pack;
        pack.pack(g);
        pack.store(to);
    }

    DUALOP_FUN static void leave(const View& view, index_t offset, R total) {
        if (view.sum != nullptr) {
            static_cast<R*>(view.gradient)[offset] = total;
        } else {
            const R one[1] = {total};
            Pack<typename I::type, 1> pack;
            pack.pack(one);
            pack.store(static_cast<typename I::type*>(view.gradient) + offset);
        }
    }

    DUALOP_FUN void finish(const View& view, const Place<vec, rows>& at, index_t cols) {
        if constexpr (!whole) {
            if (view.gradient == nullptr) return;
            const int x = threadIdx.x, y = threadIdx.y;
            if constexpr (I::kind == COLUMN) {
                if (blockDim.y > 1) group_sum(sum, y, blockDim.y, blockDim.x);
#pragma unroll
                for (int v = 0; v < vec; v++) {
                    if (y == 0 && at.ok_column) leave(view, row_program() * cols + at.column + v, sum[v]);
                }
            } else if constexpr (I::kind & ROW) {
                group_sum(sum, x, blockDim.x, 1);
#pragma unroll
                for (int u = 0; u < rows; u++) {
                    if (x == 0 && at.ok[u]) leave(view, at.row[u] * col_programs() + col_program(), sum[u]);
                }
            } else {
                group_sum(sum, y * blockDim.x + x, blockDim.x * blockDim.y, 1);
                if (x == 0 && y == 0) leave(view, row_program() * col_programs() + col_program(), sum[0]);
            }
        }
    }
};

// The same for all inputs, one after the other.
template <int vec, int rows, class R, class... Inputs> struct Fragments {
    DUALOP_FUN void load(const View*, const Place<vec, rows>&, bool) {}
    DUALOP_FUN void values(int, R (*)[vec]) const {}
};
template <int vec, int rows, class R, class First, class... Rest>
struct Fragments<vec, rows, R, First, Rest...> {
    Fragment<First, vec, rows> first;
    Fragments<vec, rows, R, Rest...> rest;
    DUALOP_FUN void load(const View* view, const Place<vec, rows>& at, bool first_tile) {
        first.load(view[0], at, first_tile);
        rest.load(view + 1, at, first_tile);
    }
    DUALOP_FUN void values(int u, R (*out)[vec]) const {
        first.values(u, out[0]);
        rest.values(u, out + 1);
    }
};

template <int vec, int rows, class R, class... Inputs> struct Gradients {
    DUALOP_FUN void add(const View*, const Place<vec, rows>&, int, index_t, const R (*)[vec]) {}
    DUALOP_FUN void finish(const View*, const Place<vec, rows>&, index_t) {}
};
template <int vec, int rows, class R, class First, class... Rest>
struct Gradients<vec, rows, R, First, Rest...> {
    Gradient<First, vec, rows, R> first;
    Gradients<vec, rows, R, Rest...> rest;
    DUALOP_FUN void add(const View* view, const Place<vec, rows>& at, int u, index_t cols, const R (*g)[vec]) {
        first.add(view[0], at, u, cols, g[0]);
        rest.add(view + 1, at, u, cols, g + 1);
    }
    DUALOP_FUN void finish(const View* view, const Place<vec, rows>& at, index_t cols) {
        first.finish(view[0], at, cols);
        rest.finish(view + 1, at, cols);
    }
};

}  // namespace dualop
