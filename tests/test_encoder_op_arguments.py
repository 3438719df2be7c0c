"""What the ops of the encoder say to wrong arguments. jagged_attention and jagged_max_pool have
tables of their own."""

import pytest
import torch

from fastrec import (
    bias_gelu_dropout,
    dropout_add_layer_norm,
    gelu_ffn,
    jagged_embedding,
    linear,
)
from fastrec.random import Rng

T, D, V = 5, 4, 7


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def index(rows=T, fill=0):
    return torch.full((rows,), fill)


DROPS = dict(dropout_p=0.5, rng=Rng(0, 0), keys=index(), positions=index())
RIGHT = {
    linear: dict(input=zeros(T, D), weight=zeros(3, D), bias=zeros(3)),
    gelu_ffn: dict(
        input=zeros(T, D), weight_in=zeros(6, D), bias_in=zeros(6), weight_out=zeros(3, 6),
        bias_out=zeros(3),
    ),
    bias_gelu_dropout: dict(input=zeros(T, D), bias=zeros(D), site="ffn_inner", **DROPS),
    dropout_add_layer_norm: dict(
        input=zeros(T, D), residual=zeros(T, D), weight=zeros(D), bias=zeros(D), **DROPS
    ),
    jagged_embedding: dict(
        values=index(), weight=zeros(V, D), position_weight=zeros(3, D), norm_weight=zeros(D),
        norm_bias=zeros(D), **DROPS,
    ),
}  # fmt: skip
DROPPING = (bias_gelu_dropout, dropout_add_layer_norm, jagged_embedding)

WRONG = [
    (linear, dict(input=zeros(T, 3)), ValueError, r"input and weight must be \[T, K\] and"),
    (linear, dict(bias=zeros(4)), ValueError, r"bias must be \[3\], got \[4\]"),
    (linear, dict(bias=zeros(3).double()), TypeError, "tensors of one dtype, got torch.float32, "),
    (gelu_ffn, dict(weight_in=zeros(D)), ValueError, r"must be \[T, D\], \[F, D\], .* \[4\]"),
    (gelu_ffn, dict(input=zeros(D)), ValueError, r"must be \[T, D\]"),
    (gelu_ffn, dict(bias_out=zeros(2)), ValueError, r"must be .* \[2\]"),
    (bias_gelu_dropout, dict(input=index()), ValueError, r"floating point \[T, D\]"),
    (bias_gelu_dropout, dict(bias=zeros(3)), ValueError, r"bias must be \[4\]"),
    (bias_gelu_dropout, dict(bias=zeros(D).double()), TypeError, "must both be float64"),
    (dropout_add_layer_norm, dict(input=zeros(D)), ValueError, r"floating point \[T, D\]"),
    (dropout_add_layer_norm, dict(residual=zeros(4, D)), ValueError, r"residual must be \[5, 4\]"),
    (dropout_add_layer_norm, dict(weight=zeros(3)), ValueError, r"weight must be \[4\]"),
    (dropout_add_layer_norm, dict(bias=zeros(D).double()), TypeError, "float64 together"),
    (jagged_embedding, dict(weight=zeros(V)), ValueError, r"weight must be floating .* \[V, D\]"),
    (jagged_embedding, dict(values=zeros(T)), ValueError, r"values must be int64 \[5\]"),
    (jagged_embedding, dict(positions=None), ValueError, "position_weight needs positions"),
    (jagged_embedding, dict(position_weight=zeros(3, 2)), ValueError, r"must be \[P, 4\]"),
    (jagged_embedding, dict(norm_weight=None), ValueError, "norm_bias needs norm_weight"),
    (jagged_embedding, dict(norm_weight=zeros(3)), ValueError, r"norm_weight must be \[4\]"),
    (jagged_embedding, dict(norm_bias=zeros(D).double()), TypeError, "both be float64"),
    (jagged_embedding, dict(values=index(fill=V)), IndexError, r"values\[0\] is 7"),
    (jagged_embedding, dict(positions=index(fill=3)), IndexError, r"positions\[0\] is 3"),
    *((op, change, ValueError, message) for op in DROPPING for change, message in (
        (dict(dropout_p=1.0), "leaves nothing to keep"),
        (dict(dropout_p=-0.1), "probability must be in"),
        (dict(rng=None), "needs rng and keys"),
        (dict(keys=None), "needs rng and keys"),
        (dict(keys=index(4)), r"keys must be int64 \[5\]"),
        (dict(positions=None), "needs positions"),
        (dict(positions=index(4)), r"positions must be int64 \[5\]"),
        (dict(layer=256), r"layer must be in \[0, 256\), got 256"),
        (dict(site="ffn"), "site must be one of .*'ffn_inner'.*, got 'ffn'"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(op, change, error, message):
    op(**RIGHT[op])
    with pytest.raises(error, match=message):
        op(**(RIGHT[op] | change))
