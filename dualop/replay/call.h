// A call as data: memory to be had, words to be filled with addresses, functions to be called with the words.
#pragma once
#include "tensors.h"
#include "triton.h"

#include <memory>
#include <unordered_map>

namespace dualop {

// A tensor to be allocated: the result, a gradient, partial sums.
struct Buffer {
    c10::SmallVector<c10::SymInt, 6> sizes, strides;
    c10::ScalarType dtype;

    explicit Buffer(const TensorImpl& like) : dtype(c10::typeMetaToScalarType(like.dtype())) {
        for (int64_t n : like.sizes()) sizes.emplace_back(n);
        for (int64_t n : like.strides()) strides.emplace_back(n);
    }
    at::Tensor allocate(c10::Device device) const {
        // Straight to the device's own: what is plain and unwatched passes nothing else on the way there.
        const auto key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
        return at::_ops::empty_strided::redispatch(c10::DispatchKeySet(key), sizes, strides, dtype, c10::kStrided,
                                                   device, false);
    }
};

// `slots` are the places of addresses among the words, `sources` whose: the call's tensors, then its buffers.
struct Launch {
    int (*function)(const void* words);
    std::vector<int64_t> words;
    std::vector<int> slots, sources;
    int stream;         // the place of the stream
    PyObject* allowed;  // () -> bool: whether it may be made, and what it needs kept alive; None
};

using Tensors = c10::SmallVector<at::Tensor, 8>;

// Nothing to launch: a call that is known to go another way. `results` are places among the buffers, -1: None.
struct Call {
    std::vector<Buffer> buffers;
    std::vector<Launch> launches;
    std::vector<int> results;

    Call() = default;
    Call(const Call&) = delete;
    ~Call() {
        for (const Launch& launch : launches) Py_DECREF(launch.allowed);
    }

    bool allowed() const {
        for (const Launch& launch : launches) {
            if (launch.allowed != Py_None && !is(Py_True, PyObject_CallNoArgs(launch.allowed))) return false;
        }
        return true;
    }

    // Allocates and launches, without Python's lock; false, with nothing to show, where anything failed.
    bool run(PyObject* const* objects, Py_ssize_t count, int64_t stream, Tensors& made) const noexcept {
        const c10::Device device = tensor_in(objects[0]).device();
        c10::SmallVector<int64_t, 32> addresses;
        for (Py_ssize_t i = 0; i < count; i++) {
            addresses.push_back(reinterpret_cast<int64_t>(tensor_in(objects[i]).data()));
        }
        bool well = true;
        PyThreadState* thread = PyEval_SaveThread();
        try {
            for (const Buffer& buffer : buffers) {
                made.push_back(buffer.allocate(device));
                void* address = made.back().unsafeGetTensorImpl()->mutable_data();
                well = well && is_aligned(address);
                addresses.push_back(reinterpret_cast<int64_t>(address));
            }
            c10::SmallVector<int64_t, 192> words;
            for (const Launch& launch : launches) {
                words.assign(launch.words.begin(), launch.words.end());
                for (size_t i = 0; i < launch.slots.size(); i++) words[launch.slots[i]] = addresses[launch.sources[i]];
                words[launch.stream] = stream;
                well = well && launch.function(words.data()) == 0;
            }
        } catch (...) {
            well = false;
        }
        PyEval_RestoreThread(thread);
        return well;
    }
};

using Calls = std::unordered_map<Key, std::shared_ptr<const Call>, Hash>;

}  // namespace dualop
