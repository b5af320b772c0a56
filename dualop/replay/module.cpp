// The Python module: `setup`, and the type Calls, the calls of one chain on one backend that are known.
//
//     calls(x, operands)                    the result, with a node of the autograd.Function if one requires a gradient
//     calls.backward(needs, gy, *tensors)   what the Function's backward returns
//
// Both return None for a call that has to run in Python: it is not known, or something watches it, its tensors are not
// plain, or it was learned that it cannot be replayed. `calls.unknown(wanted, tensors)` says that it can be learned.
#include "operators.h"

namespace dualop {

// Reads (order, *whether each gradient is wanted), or None for FORWARD; false with Python's error.
bool read_wanted(PyObject* tuple, Wanted& wanted) {
    wanted = FORWARD;
    if (tuple == Py_None) return true;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < 1) {
        PyErr_SetString(PyExc_TypeError, "wanted is None or (order, *needs)");
        return false;
    }
    wanted = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 0));
    for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(tuple); i++) {
        wanted = and_whether(wanted, PyTuple_GET_ITEM(tuple, i) == Py_True);
    }
    return !PyErr_Occurred();
}

constexpr size_t MOST = 4096;  // calls of a chain; sizes may vary without end

// A C++ exception must not pass through Python.
template <class F> PyObject* guarded(F body) {
    try {
        return body();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

PyObject* forward(PyObject* object, PyObject* const* arguments, size_t flagged, PyObject*) {
    return guarded([&]() -> PyObject* {
        if (PyVectorcall_NARGS(flagged) != 2 || !PyTuple_CheckExact(arguments[1])) Py_RETURN_NONE;
        c10::SmallVector<PyObject*, 16> tensors = {arguments[0]};
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[1]); i++) {
            tensors.push_back(PyTuple_GET_ITEM(arguments[1], i));
        }
        return replay(reinterpret_cast<CallsObject*>(object), FORWARD, tensors.data(), tensors.size());
    });
}

PyObject* backward(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        if (count < 2 || !PyTuple_Check(arguments[0])) return PyErr_Format(PyExc_TypeError, "needs, gy, *tensors");
        if (c10::GradMode::is_enabled()) Py_RETURN_NONE;
        Wanted wanted = 1;
        for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(arguments[0]); i++) {  // behind the call, which needs no gradient
            wanted = and_whether(wanted, PyTuple_GET_ITEM(arguments[0], i) == Py_True);
        }
        return replay(reinterpret_cast<CallsObject*>(object), wanted, arguments + 1, count - 1);
    });
}

bool append_numbers(PyObject* sequence, auto& numbers) {
    PyObject* fast = PySequence_Fast(sequence, "a sequence of numbers");
    if (!fast) return false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++) {
        const long long number = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast, i));
        if (number == -1 && PyErr_Occurred()) break;
        numbers.push_back(number);
    }
    Py_DECREF(fast);
    return !PyErr_Occurred();
}

bool append_launches(PyObject* list, std::vector<Launch>& launches) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(list); i++) {
        unsigned long long function;
        PyObject *words, *slots, *sources;
        Launch launch;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(list, i), "KOOOiO", &function, &words, &slots, &sources, &launch.stream,
                              &launch.allowed) ||
            !append_numbers(words, launch.words) || !append_numbers(slots, launch.slots) ||
            !append_numbers(sources, launch.sources)) {
            return false;
        }
        launch.function = reinterpret_cast<int (*)(const void*)>(function);
        Py_INCREF(launch.allowed);
        launches.push_back(std::move(launch));
    }
    return true;
}

// learn(wanted, tensors, buffers, launches, results): a call with these tensors that wants this is made so.
PyObject* learn(PyObject* object, PyObject* arguments) {
    return guarded([&]() -> PyObject* {
        PyObject *tuple, *tensors, *buffers, *launches, *results;
        if (!PyArg_ParseTuple(arguments, "OO!O!O!O!", &tuple, &PyTuple_Type, &tensors, &PyTuple_Type, &buffers,
                              &PyTuple_Type, &launches, &PyTuple_Type, &results)) {
            return nullptr;
        }
        Wanted wanted;
        Inputs inputs;
        Key key;
        if (!read_wanted(tuple, wanted)) return nullptr;
        if (!append_plain(&PyTuple_GET_ITEM(tensors, 0), PyTuple_GET_SIZE(tensors), inputs) ||
            !describe(wanted, inputs, key)) {
            Py_RETURN_NONE;
        }
        auto call = std::make_shared<Call>();
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(buffers); i++) {
            if (!is_plain(PyTuple_GET_ITEM(buffers, i))) return PyErr_Format(PyExc_TypeError, "a buffer is no tensor");
            call->buffers.emplace_back(tensor_in(PyTuple_GET_ITEM(buffers, i)));
        }
        if (!append_launches(launches, call->launches) || !append_numbers(results, call->results)) return nullptr;
        for (int result : call->results) {
            const bool there = result < static_cast<int>(call->buffers.size());
            if (!there) return PyErr_Format(PyExc_IndexError, "no such buffer");
        }
        auto* self = reinterpret_cast<CallsObject*>(object);
        if (self->calls->size() >= MOST) self->calls->clear();
        (*self->calls)[key] = std::move(call);
        Py_RETURN_NONE;
    });
}

// unknown(wanted, tensors): whether such a call may be replayed once it was learned, and has not been yet.
PyObject* unknown(PyObject* object, PyObject* arguments) {
    return guarded([&]() -> PyObject* {
        PyObject *tuple, *tensors;
        if (!PyArg_ParseTuple(arguments, "OO!", &tuple, &PyTuple_Type, &tensors)) return nullptr;
        Wanted wanted;
        Inputs inputs;
        Key key;
        if (!read_wanted(tuple, wanted)) return nullptr;
        const bool may = !watched() &&
                         append_plain(&PyTuple_GET_ITEM(tensors, 0), PyTuple_GET_SIZE(tensors), inputs) &&
                         describe(wanted, inputs, key);
        return PyBool_FromLong(may && !reinterpret_cast<CallsObject*>(object)->calls->count(key));
    });
}

PyObject* forget(PyObject* object, PyObject*) {
    reinterpret_cast<CallsObject*>(object)->calls->clear();
    Py_RETURN_NONE;
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject *first, *apply;
    if (!PyArg_ParseTuple(arguments, "OO", &first, &apply)) return nullptr;
    auto* self = reinterpret_cast<CallsObject*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    self->call = forward;
    self->first = Py_NewRef(first);
    self->apply = Py_NewRef(apply);
    self->calls = new Calls;
    return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
    auto* self = reinterpret_cast<CallsObject*>(object);
    delete self->calls;
    Py_DECREF(self->first);
    Py_DECREF(self->apply);
    Py_TYPE(object)->tp_free(object);
}

Py_ssize_t size(PyObject* object) {
    return static_cast<Py_ssize_t>(reinterpret_cast<CallsObject*>(object)->calls->size());
}

PyMethodDef methods[] = {
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(backward)), METH_FASTCALL, nullptr},
    {"unknown", unknown, METH_VARARGS, nullptr},
    {"learn", learn, METH_VARARGS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {},
};

PyTypeObject make_type() {
    static PySequenceMethods sequence = {};
    sequence.sq_length = size;
    PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
    type.tp_name = "dualop_native.Calls";
    type.tp_basicsize = sizeof(CallsObject);
    type.tp_vectorcall_offset = offsetof(CallsObject, call);
    type.tp_call = PyVectorcall_Call;
    type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
    type.tp_methods = methods;
    type.tp_as_sequence = &sequence;
    type.tp_new = make;
    type.tp_dealloc = destroy;
    return type;
}
PyTypeObject calls_type = make_type();

// setup(tensor, tensor_class, parameter_class, plain_keys, profiling, levels, known): the ops replay what is in `known`
// from now on. ImportError where torch keeps its tensors otherwise than PythonTensor says.
PyObject* setup(PyObject*, PyObject* arguments) {
    PyObject *tensor, *keys;
    Python p = {};
    if (!PyArg_ParseTuple(arguments, "OOOOOO!O!", &tensor, &p.tensor_class, &p.parameter_class, &keys, &p.profiling,
                          &PyDict_Type, &p.levels, &PyDict_Type, &p.known)) {
        return nullptr;
    }
    PyObject* address = PyObject_GetAttrString(tensor, "_cdata");
    if (!address) return nullptr;
    const bool as_expected = PyLong_AsVoidPtr(address) == reinterpret_cast<PythonTensor*>(tensor)->tensor;
    Py_DECREF(address);
    if (!as_expected) return PyErr_Format(PyExc_ImportError, "this torch keeps a tensor at another place");
    p.level = PyUnicode_InternFromString("_current_level");
    // Threads without Python's lock read them, so they stay what they are: facts about this torch.
    if (plain_keys.empty() && !append_numbers(keys, plain_keys)) return nullptr;
    for (PyObject* kept : {p.tensor_class, p.parameter_class, p.profiling, p.levels, p.known}) {
        Py_INCREF(kept);
    }
    python = std::move(p);
    return guarded([]() -> PyObject* {
        register_kernels();
        Py_RETURN_NONE;
    });
}

PyMethodDef functions[] = {{"setup", setup, METH_VARARGS, nullptr}, {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "dualop_native", nullptr, -1, functions};

}  // namespace dualop

PyMODINIT_FUNC PyInit_dualop_native() {
    if (PyType_Ready(&dualop::calls_type) < 0) return nullptr;
    PyObject* module = PyModule_Create(&dualop::definition);
    if (module && PyModule_AddObjectRef(module, "Calls", reinterpret_cast<PyObject*>(&dualop::calls_type)) < 0) {
        Py_CLEAR(module);
    }
    PyObject* launcher = PyLong_FromVoidPtr(reinterpret_cast<void*>(dualop::launch_triton));
    if (module && PyModule_AddObjectRef(module, "triton_launcher", launcher) < 0) Py_CLEAR(module);
    Py_XDECREF(launcher);
    return module;
}
