// What a compiled library exports: two launchers with C linkage, called with one block of 8-byte words.
#pragma once
#include "kernels.cuh"

#include <algorithm>

namespace dualop {

template <class P> struct Launch {
    word grid_x, grid_y, grid_z, block_x, block_y;
    void* stream;
    Arguments<typename P::F, P::inputs> arguments;

    dim3 block() const { return dim3(static_cast<unsigned>(block_x), static_cast<unsigned>(block_y)); }
    dim3 grid() const {
        return dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), static_cast<unsigned>(grid_z));
    }

    int forward() const {
        launch(forward_kernel<P>, grid(), block(), stream, arguments);
        return last_error();
    }

    int backward() const {
        launch(backward_kernel<P>, grid(), block(), stream, arguments);
        if (int error = last_error()) return error;
        word outputs = 0, terms = 0;
        for (const auto& view : arguments.in) {
            if (!view.sum) continue;
            outputs = std::max(outputs, view.kept * view.columns);
            terms = std::max(terms, view.outer * view.inner);
        }
        return outputs ? sum<P>(outputs, terms, stream, arguments) : 0;
    }
};

}  // namespace dualop

// Each returns 0 or a cudaError_t.
#define DUALOP_LIBRARY(PROBLEM)                                                                                          \
    DUALOP_EXPORT int dualop_forward(const void* words) {                                                                \
        return static_cast<const dualop::Launch<PROBLEM>*>(words)->forward();                                            \
    }                                                                                                                    \
    DUALOP_EXPORT int dualop_backward(const void* words) {                                                               \
        return static_cast<const dualop::Launch<PROBLEM>*>(words)->backward();                                           \
    }                                                                                                                    \
    DUALOP_EXPORT const char* dualop_error_text(int error) { return dualop::error_text(error); }
