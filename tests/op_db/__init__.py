# SPDX-License-Identifier: Apache-2.0
"""The table of operators that tests/test_ops.py runs: one module per operator, one line each here.

`case.py` says what a sample is; a new case of an operator is one `yield` in its module.
"""

from op_db import (
    bias_gelu_dropout,
    dropout_add_layer_norm,
    gelu_ffn,
    in_batch_cross_entropy,
    in_batch_hardest,
    jagged_attention,
    jagged_embedding,
    jagged_gru,
    jagged_max_pool,
    linear,
    linear_cross_entropy,
    linear_rank,
    linear_topk,
    multilabel_bce,
    sampled_linear_cross_entropy,
)

OPS = [
    bias_gelu_dropout.OP,
    dropout_add_layer_norm.OP,
    gelu_ffn.OP,
    in_batch_cross_entropy.OP,
    in_batch_hardest.OP,
    jagged_attention.OP,
    jagged_embedding.OP,
    jagged_gru.OP,
    jagged_max_pool.OP,
    linear.OP,
    linear_cross_entropy.OP,
    linear_rank.OP,
    linear_topk.OP,
    multilabel_bce.OP,
    sampled_linear_cross_entropy.OP,
]
