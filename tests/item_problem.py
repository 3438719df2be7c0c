# SPDX-License-Identifier: Apache-2.0
"""What the tests of linear_cross_entropy share."""

import torch
from backends import backends

OP = "linear_cross_entropy"
NAMES = ("input", "linear_weight", "linear_bias")
every_backend = backends(OP, "reference", "cpp")
cpp = backends(OP, "cpp")


def problem(n=4, v=5, d=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(n + v + d)
    return {
        "input": torch.randn(n, d, generator=g).to(dtype),
        "linear_weight": torch.randn(v, d, generator=g).to(dtype),
        "target": torch.randint(v, (n,), generator=g),
    }
