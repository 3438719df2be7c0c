# SPDX-License-Identifier: Apache-2.0
"""torch.compile(dynamic=True) makes one graph for every number of rows, events, lists and items: a
size that goes into the text of an assertion, or into an argument that is a number, would make
another graph for each."""

import pytest
import torch
from op_db import OPS

import fastrec
from fastrec.random import Rng


def offsets_of(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def lists(count, each, below):
    """`count` rising lists of `each` values below `below`."""
    return torch.arange(each).mul(below // each).repeat(count), offsets_of(*[each] * count)


def numbers(*shape):
    return torch.randn(shape)


def ids(count, below):
    return torch.randint(below, (count,))


RNG, KEYS = Rng(1, 2), torch.arange(100)
# name: (function, n -> its arguments of another size).
CASES = {
    "linear_cross_entropy": (
        fastrec.linear_cross_entropy, lambda n: (numbers(n, 8), numbers(3 * n, 8), ids(n, 3 * n)),
    ),
    "linear_cross_entropy of rows": (
        lambda x, w, t, rows: fastrec.linear_cross_entropy(x, w, t, rows=rows),
        lambda n: (numbers(2 * n, 8), numbers(50, 8), ids(n, 50), ids(n, 2 * n)),
    ),
    "linear_cross_entropy of classes": (
        lambda x, w, t, c, b: fastrec.linear_cross_entropy(
            x, w, t, weight=c, linear_bias=b, label_smoothing=0.1, reduction="sum"
        ),
        lambda n: (numbers(n, 8), numbers(n + 9, 8), ids(n, n + 9), numbers(n + 9).exp(),
                   numbers(n + 9)),
    ),
    "sampled_linear_cross_entropy own": (
        fastrec.sampled_linear_cross_entropy,
        lambda n: (numbers(n, 8), numbers(4 * n, 8), ids(n, 4 * n), ids(3 * n, 4 * n).view(n, 3)),
    ),
    "sampled_linear_cross_entropy shared, of rows": (
        lambda x, w, t, s, rows: fastrec.sampled_linear_cross_entropy(x, w, t, s, rows=rows),
        lambda n: (numbers(2 * n, 8), numbers(50, 8), ids(n, 50), ids(n + 5, 50), ids(n, 2 * n)),
    ),
    "in_batch_cross_entropy": (
        fastrec.in_batch_cross_entropy, lambda n: (numbers(n, 8), numbers(n + 7, 8)),
    ),
    "in_batch_cross_entropy with positives and exclusions": (
        lambda q, c, p, v, o: fastrec.in_batch_cross_entropy(
            q, c, similarity="weighted_l2", positive=p, exclude=(v, o)
        ),
        lambda n: (numbers(n, 8), numbers(2 * n, 8), ids(n, 2 * n), *lists(n, 3, 2 * n)),
    ),
    "in_batch_cross_entropy symmetric with groups": (
        lambda q, c, p, g, h: fastrec.in_batch_cross_entropy(
            q, c, positive=p, query_group=g, candidate_group=h, symmetric=True
        ),
        lambda n: (numbers(n, 8), numbers(2 * n, 8), torch.randperm(2 * n)[:n], ids(n, 4),
                   ids(2 * n, 4)),
    ),
    "in_batch_hardest": (
        lambda q, c, v, o: fastrec.in_batch_hardest(q, c, exclude=(v, o)),
        lambda n: (numbers(n, 8), numbers(2 * n, 8), *lists(n, 3, 2 * n)),
    ),
    "multilabel_bce": (
        fastrec.multilabel_bce, lambda n: (numbers(n, 8), numbers(n + 9, 8), *lists(n, 4, n + 9)),
    ),
    "multilabel_bce of rows": (
        lambda x, w, v, o, rows: fastrec.multilabel_bce(x, w, v, o, label_rows=rows),
        lambda n: (numbers(2 * n, 8), numbers(40, 8), *lists(n, 4, 40), ids(2 * n, n)),
    ),
    "linear_rank": (
        lambda x, w, t, v, o: fastrec.linear_rank(x, w, t, exclude=(v, o)),
        lambda n: (numbers(n, 8), numbers(3 * n, 8), ids(n, 3 * n), *lists(n, 3, 3 * n)),
    ),
    "linear_topk": (
        lambda x, w, v, o: fastrec.linear_topk(x, w, 3, exclude=(v, o)),
        lambda n: (numbers(n, 8), numbers(3 * n, 8), *lists(n, 3, 3 * n)),
    ),
    "jagged_attention": (
        lambda q, o, keys, longest: fastrec.jagged_attention(
            q, q, q, o, max_seq_len=longest, dropout_p=0.5, rng=RNG, keys=keys
        ),
        lambda n: (numbers(3 * n, 2, 8), offsets_of(*[n, n, n]), KEYS[:3], n),
    ),
    "jagged_attention of more sequences": (
        lambda q, o: fastrec.jagged_attention(q, q, q, o, max_seq_len=40, causal=True),
        lambda n: (numbers(3 * n, 2, 8), offsets_of(*[3] * n)),
    ),
    "jagged_gru": (
        fastrec.jagged_gru,
        lambda n: (numbers(2 * n, 7), offsets_of(*[2] * n), numbers(15, 7), numbers(15, 5)),
    ),
    "jagged_embedding": (
        lambda v, w, p, at, keys: fastrec.jagged_embedding(
            v, w, p, at, dropout_p=0.5, rng=RNG, keys=keys
        ),
        lambda n: (ids(n, 3 * n), numbers(3 * n, 8), numbers(n, 8), ids(n, n), ids(n, 9)),
    ),
    "jagged_max_pool": (
        fastrec.jagged_max_pool, lambda n: (numbers(2 * n, 8), offsets_of(*[2] * n)),
    ),
    "bias_gelu_dropout": (
        lambda x, b, keys, at: fastrec.bias_gelu_dropout(
            x, b, dropout_p=0.5, rng=RNG, keys=keys, positions=at
        ),
        lambda n: (numbers(n, 8), numbers(8), ids(n, 9), ids(n, n)),
    ),
    "dropout_add_layer_norm": (
        lambda x, r, w, keys, at: fastrec.dropout_add_layer_norm(
            x, r, w, w, dropout_p=0.5, rng=RNG, keys=keys, positions=at
        ),
        lambda n: (numbers(n, 8), numbers(n, 8), numbers(8), ids(n, 9), ids(n, n)),
    ),
    "gelu_ffn": (
        fastrec.gelu_ffn,
        lambda n: (numbers(n, 8), numbers(16, 8), numbers(16), numbers(8, 16), numbers(8)),
    ),
    "linear": (fastrec.linear, lambda n: (numbers(n, 8), numbers(2 * n, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_sizes(name):
    function, arguments = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    compiled(*arguments(11))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (12, 17, 23, 30):
            given = arguments(n)
            torch.testing.assert_close(compiled(*given), function(*given))


def test_every_op_is_here():
    assert {op.name for op in OPS} == {name.split()[0] for name in CASES}
