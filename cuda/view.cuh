// Inputs and their gradients as a thread sees them: `rows` rows, blockDim.y apart, of `vec` neighbouring columns.
//
// At row r and column c an input's element is
//     data[sum of row_strides[d] * (coordinate d of r) + sum of col_strides[d] * (coordinate d of c)]
// where the coordinates are those of r within the rows' sizes and of c within the columns' (dualop/launch/layout.py makes
// them). What varies along neither is loaded once, what varies along the columns only is shared by the thread's rows.
#pragma once
#include "chain.cuh"

namespace dualop {

constexpr int COLUMN = 1, ROW = 2, SHARED = 4, FULL = COLUMN | ROW;  // along what an input varies
// How a thread's columns are read: each; one for all; in an access of 16 bytes; where that is not aligned, out of two.
enum { EACH, ONE, WIDE, NEAR };
constexpr int THREADS = 256;  // of a block at most; always a power of two

using word = long long;  // Python packs all arguments as 8-byte words

// index_t, the type of rows, columns and offsets, is declared above these headers: int where all offsets fit in it.

template <class T, int kind_, int access_> struct Input {
    using type = T;
    static constexpr int kind = kind_, access = access_;
};

// How many dimensions the rows and the columns have, and whether the last access to the result is not a whole one.
template <int rows_, int cols_, bool ragged_> struct Form {
    static constexpr int rows = rows_, cols = cols_;
    static constexpr bool ragged = ragged_;
};

// A size to divide by, with the multiplier and the shift that do so for numbers below 2^31 (`divisor` in
// dualop/launch/layout.py).
struct Divisor {
    word size, multiplier, shift;
};
DUALOP_FUN int quotient(int n, const Divisor& by) {
    return static_cast<int>(__umulhi(static_cast<unsigned>(n), static_cast<unsigned>(by.multiplier)) >>
                            static_cast<unsigned>(by.shift));
}
DUALOP_FUN long long quotient(long long n, const Divisor& by) { return n / by.size; }

// The coordinates of a row or of a column.
template <int n> struct Coordinates {
    index_t at[n];
    DUALOP_FUN void set(index_t i, const Divisor (&sizes)[n]) {
#pragma unroll
        for (int d = n - 1; d > 0; d--) {
            const index_t q = quotient(i, sizes[d]);
            at[d] = i - q * static_cast<index_t>(sizes[d].size);
            i = q;
        }
        at[0] = i;
    }
    DUALOP_FUN index_t dot(const word (&strides)[n]) const {
        index_t sum = 0;
#pragma unroll
        for (int d = 0; d < n; d++) sum += at[d] * static_cast<index_t>(strides[d]);
        return sum;
    }
};

// One input in a launch's arguments.
template <class F> struct View {
    const void* data;
    void* gradient;                    // of this input, or its partial sums, or null where nobody wants it
    void* sum;                         // where the partial sums' sum goes; null where there are none
    word outer, kept, inner, columns;  // the partial sums' shape; summed over outer and inner
    word segment;                      // so many neighbouring columns share a sum; 0: each has its own
    word row_strides[F::rows], col_strides[F::cols];
};

// Which program this is, of how many.
DUALOP_FUN index_t row_program() { return static_cast<index_t>(blockIdx.z * gridDim.y + blockIdx.y); }
DUALOP_FUN index_t col_program() { return static_cast<index_t>(blockIdx.x); }
DUALOP_FUN index_t col_programs() { return static_cast<index_t>(gridDim.x); }

// A thread's place: its rows, its first column, and where they exist.
template <class F, int vec, int rows> struct Place {
    index_t row[rows], column, cols, total;
    bool ok[rows], ok_column;
    Coordinates<F::rows> in_rows[rows];
    Coordinates<F::cols> in_cols[vec];

    template <class Arguments> DUALOP_FUN Place(index_t first_row, index_t first_column, const Arguments& a) {
        cols = static_cast<index_t>(a.cols), total = static_cast<index_t>(a.total);
        column = first_column + static_cast<index_t>(threadIdx.x * vec);
        ok_column = column < cols;
#pragma unroll
        for (int v = 0; v < vec; v++) in_cols[v].set(column + v, a.col_sizes);
#pragma unroll
        for (int u = 0; u < rows; u++) {
            row[u] = first_row + static_cast<index_t>(threadIdx.y + u * blockDim.y);
            // The last row may be short. Of a row beyond it, 32 bits may not hold where it would start.
            ok[u] = ok_column && row[u] < static_cast<index_t>(a.rows) && start(u) < total;
            in_rows[u].set(row[u], a.row_sizes);
        }
    }
    // Where its elements of row u are in the result.
    DUALOP_FUN index_t start(int u) const { return row[u] * cols + column; }
    // How many elements there are from its first one of row u on, how many columns; as many as it has where all accesses
    // are whole.
    DUALOP_FUN index_t left(int u) const { return F::ragged ? total - start(u) : vec; }
    DUALOP_FUN index_t left_columns() const { return F::ragged ? cols - column : vec; }
    // Whether its element v is in the result, if its first one is.
    DUALOP_FUN bool has(int u, int v) const { return !F::ragged || start(u) + v < total; }
    DUALOP_FUN bool has_column(int v) const { return !F::ragged || column + v < cols; }
};

// Neighbouring elements, of which the first `count` exist: one by one, or in wide accesses where all do.
template <class T, int vec> DUALOP_FUN void read_each(Pack<T, vec>& pack, const T* from, index_t count) {
    Pack<T, 1> one[vec] = {};
#pragma unroll
    for (int v = 0; v < vec; v++) {
        if (v < count) one[v].load(from + v);
    }
#pragma unroll
    for (int v = 0; v < vec; v++) pack.set(v, one[v]);
}
template <class T, int vec> DUALOP_FUN void read_pack(Pack<T, vec>& pack, const T* from, index_t count) {
    if (count >= vec) pack.load(from);
    else read_each(pack, from, count);
}
// Where they are not aligned; `count` as far as they are neighbours, so that a second access reads nothing else.
template <class T, int vec> DUALOP_FUN void read_near(Pack<T, vec>& pack, const T* from, index_t count) {
    if constexpr (Pack<T, vec>::bytes == 16) {
        if (count >= 2 * vec) {
            pack.part[0] = load_unaligned_raw(from);
            return;
        }
    }
    read_each(pack, from, count);
}
template <class T, int vec, class At> DUALOP_FUN void write_pack(const Pack<T, vec>& pack, T* to, const At& at, int u) {
    if (at.has(u, vec - 1)) return pack.store(to);
#pragma unroll
    for (int v = 0; v < vec; v++) {
        if (at.has(u, v)) pack.get(v).store(to + v);
    }
}

// The values of one input at a place, still packed as in memory.
template <class I, class F, int vec, int rows> struct Fragment {
    using T = typename I::type;
    static constexpr bool by_row = I::kind & ROW, by_column = I::kind & COLUMN;
    static constexpr int width = I::access == ONE ? 1 : vec;
    Pack<T, width> pack[by_row ? rows : 1];

    // What does not vary along the rows is loaded only if `first`: if the columns are not those of the tile before.
    template <class At> DUALOP_FUN void load(const View<F>& view, const At& at, bool first) {
        const T* data = static_cast<const T*>(view.data);
        if constexpr (by_row) {
#pragma unroll
            for (int u = 0; u < rows; u++) {
                if (at.ok[u]) load_row(view, data + at.in_rows[u].dot(view.row_strides), at, u);
            }
        } else if (first && (!by_column || at.ok_column)) {
            load_row(view, data, at, 0);
        }
    }

    template <class At> DUALOP_FUN void load_row(const View<F>& view, const T* row, const At& at, int u) {
        if constexpr (I::access == WIDE) {
            read_pack(pack[by_row ? u : 0], row + at.column, by_row ? at.left(u) : at.left_columns());
        } else if constexpr (I::access == NEAR) {
            const index_t in_row = at.cols - at.column, left = F::ragged && by_row ? at.left(u) : in_row;
            read_near(pack[by_row ? u : 0], row + at.column, left < in_row ? left : in_row);
        } else if constexpr (I::access == ONE) {
            pack[by_row ? u : 0].load(row + (by_column ? at.in_cols[0].dot(view.col_strides) : 0));
        } else {
            Pack<T, 1> one[vec];
#pragma unroll
            for (int v = 0; v < vec; v++) {
                if (by_row ? at.has(u, v) : at.has_column(v)) one[v].load(row + at.in_cols[v].dot(view.col_strides));
                else one[v] = {};
            }
#pragma unroll
            for (int v = 0; v < vec; v++) pack[by_row ? u : 0].set(v, one[v]);
        }
    }

    template <class R> DUALOP_FUN void values(int u, R (&out)[vec]) const {
        if constexpr (I::access == ONE) {
            R one[1];
            pack[by_row ? u : 0].unpack(one);
#pragma unroll
            for (int v = 0; v < vec; v++) out[v] = one[0];
        } else {
            pack[by_row ? u : 0].unpack(out);
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
template <class I, class F, int vec, int rows, class R> struct Gradient {
    static constexpr bool whole = (I::kind & FULL) == FULL;
    static constexpr int count = whole ? 1 : I::kind == COLUMN ? vec : I::kind & ROW ? rows : 1;
    R sum[count] = {};

    // Of row u, which exists.
    template <class At> DUALOP_FUN void add(const View<F>& view, const At& at, int u, const R (&g)[vec]) {
        if constexpr (whole) {
            if (view.gradient == nullptr) return;
            if constexpr (I::kind & SHARED) put(static_cast<R*>(view.gradient), at, u, g);
            else put(static_cast<typename I::type*>(view.gradient), at, u, g);
        } else {
#pragma unroll
            for (int v = 0; v < vec; v++) {
                if (at.has(u, v)) sum[I::kind == COLUMN ? v : I::kind & ROW ? u : 0] += g[v];
            }
        }
    }

    template <class T, class At> DUALOP_FUN static void put(T* to, const At& at, int u, const R (&g)[vec]) {
        Pack<T, vec> pack;
        pack.pack(g);
        write_pack(pack, to + at.start(u), at, u);
    }

    DUALOP_FUN static void leave(const View<F>& view, index_t offset, R total) {
        if (view.sum != nullptr) {
            static_cast<R*>(view.gradient)[offset] = total;
        } else {
            const R one[1] = {total};
            Pack<typename I::type, 1> pack;
            pack.pack(one);
            pack.store(static_cast<typename I::type*>(view.gradient) + offset);
        }
    }

    // The block's sums of columns, of which `segment` have one sum, as [row program, segment, slot]: a segment has a slot
    // for each program that may have a part of it, and who has its end fills the rest with zeros.
    template <class At> DUALOP_FUN static void leave_segments(const View<F>& view, const At& at, const R (&sum)[vec]) {
        __shared__ R line[THREADS * vec];
        const index_t segment = static_cast<index_t>(view.segment), slots = static_cast<index_t>(view.inner);
        const index_t width = static_cast<index_t>(blockDim.x * vec), first = col_program() * width;
        const index_t end = first + width < at.cols ? first + width : at.cols;
        const int me = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x), lane = me % 32;
        __syncthreads();  // the line may still be read by a sum before this one
        if (threadIdx.y == 0) {
#pragma unroll
            for (int v = 0; v < vec; v++) line[threadIdx.x * vec + v] = sum[v];
        }
        __syncthreads();
        const int warps = static_cast<int>(blockDim.x * blockDim.y / 32);
        for (index_t which = first / segment + me / 32; which * segment < end; which += warps) {
            const index_t begin = which * segment, past = begin + segment;
            R part = 0;
            for (index_t c = (begin > first ? begin : first) + lane; c < (past < end ? past : end); c += 32) {
                part += line[c - first];
            }
#pragma unroll
            for (int half = 16; half > 0; half /= 2) part += __shfl_down_sync(~0u, part, half);
            if (lane != 0) continue;
            const index_t segments = at.cols / segment, place = (row_program() * segments + which) * slots;
            const index_t slot = col_program() - begin / width;
            leave(view, place + slot, part);
            for (index_t empty = slot + 1; past <= end && empty < slots; empty++) leave(view, place + empty, R(0));
        }
    }

    template <class At> DUALOP_FUN void finish(const View<F>& view, const At& at) {
        if constexpr (!whole) {
            if (view.gradient == nullptr) return;
            const int x = threadIdx.x, y = threadIdx.y;
            if constexpr (I::kind == COLUMN) {
                if (blockDim.y > 1) group_sum(sum, y, blockDim.y, blockDim.x);
                if constexpr (F::cols > 1) {
                    if (view.segment != 0) return leave_segments(view, at, sum);
                }
#pragma unroll
                for (int v = 0; v < vec; v++) {
                    if (y == 0 && at.ok_column && at.has_column(v)) {
                        leave(view, row_program() * at.cols + at.column + v, sum[v]);
                    }
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
template <class F, int vec, int rows, class R, class... Inputs> struct Fragments {
    template <class At> DUALOP_FUN void load(const View<F>*, const At&, bool) {}
    DUALOP_FUN void values(int, R (*)[vec]) const {}
};
template <class F, int vec, int rows, class R, class First, class... Rest>
struct Fragments<F, vec, rows, R, First, Rest...> {
    Fragment<First, F, vec, rows> first;
    Fragments<F, vec, rows, R, Rest...> rest;
    template <class At> DUALOP_FUN void load(const View<F>* view, const At& at, bool first_tile) {
        first.load(view[0], at, first_tile);
        rest.load(view + 1, at, first_tile);
    }
    DUALOP_FUN void values(int u, R (*out)[vec]) const {
        first.values(u, out[0]);
        rest.values(u, out + 1);
    }
};

template <class F, int vec, int rows, class R, class... Inputs> struct Gradients {
    template <class At> DUALOP_FUN void add(const View<F>*, const At&, int, const R (*)[vec]) {}
    template <class At> DUALOP_FUN void finish(const View<F>*, const At&) {}
};
template <class F, int vec, int rows, class R, class First, class... Rest>
struct Gradients<F, vec, rows, R, First, Rest...> {
    Gradient<First, F, vec, rows, R> first;
    Gradients<F, vec, rows, R, Rest...> rest;
    template <class At> DUALOP_FUN void add(const View<F>* view, const At& at, int u, const R (*g)[vec]) {
        first.add(view[0], at, u, g[0]);
        rest.add(view + 1, at, u, g + 1);
    }
    template <class At> DUALOP_FUN void finish(const View<F>* view, const At& at) {
        first.finish(view[0], at);
        rest.finish(view + 1, at);
    }
};

}  // namespace dualop
