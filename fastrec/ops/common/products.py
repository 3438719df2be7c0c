# SPDX-License-Identifier: Apache-2.0
"""Products of a matrix and a vector with bits that do not depend on the number of threads.

PyTorch leaves them to a library that splits rows among threads where it likes: on a processor with
AMX, MKL's have other bits with two threads than with one.
"""

import torch
from torch import Tensor

from fastrec.backend import unavailable_reason


def _ours(matrix: Tensor) -> bool:
    return matrix.is_cpu and unavailable_reason("cpp", "linear", matrix.device) is None


def weighted_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """[D]: sum_n weight_n rows_n of weight [N] and rows [N, D], float32 or float64 alike."""
    if not _ours(rows):
        return weight @ rows
    rows = rows.contiguous()
    unused = rows.new_empty(1, rows.shape[1])  # the weight of a layer whose gradient this is
    upstream = weight.contiguous().unsqueeze(1)
    return torch.ops.fastrec.linear_bwd(upstream, rows, unused, False, True, False)[1][0]


def products(rows: Tensor, vector: Tensor) -> Tensor:
    """[N]: rows_n . vector of rows [N, D] and vector [D], float32 or float64 alike."""
    if not _ours(rows):
        return rows @ vector
    one = vector.contiguous().unsqueeze(0)
    return torch.ops.fastrec.linear_fwd(rows.contiguous(), one, None).squeeze(1)
