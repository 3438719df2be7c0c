# SPDX-License-Identifier: Apache-2.0
"""Generated: every operator of op_db x backend x argument x change that it must refuse by name, or
take and compute what the reference computes. A crash ends the worker."""

import pytest
from op_check import need
from op_db import OPS
from wrong_arguments import changes, covering, verdict


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "op, sample",
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in covering(op)],
)
def test_wrong_arguments_are_named(op, backend, sample):
    need(op, backend, "cpu")
    bad = [
        f"{change.argument} {change.what}: {wrong}"
        for change in changes(sample)
        if (wrong := verdict(op, backend, sample, change))
    ]
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad[:30])
