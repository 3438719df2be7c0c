# SPDX-License-Identifier: Apache-2.0
"""torch.set_default_dtype changes nothing of an op: its own numbers have a dtype."""

import pytest
import torch
from backends import interpreted
from op_check import get, need, on, samples
from op_db import OPS
from op_db.case import TYPES, gradients, outputs_of
from wrong_arguments import covering

from fastrec.backend import BACKENDS

FLOAT32, _, _, FLOAT16, _ = TYPES
CASES = [
    pytest.param(
        op,
        backend,
        types,
        sample.name,
        id=f"{op.name}-{backend}-{types}-{sample.name}",
        marks=interpreted(backend),
    )
    for op in OPS
    for backend in BACKENDS
    for types in (FLOAT32, FLOAT16)
    if types in op.types and (backend, types.name) not in op.refuses
    for sample in covering(op)
    if sample.name in samples(op.name, "cpu", types, True)
]


@pytest.fixture(params=[torch.float16, torch.float64], ids=str)
def other_dtype(request):
    def use():
        torch.set_default_dtype(request.param)

    yield use
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("op, backend, types, name", CASES)
def test_ops(op, backend, types, name, other_dtype):
    """Small gradients: those of float16 are scaled inside."""
    need(op, backend, "cpu")
    sample = get(op, name, backend, "cpu", types)

    def results():
        kwargs, leaves = dict(sample.kwargs), {}
        for argument in op.differentiable:
            if kwargs.get(argument) is not None:
                leaves[argument] = kwargs[argument].clone().requires_grad_()
        outputs = outputs_of(on(op, backend), kwargs | leaves)
        return {**outputs, **gradients(outputs, leaves, 1e-4)}

    expected = results()
    other_dtype()
    for key, value in results().items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key
