# SPDX-License-Identifier: Apache-2.0
"""No op holds its scores or logits: peak memory against theirs."""

import torch
from backends import needs
from memory import in_a_fresh_process, needs_proc, peak_of

from fastrec import (
    in_batch_cross_entropy,
    linear_cross_entropy,
    linear_rank,
    linear_topk,
    multilabel_bce,
)

FLOAT = 4  # bytes


def linear_cross_entropy_step(n, v, d):
    x = torch.randn(n, d, requires_grad=True)
    w = torch.randn(v, d, requires_grad=True)
    y = torch.randint(v, (n,))
    return lambda: linear_cross_entropy(x, w, y, backend="cpp").backward()


def in_batch_cross_entropy_step(b, d):
    q, c = (torch.randn(b, d, requires_grad=True) for _ in range(2))
    w = torch.rand(d, requires_grad=True)
    group = torch.arange(b) // 2
    exclude = torch.arange(b), torch.arange(b + 1)
    return lambda: in_batch_cross_entropy(
        q, c, similarity="weighted_l2", weight=w, query_group=group, candidate_group=group,
        exclude=exclude, symmetric=True, backend="cpp",
    ).backward()  # fmt: skip


def multilabel_step(n, a, d):
    x = torch.randn(n, d, requires_grad=True)
    w = torch.randn(a, d, requires_grad=True)
    lists = torch.arange(n) % a, torch.arange(n + 1)
    return lambda: multilabel_bce(x, w, *lists, backend="cpp").backward()


def ranking(n, v, k):
    input, weight, y = torch.randn(n, 16), torch.randn(v, 16), torch.arange(n)

    def call():
        linear_topk(input, weight, k, backend="cpp")
        linear_rank(input, weight, y, backend="cpp")

    return call


def largest_after_a_small_one(make, small, *sizes):
    torch.set_num_threads(2)
    make(*small)()
    return max(peak_of(make(*size)) for size in sizes)


def peak(make, small, *sizes):
    return in_a_fresh_process(largest_after_a_small_one, make, small, *sizes)


@needs_proc
@needs("cpp", "linear_cross_entropy")
def test_linear_cross_entropy_holds_no_logits():
    """Forward and backward beyond the gradients, against the logits of 1.6 GB."""
    n, v, d = 4000, 100_000, 8
    gradients = (n + v) * d * FLOAT
    found = peak(linear_cross_entropy_step, (64, 64, 16), (n, v, d))
    assert found - gradients < 0.02 * n * v * FLOAT


@needs_proc
@needs("cpp", "in_batch_cross_entropy")
def test_in_batch_cross_entropy_holds_no_logits():
    """Forward and backward, gradients included, against the logits of 144 MB."""
    b, d = 6_000, 8
    found = peak(in_batch_cross_entropy_step, (64, 16), (b, d))
    assert found < 0.05 * b * b * FLOAT


@needs_proc
@needs("cpp", "linear_topk")
@needs("cpp", "linear_rank")
def test_ranking_holds_no_scores():
    """They would take 400 MB."""
    found = peak(ranking, (2, 50, 3), (1000, 100_000, 10), (1000, 100_000, 100))
    assert found < 40_000 * 1024


@needs_proc
@needs("cpp", "multilabel_bce")
def test_multilabel_bce_holds_neither_logits_nor_labels():
    """Forward and backward, gradients included, against the logits of 400 MB."""
    n, a, d = 100_000, 1000, 8
    found = peak(multilabel_step, (64, 64, 8), (n, a, d))
    assert found < 0.1 * n * a * FLOAT
