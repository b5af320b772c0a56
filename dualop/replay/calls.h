// The known calls of a chain as an object of Python's, and what such an object does when it is called.
#pragma once
#include "call.h"

namespace dualop {

struct CallsObject {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject* first;  // the autograd.Function's first argument
    PyObject* apply;  // that Function's
    Calls* calls;
};
extern PyTypeObject calls_type;

// The only result of forward, or the tuple that the Function's backward returns, which begins with None for the call.
inline PyObject* wrapped(const std::vector<int>& results, bool forward, Tensors& made) {
    if (forward) return THPVariable_Wrap(std::move(made[results[0]]));
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(1 + results.size()));
    if (tuple) PyTuple_SET_ITEM(tuple, 0, Py_NewRef(Py_None));
    for (size_t i = 0; tuple && i < results.size(); i++) {
        PyObject* one = results[i] < 0 ? Py_NewRef(Py_None) : THPVariable_Wrap(std::move(made[results[i]]));
        if (!one) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(1 + i), one);
    }
    return tuple;
}

// What the call gives, or None; nullptr with Python's error.
inline PyObject* replay(CallsObject* self, Wanted wanted, PyObject* const* objects, Py_ssize_t count) {
    const bool forward = wanted == FORWARD;
    Inputs inputs;
    Key key;
    if (watched() || !append_plain(objects, count, inputs) || !describe(wanted, inputs, key)) Py_RETURN_NONE;
    const auto call = self->calls->replayable(key);
    if (!call) Py_RETURN_NONE;
    if (forward && c10::GradMode::is_enabled()) {
        for (const TensorImpl* input : inputs) {
            if (!input->requires_grad()) continue;
            c10::SmallVector<PyObject*, 16> arguments = {self->first};
            arguments.append(objects, objects + count);
            return PyObject_Vectorcall(self->apply, arguments.data(), arguments.size(), nullptr);
        }
    }
    if (!call->allowed(inputs[0]->device())) Py_RETURN_NONE;
    Tensors made;
    PyThreadState* thread = PyEval_SaveThread();
    const bool well = call->run(inputs, made);
    PyEval_RestoreThread(thread);
    if (!well) Py_RETURN_NONE;
    return wrapped(call->results, forward, made);
}

}  // namespace dualop
