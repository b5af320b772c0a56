// What lies under the kernels: a GPU, or the CPU that stands in for one.
#pragma once
#ifdef __CUDACC__
#include "device.cuh"
#else
#include "host.cuh"
#endif
