// Launches a kernel that Triton compiled, as Triton's own launcher does.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace dualop {

// As in cuda.h, which a machine with Triton and without CUDA's toolkit lacks.
struct LaunchAttribute {
    int id;
    int unused;
    union {
        int early;
        char size[64];
    };
};
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned count;
};

// `early`: the kernel begins while the one before it still runs. Parameters are words: of a shorter one, the low bytes.
struct TritonLaunch {
    int64_t stream, function, grid[3], threads, shared, early, count, parameters[];
};

// 0, or a CUresult.
inline int launch_triton(const void* words) {
    using Launcher = int (*)(const LaunchConfig*, void*, void**, void**);
    static void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
    static const auto launcher = driver ? reinterpret_cast<Launcher>(dlsym(driver, "cuLaunchKernelEx")) : nullptr;
    if (!launcher) return -1;
    const auto& launch = *static_cast<const TritonLaunch*>(words);
    LaunchAttribute early = {PROGRAMMATIC_STREAM_SERIALIZATION, 0, {1}};
    LaunchConfig config = {};
    for (int i = 0; i < 3; i++) config.grid[i] = static_cast<unsigned>(launch.grid[i]);
    config.block[0] = static_cast<unsigned>(launch.threads);
    config.block[1] = config.block[2] = 1;
    config.shared = static_cast<unsigned>(launch.shared);
    config.stream = reinterpret_cast<void*>(launch.stream);
    config.attributes = &early;
    config.count = launch.early ? 1 : 0;
    void* parameters[128];
    if (launch.count > 128) return -1;
    for (int64_t i = 0; i < launch.count; i++) parameters[i] = const_cast<int64_t*>(&launch.parameters[i]);
    return launcher(&config, reinterpret_cast<void*>(launch.function), parameters, nullptr);
}

}  // namespace dualop
