"""Families of operators whose results the analysis knows something of, by name."""

from __future__ import annotations

from hatify.analysis.origins import CASTS, MOVES
from hatify.gates.rules.contractions import SPELLED
from hatify.gates.rules.elementwise import ADDITIVE, PARTIAL, PRODUCT, QUOTIENT, UNARY
from hatify.gates.rules.reductions import ALONG, POOLS, REDUCE

SWITCHES = {"_set_grad_enabled", "is_grad_enabled", "enter_autocast", "exit_autocast"}
"""Calls that open, close or ask for a region of the user's forward."""
FRESH = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
         "randn_like", "randint_like", "new_empty_strided"}  # fmt: skip
"""Operators that read the shape and type of an operand, not its values."""
SIZES = {"sym_size", "sym_numel", "sym_stride", "sym_storage_offset"}
"""Operators that ask for sizes, which no value changes."""
ZEROS = {"zeros", "new_zeros", "zeros_like"}
"""Operators that give zeros."""
FINITE = {*MOVES, *CASTS, *FRESH, "add", "sub", "mul", "sigmoid", "tanh", "relu", "gelu", "silu", "linear", "matmul", "mean", "softmax",
          "layer_norm", "zeros", "ones", "arange", "linspace", "sin", "cos", "neg", "abs", "upsample_bilinear2d", "upsample_bicubic2d",
          "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "bernoulli", "rand", "randn", "div"}  # fmt: skip
"""Operators that make no infinities out of finite constants."""
KEEPING_REPEATS = {*MOVES, *CASTS, *UNARY, *PARTIAL, *PRODUCT, *QUOTIENT, *ADDITIVE, *REDUCE, *ALONG, *POOLS, *SPELLED,
                   "pow", "masked_fill", "dropout"} - {"linear"}  # fmt: skip
"""Operators whose rules say the same of gates that repeat along an open size (the heads of each sample) at every size."""
