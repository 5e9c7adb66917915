"""bf16 in Triton's interpreter as a GPU has it. Import after `kernels`, use as a fixture.

The interpreter truncates where a GPU rounds to nearest, and multiplies matrices of bf16 bits as if
they were integers.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from kernels import IS_INTERPRETED


@pytest.fixture(autouse=True)
def true_bf16(monkeypatch):
    if not IS_INTERPRETED:
        return
    builder = interpreter.InterpreterBuilder
    convert, create_dot = interpreter._convert_float, builder.create_dot

    def convert_rounding(data, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(data, from_dtype, to_dtype, rounding_mode)
        values = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16)

    def create_dot_of_floats(self, a, b, d, *options):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, d, *options)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)
    monkeypatch.setattr(builder, "create_dot", create_dot_of_floats)
