# SPDX-License-Identifier: Apache-2.0
"""torch.ops.fastrec without the Python functions in front: what does not fit together ends in a
message, and what is empty in a result. A crash ends the worker."""

import pytest
import torch
from backends import needs

import fastrec.data.negatives
import fastrec.ops.common.distinct_rows
import fastrec.ops.common.linear_cross_entropy_update
import fastrec.ops.common.move_rows  # noqa: F401

pytestmark = needs("cpp", "linear_cross_entropy")
N, V, D = 4, 50, 8
x, w, a = torch.randn(N, D), torch.randn(V, D), torch.randn(6, 2, D)
y, none, rng = torch.tensor([1, 2, 3, 4]), torch.empty(0, dtype=torch.int64), torch.tensor([1, 2])
ends, ones = torch.tensor([0, 6]), torch.ones(N)
state = (torch.zeros(2, N), ones, ones)  # lse and what comes back
DROP = (16, 4, 0)
ASKED = (None, -100, True, True, True)
RATES = (0.1, 1e-8, 0.9, 0.99)


def low(*tensors):
    return [tensor.bfloat16() for tensor in tensors]


def attention(q=a, k=a, offsets=ends, lists=(None, None, None, 0)):
    return q, k, a, offsets, 6, False, 1.0, *lists, 1, 0


WRONG = [
    ("linear_cross_entropy_fwd", (x, torch.randn(V, 99), None, y, True), "input must have"),
    ("linear_cross_entropy_fwd", (torch.randn(9, D), w, None, y, True), "target must have"),
    ("linear_cross_entropy_fwd", (x, w, torch.randn(1), y, True), "linear_bias must have"),
    ("linear_cross_entropy_fwd", (x, w.int(), None, y, True), "the kernels read"),
    ("linear_cross_entropy_bwd", (x, w, None, y, state[0], ones[:1], ones), "grad_lse must have"),
    ("linear_cross_entropy_bwd", (x, w, None, y, ones, ones, ones), "lse must have"),
    ("linear_cross_entropy_value_and_grad", (x.double(), w, None, y, *ASKED), "expected Double"),
    ("linear_cross_entropy_value_and_grad", (*low(x, w), None, y, *ASKED), "expected Float"),
    (
        "linear_cross_entropy_update_",
        (w.clone(), None, x, y, *state, y[:1], torch.ones(2, D), *[None] * 4, 0.1, 0.1, *RATES[1:]),
        "grad_rows must have",
    ),
    ("linear_topk_fwd", (x, w, None, -1, None, None), "k must not be negative"),
    ("linear_topk_fwd", (x, w, None, 3, y[:1], y.new_tensor([0, 9, 9, 9, 9])), "offsets must rise"),
    ("linear_topk_fwd", (x, w, None, 3, y[:1], ends), "exclude_offsets must have"),
    ("linear_rank_fwd", (x, w, None, y[:2], None, None), "target must have"),
    ("in_batch_cross_entropy_fwd", (*low(x, w), None, y, *[None] * 4, True), "expected Float"),
    ("in_batch_cross_entropy_fwd", (x, w, None, y[:2], *[None] * 4, True), "positive must have"),
    ("in_batch_cross_entropy_bwd", (x, w, None, y, *[None] * 4, ones, ones, ones), "lse must have"),
    ("in_batch_hardest_bwd", (x, y[:2], 5), "index must have"),
    ("multilabel_bce_fwd", (x, w, None, y, none, torch.zeros_like(y), True), "must not be empty"),
    ("multilabel_bce_fwd", (x, w, None, y, ends[:1], y[:2], True), "label_rows must have"),
    (
        "sampled_linear_cross_entropy_fwd",
        (x, w, None, None, y.int(), y, -1.0, True, True),
        "expected Long, got Int",
    ),
    (
        "sampled_linear_cross_entropy_fwd",
        (x, w, None, None, y, y[None], -1.0, True, True),
        "negatives must have",
    ),
    ("jagged_attention_fwd", attention(offsets=none), "must not be empty"),
    ("jagged_attention_fwd", attention(offsets=ends.int()), "expected Long, got Int"),
    ("jagged_attention_fwd", attention(torch.randn(9, 2, D)), "key must have"),
    ("jagged_attention_fwd", attention(lists=(None, None, None, 9)), "dropout needs"),
    ("jagged_attention_fwd", attention(lists=(y[:1], y[:1], none, 9)), "rng must have"),
    ("jagged_max_pool_fwd", (x, ends[:1], torch.ones(1, dtype=torch.bool)), "mask must have"),
    ("jagged_max_pool_fwd", (x, ends[:1], ones), "expected Bool"),
    ("jagged_max_pool_bwd", (x[:1], torch.full((1, D), 99).int(), ends, 6), "index 99 is outside"),
    ("jagged_embedding_fwd", (y, w, w, *[None] * 2, 1e-5, *[None] * 3, 0, 2, 0), "needs positions"),
    ("jagged_embedding_fwd", (y, w, *[None] * 3, 1e-5, *[None] * 3, *DROP), "dropout needs"),
    ("jagged_embedding_scatter", (x, y, 10, torch.int64), "the kernels read and write"),
    ("bias_gelu_dropout_fwd", (x, *[None] * 4, *DROP), "dropout needs"),
    ("bias_gelu_dropout_fwd", (x, None, y[:1], y, rng, *DROP), "keys must have"),
    ("bias_gelu_dropout_fwd", (x, None, y, y, none, *DROP), "rng must have"),
    ("bias_gelu_dropout_fwd", (x, ones, *[None] * 3, 0, 4, 0), "a vector must have"),
    (
        "dropout_add_layer_norm_fwd",
        (x, w, None, None, 1e-5, *[None] * 3, 0, 3, 0),
        "residual must have",
    ),
    (
        "dropout_add_layer_norm_fwd",
        (x, x.double(), None, None, 1e-5, *[None] * 3, 0, 3, 0),
        "input must be Double where residual is",
    ),
    ("linear_fwd", (x.double(), w, None), "expected Double, got Float"),
    ("linear_fwd", (x, torch.randn(V, 99), None), "weight must have"),
    ("gelu_ffn_fwd", (x, w, torch.randn(V), w, ones), "weight_out must have"),
    (
        "jagged_gru_fwd",
        (*low(torch.randn(6, 24)), ends, *low(w[:24]), None, True),
        "expected Float",
    ),
    ("jagged_gru_fwd", (torch.randn(6, 9), ends, w[:24], None, True), "projected must have"),
    ("sum_rows", (x.half(), y, 9, 1.0), "expected Float, got Half"),
    ("move_rows_", (w.clone(), y, x[:1], None, None, *RATES), "grad must have"),
    ("move_rows_", (w.clone(), y, *low(x), None, None, *RATES), "expected Float, got BFloat16"),
    ("move_rows_", (*low(w, y, x)[:1], y, *low(x), None, None, *RATES), "expected Float"),
    ("move_rows_", (torch.randn(D, V).T, y, x, None, None, *RATES), "must be contiguous"),
    ("move_rows_", (w.clone(), y, x, ones, None, *RATES), "a number for each row"),
    ("draw_negatives", (rng[:1], y, y, 3, 28, 10, None, None), "rng must have"),
    ("draw_negatives", (rng, y, y[:1], 3, 28, 10, None, None), "positions must have"),
    ("philox_draws", (rng, y, -1, 3, 1, 0, 0), "must not be negative"),
]
EMPTY = [
    ("linear_cross_entropy_value_and_grad", (x, w[:0], None, torch.full((N,), -100), *ASKED)),
    ("linear_topk_fwd", (x, w[:0], None, 3, None, None)),
    ("linear_rank_fwd", (x[:0], w[:0], None, none, None, None)),
    ("multilabel_bce_bwd", (x, w[:0], None, none, ends * 0, torch.zeros(N).long(), ones)),
    ("draw_negatives", (rng, y, y, 0, 28, 10, None, None)),
    ("linear_topk_fwd", (x, w, None, 0, None, None)),
    ("philox_draws", (rng, y, 3, 0, 1, 0, 0)),
]


def names(calls):
    """The same in all workers: tensors have no name."""
    return [f"{number}-{op}" for number, (op, *_) in enumerate(calls)]


@pytest.mark.parametrize("op, arguments, message", WRONG, ids=names(WRONG))
def test_what_does_not_fit_is_named(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastrec, op)(*arguments)


@pytest.mark.parametrize("op, arguments", EMPTY, ids=names(EMPTY))
def test_what_is_empty_has_a_result(op, arguments):
    getattr(torch.ops.fastrec, op)(*arguments)


def test_no_item_is_the_best_of_none():
    values, indices = torch.ops.fastrec.linear_topk_fwd(x, w[:0], None, 3, None, None)
    assert (values == -torch.inf).all() and (indices == -1).all()
