# SPDX-License-Identifier: Apache-2.0
"""What the tests of in_batch_cross_entropy share."""

import torch
from backends import backends
from op_db.in_batch_cross_entropy import by_tensors

from fastrec import in_batch_cross_entropy

OP = "in_batch_cross_entropy"
NAMES = ("query", "candidate", "weight", "candidate_bias", "temperature")
every_backend = backends(OP, "reference", "cpp")
cpp = backends(OP, "cpp")


def on(backend):
    return by_tensors(lambda **kwargs: in_batch_cross_entropy(**kwargs, backend=backend))


def problem(b=4, c=5, d=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(b + c + d)
    return {
        "query": torch.randn(b, d, generator=g).to(dtype),
        "candidate": torch.randn(c, d, generator=g).to(dtype),
    }
