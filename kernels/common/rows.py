# SPDX-License-Identifier: Apache-2.0
"""Launchers of the kernels that take whole rows: layouts of arguments, ranges of rows."""

import triton

WIDEST = 2048  # a program holds a row
MOST_PARTIALS = 1024


def rows_of(matrix):
    """The matrix with adjacent columns; its rows may lie anywhere."""
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()


def dense(*tensors):
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def row_ranges(rows: int, block_n: int) -> tuple[int, int]:
    """(programs, row blocks of each) of a kernel whose programs leave a partial sum each.

    They are added in order: no atomics, and the ranges depend on the shape only.
    """
    blocks = triton.cdiv(rows, block_n)
    per_program = max(triton.cdiv(blocks, MOST_PARTIALS), 1)
    return triton.cdiv(blocks, per_program), per_program
