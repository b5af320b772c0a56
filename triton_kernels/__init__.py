"""Run chains in Triton, with the stages, formulas and order of the CUDA C++ kernels."""
