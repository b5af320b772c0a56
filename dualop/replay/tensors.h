// A call's tensors, and Python's, without torch's own header for these, which takes 16 s to compile.
#pragma once
#define PY_SSIZE_T_CLEAN  // lengths of text are Py_ssize_t
#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided_ops.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <vector>

// Of libtorch_python: a Python tensor that owns `tensor`.
PyObject* THPVariable_Wrap(at::TensorBase&& tensor);

namespace dualop {

using c10::TensorImpl;

// The beginning of a Python tensor; `setup` in module.cpp makes sure that it is so.
struct PythonTensor {
    PyObject_HEAD
    TensorImpl* tensor;
};

inline const TensorImpl& tensor_in(PyObject* object) { return *reinterpret_cast<PythonTensor*>(object)->tensor; }

// What `setup` was given, the last time. Python's lock guards it.
struct Python {
    PyObject *tensor_class, *parameter_class;
    PyObject* profiling;       // () -> bool
    PyObject* levels;          // the globals of torch.autograd.forward_ad
    PyObject* level;           // "_current_level", of dual numbers
    PyObject* known;           // the dict of all Calls, by a chain's text and the name of a backend
};
inline Python python;
inline std::vector<uint64_t> plain_keys;  // the key sets of strided tensors in memory

// Python's lock, also in a thread that has it already, or that Python has never seen.
class Lock {
    const PyGILState_STATE state = PyGILState_Ensure();

  public:
    Lock() = default;
    Lock(const Lock&) = delete;
    ~Lock() { PyGILState_Release(state); }
};

// Takes an answer of Python's; an error is another answer than either, and is cleared.
inline bool is(PyObject* expected, PyObject* answer) {
    if (!answer) PyErr_Clear();
    Py_XDECREF(answer);
    return answer == expected;
}

// Whether something in this thread may want to see a call: a mode, a transform, a tracer, dual numbers, the profiler.
// All but the last two put keys into the thread's set, or a mode onto a stack.
inline bool watched() {
    const auto usual = c10::default_included_set;
    if (!(c10::impl::tls_local_dispatch_key_set().included_ - usual).empty()) return true;
    if (at::impl::torch_function_mode_enabled()) return true;
    PyObject* level = PyDict_GetItem(python.levels, python.level);  // borrowed
    if (!level || PyLong_AsLong(level) >= 0) return true;
    return !is(Py_False, PyObject_CallNoArgs(python.profiling));
}

// Whether it is a plain strided tensor in memory. A subclass that only Python knows of is one, too.
inline bool is_plain(const TensorImpl& tensor) {
    const uint64_t keys = tensor.key_set().raw_repr();
    for (uint64_t plain : plain_keys) {
        if (keys == plain) return true;
    }
    return false;
}

// The same of a Python object, which is no subclass.
inline bool is_plain(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return (type == python.tensor_class || type == python.parameter_class) && is_plain(tensor_in(object));
}

// The tensors of a call, which others hold: backward gy, then x and the operands.
using Inputs = c10::SmallVector<const TensorImpl*, 8>;

// Takes Python's tensors; false where one is not plain.
inline bool append_plain(PyObject* const* objects, Py_ssize_t count, Inputs& inputs) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!is_plain(objects[i])) return false;
        inputs.push_back(&tensor_in(objects[i]));
    }
    return true;
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// What a call computes: FORWARD, or the order of the derivative and, a bit each, which gradients are wanted.
using Wanted = int64_t;
constexpr Wanted FORWARD = 0;
constexpr size_t MOST_INPUTS = 32;  // so that the bits have room

inline Wanted and_whether(Wanted wanted, bool need) { return wanted << 1 | static_cast<Wanted>(need); }

// All that a launch depends on, but for addresses: numbers that are equal if and only if calls are made alike.
using Key = c10::SmallVector<int64_t, 64>;

inline void describe(const TensorImpl& tensor, Key& key) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t type = static_cast<int64_t>(c10::typeMetaToScalarType(tensor.dtype()));
    const int64_t aligned = is_aligned(tensor.data());
    key.push_back(type | aligned << 8 | static_cast<int64_t>(sizes.size()) << 9);
    key.append(sizes.begin(), sizes.end());
    key.append(strides.begin(), strides.end());
}

// The key of plain tensors; false where they are not on one device, or too many.
inline bool describe(Wanted wanted, const Inputs& inputs, Key& key) {
    if (inputs.empty() || inputs.size() > MOST_INPUTS) return false;
    const c10::Device device = inputs[0]->device();
    key.push_back(wanted << 16 | static_cast<int64_t>(device.type()) << 8 | static_cast<uint8_t>(device.index()));
    for (const TensorImpl* tensor : inputs) {
        if (tensor->device() != device) return false;
        describe(*tensor, key);
    }
    return true;
}

struct Hash {
    size_t operator()(const Key& key) const {
        uint64_t hash = key.size();
        for (int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
        return hash;
    }
};

}  // namespace dualop
