# SPDX-License-Identifier: Apache-2.0
"""One case of an operator against the float64 reference, within its error budget (`op_db.case`)."""

import dataclasses
import functools

import pytest
import torch
from op_db import OPS
from op_db.case import TYPES, excess, promote, run

from fastrec.backend import unavailable_reason

FLOAT32 = TYPES[0]


def small(backend, device):
    return backend == "triton" and device == "cpu"


def sample_names(op, types=FLOAT32):
    return list(samples(op.name, "cpu", types, True))


@functools.cache
def samples(op_name, device, types, interpret_small):
    op = next(op for op in OPS if op.name == op_name)
    return {sample.name: sample for sample in op.samples(device, types, interpret_small)}


def get(op, name, backend, device, types):
    return samples(op.name, device, types, small(backend, device))[name]


@functools.cache
def expected(op_name, name, device, types, interpret_small):
    """(float64 reference, reference in the tested type) of a sample, computed once."""
    op = next(op for op in OPS if op.name == op_name)
    sample = samples(op_name, device, types, interpret_small)[name]
    exact = run(op.reference, promote(sample), op.differentiable)
    return exact, run(op.reference, sample, op.differentiable)


def need(op, backend, device):
    if why := unavailable_reason(backend, op.name, torch.device(device)):
        pytest.skip(why)


def on(op, backend):
    return lambda **kwargs: op.function(**kwargs, backend=backend)


def assert_within_budget(sample, actual, exact, low, extra=0.0):
    assert actual.keys() == exact.keys()
    wrong = []
    for name, value in actual.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == low[name].dtype, f"{name}: {value.dtype}, expected {low[name].dtype}"
        floor = sample.floor.get(name, 0.0)
        error, budget = excess(value, low[name], exact[name], floor)
        if extra:
            budget += extra * max(exact[name].abs().max().item(), floor) if value.numel() else 0.0
        if not error <= budget:
            wrong.append(f"{name}: error {error:.3g}, budget {budget:.3g}")
    assert not wrong, "; ".join(wrong)


def check(op, name, backend, device, types, replace=None):
    """Output and gradients of `backend` within the budget. `replace` maps tensor arguments to
    tensors of the same values in other memory. Arguments are left as they were."""
    need(op, backend, device)
    exact, low = expected(op.name, name, device, types, small(backend, device))
    sample = given = get(op, name, backend, device, types)
    tensors = {k: v for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)}
    if replace is not None:
        moved = {key: replace(value) for key, value in tensors.items()}
        given = dataclasses.replace(sample, kwargs=sample.kwargs | moved)
    before = {key: value.clone() for key, value in tensors.items()}
    # The kernels of cpp share the work of a call. The reference has one thread, here and as what is
    # expected: the rounding of its products depends on their number, and two workers of pytest with
    # two threads each spend most of the time waiting for each other.
    torch.set_num_threads(2 if backend == "cpp" else 1)
    actual = run(on(op, backend), given, op.differentiable)
    torch.set_num_threads(1)
    assert_within_budget(sample, actual, exact, low, op.rounding_band(backend, sample))
    for key, value in before.items():
        now = given.kwargs[key]
        assert ((now == value) | (now.isnan() & value.isnan())).all(), f"{key} was written"
