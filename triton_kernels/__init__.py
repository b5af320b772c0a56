"""The Triton kernels: the same stages, formulas and order as the CUDA C++ ones."""
