// Every stage: forward(z) -> y, backward(z, gy) -> gz and, unless it is made of straight lines, second(z), its second
// derivative; an operand stage has forward(z, b) and backward(z, b, gy, gb) -> gz, which also sets gb. Where the value on
// the way in a backward can be had cheaper than by forward, or out of what the derivative needs anyhow, inner(z) gives
// it. triton_kernels/stages/ has the same files with the same names in the same order with the same formulas;
// dualop/language/table.py says what they mean in torch. `bits` is how accurate a result has to be.
//
// Gradients at kinks are torch's. Masked gradients are selected, not multiplied by 0, so that an infinite gy stays out.
#pragma once
#include "math.cuh"
#include "stages/operands.cuh"
#include "stages/piecewise.cuh"
#include "stages/exponential.cuh"
#include "stages/smooth.cuh"
#include "stages/plain.cuh"
