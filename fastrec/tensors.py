# SPDX-License-Identifier: Apache-2.0
"""What `random` and the ops ask of tensors; imports nothing of fastrec, as both stand on it."""

import torch
from torch import Tensor

INDEX = (torch.int64, torch.int32)


def has_values(tensor: Tensor) -> bool:
    """Whether the host can read the values of a tensor."""
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return False
    return type(tensor) is Tensor or not hasattr(tensor, "fake_mode")
