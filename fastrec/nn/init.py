# SPDX-License-Identifier: Apache-2.0
"""How weights start."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def init_bert(module: M) -> M:
    """The module itself, of a linear layer or a table with weights N(0, 0.02) and a bias of zeros
    (Devlin et al., 2019)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
