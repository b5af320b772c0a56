// Python's tensors seen from C++, without torch's own header for that, which takes 16 s to compile.
#pragma once
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

// What `setup` was given.
struct Python {
    PyObject *tensor_class, *parameter_class;
    PyObject* profiling;       // () -> bool
    PyObject* levels;          // the globals of torch.autograd.forward_ad
    PyObject* level;           // "_current_level", of dual numbers
    std::vector<uint64_t> plain_keys;  // the key sets of strided tensors in memory
};
inline Python python;

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

// Whether it is a plain strided tensor in memory, and no subclass.
inline bool is_plain(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != python.tensor_class && type != python.parameter_class) return false;
    const uint64_t keys = tensor_in(object).key_set().raw_repr();
    for (uint64_t plain : python.plain_keys) {
        if (keys == plain) return true;
    }
    return false;
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// All that a launch depends on, but for addresses: numbers that are equal if and only if calls are made alike.
using Key = c10::SmallVector<int64_t, 64>;

inline void describe(const TensorImpl& tensor, Key& key) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t type = static_cast<int64_t>(c10::typeMetaToScalarType(tensor.dtype()));
    key.push_back(type | static_cast<int64_t>(is_aligned(tensor.data())) << 8 | static_cast<int64_t>(sizes.size()) << 9);
    key.append(sizes.begin(), sizes.end());
    key.append(strides.begin(), strides.end());
}

// `lead`, and the tensors, of which the first says the device; false where they are not plain or not on one device.
inline bool describe(int64_t lead, PyObject* const* objects, Py_ssize_t count, Key& key) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!is_plain(objects[i])) return false;
    }
    const c10::Device device = tensor_in(objects[0]).device();
    key.push_back(lead << 16 | static_cast<int64_t>(device.type()) << 8 | static_cast<uint8_t>(device.index()));
    for (Py_ssize_t i = 0; i < count; i++) {
        if (tensor_in(objects[i]).device() != device) return false;
        describe(tensor_in(objects[i]), key);
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
