# SPDX-License-Identifier: Apache-2.0
"""Nested tensors of the layout torch.jagged: their values and offsets are used."""

import pytest
import torch

from fastrec import jagged_attention, jagged_max_pool

OFFSETS = torch.tensor([0, 3, 3, 10])


def nested(values: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(values, OFFSETS)


@pytest.mark.parametrize("backend", ["reference", None])
def test_attention_of_nested_tensors(backend):
    leaves = [torch.randn(10, 2, 8, requires_grad=True) for _ in range(3)]
    options = dict(max_seq_len=7, causal=True, backend=backend)
    out = jagged_attention(*map(nested, leaves), **options)
    assert out.is_nested and torch.equal(out.offsets(), OFFSETS)
    expected = jagged_attention(*leaves, OFFSETS, **options)
    assert torch.equal(out.values(), expected)
    up = torch.randn(10, 2, 8)
    found = torch.autograd.grad(out.values(), leaves, up)
    for actual, exact in zip(found, torch.autograd.grad(expected, leaves, up), strict=True):
        assert torch.equal(actual, exact)


def test_pool_of_a_nested_tensor():
    values = torch.randn(10, 5)
    assert torch.equal(jagged_max_pool(nested(values)), jagged_max_pool(values, OFFSETS))


def test_nested_tensors_that_do_not_fit():
    x = torch.randn(10, 2, 8)
    with pytest.raises(TypeError, match="query, key, value must all be nested"):
        jagged_attention(nested(x), x, nested(x), max_seq_len=7)
    with pytest.raises(ValueError, match="offsets are those of the nested tensors"):
        jagged_attention(*[nested(x)] * 3, OFFSETS, max_seq_len=7)
    other = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 4, 4, 10]))
    with pytest.raises(ValueError, match="sequences of the same lengths"):
        jagged_attention(nested(x), other, nested(x), max_seq_len=7)
    with pytest.raises(TypeError, match="offsets must be a tensor, got NoneType"):
        jagged_attention(x, x, x, max_seq_len=7)
    with pytest.raises(TypeError, match="key is a nested tensor"):
        jagged_attention(x, nested(x), x, OFFSETS, max_seq_len=7)
    whole = torch.nested.nested_tensor_from_jagged(
        torch.randn(10, 5), OFFSETS, torch.tensor([2, 0, 7])
    )
    with pytest.raises(ValueError, match="without holes"):
        jagged_max_pool(whole)
