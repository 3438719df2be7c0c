# SPDX-License-Identifier: Apache-2.0
"""What a host tensor in the wrong place would break on a GPU, seen without one: launchers and
references run on meta tensors, and kernel launches are checked and counted instead of made.

PyTorch refuses to mix host and meta tensors as it refuses to mix host and CUDA tensors.
"""

import dataclasses
import functools
import importlib.util

import pytest
import torch
from op_db import OPS
from op_db.case import TYPES, run

from fastrec.ops.common.dropout import mask_of_rows
from fastrec.random import Rng, draws, keep_mask

pytest.importorskip("triton")
WRITTEN = [t for t in TYPES if t.name in ("float32", "bfloat16", "bfloat16_input_float32_table")]
PREFIX = "fastrec.kernels."
# On a GPU `linear` is PyTorch's own, and `gelu_ffn` is made of other ops.
WITH_KERNELS = [op for op in OPS if importlib.util.find_spec(PREFIX + op.name)]


def on_meta(value):
    if isinstance(value, tuple):
        return tuple(map(on_meta, value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def cases():
    return [
        pytest.param(op, sample, backend, id=f"{op.name}-{backend}-{types}-{sample.name}")
        for op in OPS
        for types in WRITTEN
        if types in op.types
        for sample in op.samples("cpu", types, True)
        # A sparse gradient has as many rows as the data says: meta tensors cannot.
        if not sample.kwargs.get("sparse_grad")
        for backend in ("triton", "reference")
        if backend == "reference" or op in WITH_KERNELS
        # The reference of attention reads the lengths on the host.
        if backend == "triton" or (op.name != "jagged_attention" and types == TYPES[0])
    ]


@pytest.mark.parametrize("op, sample, backend", cases())
def test_everything_stays_on_the_device(op, sample, backend, launches):
    # An Rng stays as it is: seed and step may be numbers or host tensors.
    moved = {name: on_meta(value) for name, value in sample.kwargs.items()}
    function = functools.partial(op.function, backend=backend)
    results = run(function, dataclasses.replace(sample, kwargs=moved), op.differentiable)
    assert all(value.device.type == "meta" for value in results.values())
    assert backend == "triton" or not launches


def test_the_recorder_refuses_a_host_tensor(launches):
    from fastrec.kernels import bias_gelu_dropout as kernels

    with pytest.raises(AssertionError, match="host tensor"):
        kernels.bias_gelu_dropout_fwd(torch.ones(3, 4), None, None, None, None, 0, 0, 0)
    assert not launches


@pytest.mark.parametrize("seed", [5, -5, torch.tensor(5)])
def test_draws_from_host_words(seed):
    ids = torch.arange(3, device="meta")
    assert draws(Rng(seed, 7), ids[:, None], 0, ids, site="mask_item").device.type == "meta"
    mask, _ = keep_mask(Rng(seed, 7), 0.5, ids, ids, 20, site="embedding")
    assert mask.device.type == "meta" and mask.shape == (3, 20)
    dropout = mask_of_rows(Rng(seed, 7), 0.5, ids, ids, 3, ids.device, site="embedding", layer=0)
    assert dropout.rng.device.type == "meta"
