// The ops dualop::forward and dualop::backward replay, in compiled graphs and where they are called by their own names.
//
// The ops' kernels in Python stay registered. Those below stand before them, at keys of their own:
//
//     AutogradCPU, AutogradCUDA   before Python's kernel at Autograd: leaves autograd where nobody differentiates
//     BackendSelect               replays; it is the last key that a call passes before its device's
//
// At BackendSelect the dispatcher has served every mode, transform, tracer and subclass, so that none can observe the
// call any more, and the profiler has the op's row.
#pragma once
#include "calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <chrono>
#include <thread>

namespace dualop {

using c10::DispatchKey, c10::DispatchKeySet, c10::OperatorHandle, c10::Stack;

// Where the arguments of an op stand, as in dualop/op/definition.py; the wanted gradients and the order come last.
struct Forward {
    static constexpr const char* NAME = "dualop::forward";
    static constexpr size_t COUNT = 4, OPERANDS = 1;
};
struct Backward {
    static constexpr const char* NAME = "dualop::backward";
    static constexpr size_t COUNT = 7, OPERANDS = 2;
};

template <class Op, class F> void each_tensor(c10::ArrayRef<c10::IValue> arguments, F body) {
    for (size_t i = 0; i < Op::OPERANDS; i++) body(arguments[i].toTensor());
    for (const c10::IValue& operand : arguments[Op::OPERANDS].toListRef()) body(operand.toTensor());
}

// False for a call that is wrong: its kernel in Python says why.
template <class Op> bool read_wanted(c10::ArrayRef<c10::IValue> arguments, const Inputs& inputs, Wanted& wanted) {
    wanted = FORWARD;
    if constexpr (std::is_same_v<Op, Forward>) return true;
    const auto needs = arguments[Op::COUNT - 2].toListRef();
    wanted = arguments[Op::COUNT - 1].toInt();
    if (needs.size() + 1 != inputs.size() || needs.size() > MOST_INPUTS || (wanted != 1 && wanted != 2)) return false;
    for (const c10::IValue& need : needs) wanted = and_whether(wanted, need.toBool());
    return true;
}

// The calls of the chain and the backend that an op was given, or null; the caller has Python's lock.
template <class Op> CallsObject* calls_for(c10::ArrayRef<c10::IValue> arguments) {
    const auto &chain = arguments[Op::OPERANDS + 1].toStringRef(), &backend = arguments[Op::OPERANDS + 2].toStringRef();
    PyObject* names = Py_BuildValue("s#s#", chain.data(), static_cast<Py_ssize_t>(chain.size()), backend.data(),
                                    static_cast<Py_ssize_t>(backend.size()));
    PyObject* calls = names ? PyDict_GetItemWithError(python.known, names) : nullptr;  // borrowed
    Py_XDECREF(names);
    if (!calls) PyErr_Clear();
    return calls && Py_TYPE(calls) == &calls_type ? reinterpret_cast<CallsObject*>(calls) : nullptr;
}

// The call that may be replayed now; null: Python has to make it.
template <class Op> std::shared_ptr<const Call> known(c10::ArrayRef<c10::IValue> arguments, const Inputs& inputs) {
    Wanted wanted;
    Key key;
    if (!read_wanted<Op>(arguments, inputs, wanted) || !describe(wanted, inputs, key)) return nullptr;
    const Lock lock;
    CallsObject* calls = calls_for<Op>(arguments);
    const auto call = calls ? calls->calls->replayable(key) : nullptr;
    return call && call->allowed(inputs[0]->device()) ? call : nullptr;
}

// Replaces the arguments by what the call gives; false where Python has to make it.
template <class Op> bool replayed(Stack& stack) {
    const auto arguments = torch::jit::last(stack, Op::COUNT);
    Inputs inputs;
    bool plain = true;
    each_tensor<Op>(arguments, [&](const at::Tensor& tensor) {
        inputs.push_back(tensor.unsafeGetTensorImpl());
        plain = plain && is_plain(*inputs.back());
    });
    if (!plain) return false;
    const auto call = known<Op>(arguments, inputs);
    Tensors made;
    if (!call || !call->run(inputs, made)) return false;
    torch::jit::drop(stack, Op::COUNT);
    if constexpr (std::is_same_v<Op, Forward>) {
        stack.emplace_back(std::move(made[call->results[0]]));
    } else {
        c10::List<at::Tensor> gradients;
        for (int result : call->results) {
            if (result >= 0) gradients.push_back(std::move(made[result]));
        }
        stack.emplace_back(std::move(gradients));
    }
    return true;
}

template <class Op> void on_device(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    constexpr DispatchKeySet below(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
    if (!replayed<Op>(*stack)) op.redispatchBoxed(keys & below, stack);
}

// Whether a transform of torch.func, a dual number or a graph of autograd's needs the op's derivative.
template <class Op> bool differentiated(c10::ArrayRef<c10::IValue> arguments) {
    constexpr DispatchKeySet transforms(
        {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchDynamicLayerBackMode});
    if (c10::impl::tls_local_dispatch_key_set().included_.has_any(transforms)) return true;
    const bool graph = c10::GradMode::is_enabled();
    bool any = false;
    each_tensor<Op>(arguments, [&](const at::Tensor& tensor) {
        any = any || (graph && tensor.requires_grad()) || tensor._fw_grad(0).defined();
    });
    return any;
}

// Tensors as objects of Python's, whose lock the thread has. An error is left where one could not be made.
struct Objects : c10::SmallVector<PyObject*, 8> {
    Objects() = default;
    Objects(const Objects&) = delete;
    ~Objects() {
        for (PyObject* object : *this) Py_XDECREF(object);
    }
};

// Replaces forward's arguments by its result with a node of autograd's, as the short way makes it; false where Python's
// kernel has to. That kernel also meets an error that comes up here, and reports it.
inline bool with_node(Stack& stack) {
    const auto arguments = torch::jit::last(stack, Forward::COUNT);
    const Lock lock;
    CallsObject* calls = calls_for<Forward>(arguments);
    if (!calls) return false;
    Objects objects;
    each_tensor<Forward>(arguments, [&](const at::Tensor& tensor) {
        objects.push_back(THPVariable_Wrap(at::TensorBase(tensor)));
    });
    const bool whole = !PyErr_Occurred();
    PyObject* y = whole ? replay(calls, FORWARD, objects.data(), static_cast<Py_ssize_t>(objects.size())) : nullptr;
    if (!y) {
        if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) PyErr_SetInterrupt();
        PyErr_Clear();
        return false;
    }
    const bool made = y != Py_None;
    if (made) {
        torch::jit::drop(stack, Forward::COUNT);
        auto* result = const_cast<TensorImpl*>(&tensor_in(y));
        stack.emplace_back(at::Tensor(c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(result)));
    }
    Py_DECREF(y);
    return made;
}

template <class Op> void with_autograd(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    if (!differentiated<Op>(torch::jit::last(*stack, Op::COUNT))) {
        op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    } else if (!std::is_same_v<Op, Forward> || !with_node(*stack)) {
        op.callBoxedForDispatchKey(DispatchKey::Autograd, *stack);
    }
}

template <c10::BoxedKernel::BoxedKernelFunction_withDispatchKeys* kernel>
void register_kernel(const char* name, DispatchKey key) {
    auto function = c10::KernelFunction::makeFromBoxedFunction<kernel>();
    auto& dispatcher = c10::Dispatcher::singleton();
    new auto(dispatcher.registerImpl({name, ""}, key, std::move(function), std::nullopt, nullptr, "dualop/replay"));
}

// Registers the kernels for the rest of the process; the caller has Python's lock.
inline void register_kernels() {
    static bool done = false;
    if (done) return;
    done = true;
    // torch changes its table of kernels without a lock. A thread that looks into it while this happens began to before
    // Python's lock was taken here, and waits for that lock as soon as it is in a kernel in Python.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    register_kernel<on_device<Forward>>(Forward::NAME, DispatchKey::BackendSelect);
    register_kernel<on_device<Backward>>(Backward::NAME, DispatchKey::BackendSelect);
    for (const DispatchKey key : {DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA}) {
        register_kernel<with_autograd<Forward>>(Forward::NAME, key);
        register_kernel<with_autograd<Backward>>(Backward::NAME, key);
    }
}

}  // namespace dualop
