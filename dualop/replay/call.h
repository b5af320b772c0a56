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

// The current stream's handle as a number; 0 on the CPU.
inline int64_t stream_of(c10::Device device) {
    if (device.is_cpu()) return 0;
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    return reinterpret_cast<int64_t>(stream.native_handle());
}

inline bool is_current(c10::Device device) {
    return device.is_cpu() || c10::impl::VirtualGuardImpl(device.type()).getDevice() == device;
}

// Nothing to launch: a call that is known to go another way. `results` are places among the buffers: of the result, or of
// the gradients of x and the operands, -1 for one that nobody wants.
struct Call {
    std::vector<Buffer> buffers;
    std::vector<Launch> launches;
    std::vector<int> results;

    Call() = default;
    Call(const Call&) = delete;
    ~Call() {
        const Lock lock;
        for (const Launch& launch : launches) Py_DECREF(launch.allowed);
    }

    // Whether it may be made now: on its device, and with everybody's leave.
    bool allowed(c10::Device device) const {
        if (!is_current(device)) return false;
        for (const Launch& launch : launches) {
            if (launch.allowed != Py_None && !is(Py_True, PyObject_CallNoArgs(launch.allowed))) return false;
        }
        return true;
    }

    // Allocates and launches; false, with nothing to show, where anything failed. It needs no lock of Python's.
    bool run(const Inputs& inputs, Tensors& made) const noexcept {
        try {
            const c10::Device device = inputs[0]->device();
            c10::SmallVector<int64_t, 32> addresses;
            for (const TensorImpl* input : inputs) addresses.push_back(reinterpret_cast<int64_t>(input->data()));
            for (const Buffer& buffer : buffers) {
                made.push_back(buffer.allocate(device));
                void* address = made.back().unsafeGetTensorImpl()->mutable_data();
                if (!is_aligned(address)) return false;
                addresses.push_back(reinterpret_cast<int64_t>(address));
            }
            const int64_t stream = stream_of(device);
            c10::SmallVector<int64_t, 192> words;
            for (const Launch& launch : launches) {
                words.assign(launch.words.begin(), launch.words.end());
                for (size_t i = 0; i < launch.slots.size(); i++) words[launch.slots[i]] = addresses[launch.sources[i]];
                words[launch.stream] = stream;
                if (launch.function(words.data()) != 0) return false;
            }
            return true;
        } catch (...) {
            return false;
        }
    }
};

// The calls of one chain on one backend that are known. Python's lock guards them.
struct Calls : std::unordered_map<Key, std::shared_ptr<const Call>, Hash> {
    // The call, unless it has to go another way. Others may forget it while the caller runs it.
    std::shared_ptr<const Call> replayable(const Key& key) const {
        const auto found = find(key);
        return found == end() || found->second->launches.empty() ? nullptr : found->second;
    }
};

}  // namespace dualop
