# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops of the encoder: what does not fit, and what may be left out. Single wrong
arguments are those of test_wrong_arguments.py."""

import pytest
import torch
from backends import backends

from fastrec import (
    bias_gelu_dropout,
    dropout_add_layer_norm,
    gelu_ffn,
    jagged_embedding,
    linear,
)
from fastrec.ops.linear import SMALL
from fastrec.random import Rng

T, D, V = 5, 4, 7


def index(rows=T, fill=0):
    return torch.full((rows,), fill)


DROPS = dict(dropout_p=0.5, rng=Rng(0, 0), keys=index(), positions=index())
RIGHT = {
    bias_gelu_dropout: dict(input=torch.zeros(T, D), bias=torch.zeros(D), **DROPS),
    dropout_add_layer_norm: dict(
        input=torch.zeros(T, D), residual=None, weight=None, bias=None, **DROPS
    ),
    jagged_embedding: dict(
        values=index(), weight=torch.zeros(V, D), position_weight=torch.zeros(3, D),
        norm_weight=torch.zeros(D), norm_bias=torch.zeros(D), **DROPS,
    ),
}  # fmt: skip
WRONG = [
    (jagged_embedding, dict(positions=None), "position_weight needs positions"),
    (jagged_embedding, dict(norm_weight=None), "norm_bias needs norm_weight"),
    *((op, change, message) for op in RIGHT for change, message in (
        (dict(dropout_p=1.0), "leaves nothing to keep"),
        (dict(rng=None), "needs rng and keys"),
        (dict(keys=None), "needs rng and keys"),
        (dict(positions=None), "needs positions"),
        (dict(positions=index(fill=65536)), r"positions must be in \[0, 65536\), got 65536"),
    ) if not (op is jagged_embedding and "positions" in change)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "message"), WRONG)
def test_what_is_missing_is_named(op, change, message):
    op(**RIGHT[op])
    with pytest.raises(ValueError, match=message):
        op(**(RIGHT[op] | change))


@pytest.mark.parametrize(("seed", "step"), [(2**63, 0), (0, -(2**63) - 1)])
def test_seed_and_step_are_int64(seed, step):
    with pytest.raises(ValueError, match=r"must be in \[-2\^63, 2\^63\)"):
        Rng(seed, step)
    with pytest.raises(TypeError, match="seed as a tensor must be one int64 or int32"):
        Rng(torch.tensor(0.5), 0)


@backends("linear", "reference", "cpp")
def test_linear_of_leading_dimensions(backend):
    x, w, b = torch.randn(2, 3, D), torch.randn(6, D, requires_grad=True), torch.randn(6)
    output = linear(x, w, b, backend=backend)
    torch.testing.assert_close(output, torch.nn.functional.linear(x, w, b))
    assert linear(x[0, 0], w, backend=backend).shape == (6,)
    output.sum().backward()
    torch.testing.assert_close(w.grad, x.sum((0, 1)).expand(6, D))


@backends("gelu_ffn", "reference", "cpp")
@pytest.mark.parametrize("left", ["bias_in", "bias_out"])
def test_biases_of_gelu_ffn_are_optional(backend, left):
    g = torch.Generator().manual_seed(0)
    sizes = dict(input=(T, D), weight_in=(6, D), bias_in=(6,), weight_out=(3, 6), bias_out=(3,))
    case = {k: torch.randn(v, generator=g, requires_grad=True) for k, v in sizes.items()}
    zero = case | {left: torch.zeros_like(case[left])}
    outputs = [gelu_ffn(**arguments, backend=backend) for arguments in (case | {left: None}, zero)]
    others = [tensor for name, tensor in case.items() if name != left]
    grads = [torch.autograd.grad(output.square().sum(), others) for output in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)
    low = {k: v.bfloat16() for k, v in case.items() if k != left} | {left: None}
    assert gelu_ffn(**low).dtype == torch.bfloat16


@backends("linear", "cpp")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_of_small_matrices_is_float32_that_is_rounded(backend, low):
    """PyTorch prepares a product of 16-bit types anew for every number of rows."""
    g = torch.Generator().manual_seed(0)
    x, w_in, w_out = (torch.randn(*s, generator=g) for s in ((9, 8), (16, 8), (5, 16)))
    b_in, b_out = torch.randn(16, generator=g), torch.randn(5, generator=g)
    for input in (x, x.to(low)):
        leaf = input.clone().requires_grad_()
        expected = linear(input.float(), w_in, b_in).to(low)
        with torch.autocast("cpu", low):
            assert torch.equal(linear(leaf, w_in, b_in), expected)
            ffn = gelu_ffn(leaf, w_in, b_in, w_out, b_out)
        assert torch.equal(ffn, gelu_ffn(input.float(), w_in, b_in, w_out, b_out).to(low))
        ffn.sum().backward()
        assert leaf.grad.dtype == input.dtype
    wide = torch.randn(SMALL // 8 + 1, 8, generator=g)
    with torch.autocast("cpu", low):
        assert torch.equal(linear(x, wide), torch.nn.functional.linear(x, wide))
        assert linear(x.double(), w_in.double()).dtype == torch.float64
