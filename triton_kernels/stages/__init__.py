"""Define every stage, a family a file.

A stage has NAME(z, parameters, BITS) -> y, NAME_backward(z, gy, parameters, BITS) -> gz and, unless it is piecewise
linear, NAME_second(z, parameters, BITS), its second derivative. Where a backward can have the value on the way cheaper,
NAME_inner gives it. An operand stage has NAME(z, b, BITS) and NAME_backward(z, b, gy, BITS) -> (gz, gb).
`cuda/stages/` has the same files with the same names in the same order with the same formulas;
`dualop/language/table.py` says what they mean in torch. Gradients at kinks are torch's. Masked gradients are selected,
not multiplied by 0, so that an infinite gy stays out.
"""

from .operands import *
from .piecewise import *
from .exponential import *
from .smooth import *
from .plain import *
