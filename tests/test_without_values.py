# SPDX-License-Identifier: Apache-2.0
"""Generated: every operator of op_db on tensors without values (meta, FakeTensor), forward and
backward: shapes and dtypes are those of the call with values."""

import dataclasses

import pytest
import torch
from op_check import need, on
from op_db import OPS
from op_db.case import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from wrong_arguments import covering

from fastrec.ops.common.arguments import check_range
from fastrec.random import Rng

each_sample = pytest.mark.parametrize(
    "op, sample",
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in covering(op)],
)


def shown(results, device="cpu"):
    return {
        name: (value.shape, value.dtype, torch.device(device)) for name, value in results.items()
    }


def moved(sample, move):
    """`move` of every tensor of the sample, those in an Rng included."""
    kwargs = tree_map_only(torch.Tensor, move, sample.kwargs)
    if isinstance(rng := kwargs.get("rng"), Rng):
        words = (move(w) if isinstance(w, torch.Tensor) else w for w in (rng.seed, rng.step))
        kwargs["rng"] = Rng(*words)
    return dataclasses.replace(sample, kwargs=kwargs)


@each_sample
def test_meta(op, sample):
    with_values = run(on(op, None), sample, op.differentiable)
    without = run(on(op, None), moved(sample, lambda t: t.to("meta")), op.differentiable)
    assert {k: (v.shape, v.dtype, v.device) for k, v in without.items()} == shown(
        with_values, "meta"
    )


@each_sample
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_fake(op, sample, backend):
    need(op, backend, "cpu")
    if backend not in op.compiles:
        pytest.skip(f"{op.name} on {backend} depends on values on the host")
    expected = shown(run(on(op, backend), sample, op.differentiable))
    with FakeTensorMode() as mode:
        fake = moved(sample, mode.from_tensor)
        results = run(on(op, backend), fake, op.differentiable)
    assert {k: (v.shape, v.dtype, v.device) for k, v in results.items()} == expected


def test_vmap_checks_the_values_of_all_calls():
    index = torch.tensor([[0, 2], [1, 7]])

    def check(row):
        check_range("row", row, 3)
        return row

    with pytest.raises(IndexError, match=r"row\[1, 1\] is 7, expected a value in \[0, 3\)"):
        torch.func.vmap(check)(index)
    torch.func.vmap(check)(index.clamp_max(2))
