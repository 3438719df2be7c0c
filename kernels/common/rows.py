# SPDX-License-Identifier: Apache-2.0
"""What launchers do before and after a kernel: layouts of arguments, ranges of rows."""

import math

import torch.nn.functional as F
import triton

WIDEST = 2048  # a program holds a row
MOST_PARTIALS = 1024


def rows_of(matrix):
    """The matrix with adjacent columns; its rows may lie anywhere."""
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()


def in_vectors(*sizes: int) -> tuple[int, list[int]]:
    """(numbers of a vector, the sizes in vectors), of a width and of strides: a kernel multiplies
    them again.

    Triton itself finds out about multiples of 16 alone, and of other widths every load and store
    would be of a single number: sm_90, bfloat16, D = 50: `dropout_add_layer_norm` makes 107
    instructions of an element in place of 39, and `jagged_attention` 48 of a score in place of 24,
    with 232 bytes of spills. In vectors of two it is 64, and 35 without spills.
    """
    vector = math.gcd(*sizes)
    vector = 1 if vector % 16 == 0 else math.gcd(vector, 8)
    return vector, [size // vector for size in sizes]


def pad_columns(*matrices):
    """The matrices [?, D] with columns of zeros up to a multiple of 16.

    Of another width every number is loaded by itself and none ahead of its use: for sm_90, bfloat16
    and D = 50 that is 1.2 to 1.9 times the instructions of a logit, and some tiles of D = 256
    spill. A copy of the operands is a few per cent of what many products take.
    """
    wanted = (-matrix.shape[1] % 16 for matrix in matrices)
    return tuple(
        F.pad(matrix, (0, more)) if more else matrix
        for matrix, more in zip(matrices, wanted, strict=True)
    )


def cut_columns(matrix, width: int):
    """The first columns, packed as a traced program expects it."""
    return matrix if matrix.shape[1] == width else matrix[:, :width].contiguous()


def strides_of(input, linear_weight, linear_bias) -> tuple[int, ...]:
    """Those of rows, of the table that scores them and of its bias, 0 without one."""
    bias = 0 if linear_bias is None else linear_bias.stride(0)
    return (*input.stride(), *linear_weight.stride(), bias)


def dense(*tensors):
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def row_ranges(rows: int, block_n: int) -> tuple[int, int]:
    """(programs, row blocks of each) of a kernel whose programs leave a partial sum each.

    They are added in order: no atomics, and the ranges depend on the shape only.
    """
    blocks = triton.cdiv(rows, block_n)
    per_program = max(triton.cdiv(blocks, MOST_PARTIALS), 1)
    return triton.cdiv(blocks, per_program), per_program
