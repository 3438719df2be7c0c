# SPDX-License-Identifier: Apache-2.0
"""Every pool against a loop over the sequences."""

import pytest
import torch
from builders import model_of

from fastrec.data.batch import JaggedBatch, framed, from_sequences
from fastrec.nn.pool import Encoded, Interests, Pool, max_pool

HOWS = ["max", "mean", "cls", "ur", "last", "attention", Interests(3)]
MASK, CLS, SEP, UR = 20, 21, 22, 23
# [MASK] stands for an item; the second has one item, the fourth only a [MASK], the third none.
SEQUENCES = [[3, 7, MASK, 7], [5], [], [MASK], [9, MASK]]


def is_item(token: int) -> bool:
    return token <= MASK


def one_by_one(pool: Pool, batch: JaggedBatch, states: torch.Tensor) -> torch.Tensor:
    """The user vectors in plain PyTorch, a sequence at a time."""
    rows = []
    for a, b in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        values, own = batch.values[a:b].tolist(), states[a:b]
        items = own[[i for i, value in enumerate(values) if is_item(value)]]
        zero = own.new_zeros(own.shape[1])
        if pool.how in ("cls", "ur"):
            token = {"cls": CLS, "ur": UR}[pool.how]
            rows.append(own[values.index(token)])
        elif pool.how == "last":
            rows.append(items[-1] if len(items) else own[-1] if len(own) else zero)
        elif not len(items):
            rows.append(zero)
        elif pool.how == "max":
            rows.append(items.max(0).values)
        elif pool.how == "mean":
            rows.append(items.mean(0))
        else:
            hidden = items @ pool.project.weight.T + pool.project.bias
            several = isinstance(pool.how, Interests)
            queries = pool.queries if several else [pool.query]
            means = [(hidden.tanh() @ query).softmax(0) @ items for query in queries]
            rows.append(pool.merge.weight @ torch.cat(means) if several else means[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "how, tokens",
    [(how, True) for how in HOWS] + [(how, False) for how in HOWS if how not in ("cls", "ur")],
)
def test_equals_a_loop_over_the_sequences(how, tokens, poisoned_memory):
    """Masked items count, special tokens do not; in float64 with all gradients."""
    model = model_of(tokens=["cls", "sep", "ur"] if tokens else [])
    batch = from_sequences(SEQUENCES)
    if tokens:
        batch = framed(batch, [CLS], [SEP, UR])
    pool = Pool(how, 8).double()
    states = torch.randn(len(batch.values), 8, dtype=torch.float64, requires_grad=True)
    leaves = [states, *pool.parameters()]
    found, expected = pool(model, Encoded(batch, states)), one_by_one(pool, batch, states)
    assert found.shape == (5, 8) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(5, 8, dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("how", ["max", "mean", "last", "attention", Interests(2)])
@pytest.mark.parametrize("sequences", [[], [[], []], [[SEP], [], [SEP, SEP]], [[], [2], []]])
def test_without_items_zero_and_finite_gradients(how, sequences):
    """The last pool takes the last event where there is no item; an empty sequence never gets the
    state of another user."""
    batch, pool, model = from_sequences(sequences), Pool(how, 8), model_of()
    states = torch.randn(len(batch.values), 8, requires_grad=True)
    found = pool(model, Encoded(batch, states))
    assert found.shape == (len(sequences), 8) and found.requires_grad
    for vector, sequence in zip(found, sequences, strict=True):
        seen = any(map(is_item, sequence)) or (how == "last" and sequence)
        assert bool(vector.any()) == bool(seen)
    found.square().sum().backward()
    assert states.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pool.parameters())


def test_attention_with_scores_far_apart():
    """The softmax is taken relative to the largest score of each sequence."""
    batch, pool = from_sequences([[1, 2], [3, 4, 5]]), Pool("attention", 8)
    with torch.no_grad():
        pool.query.mul_(1e4)
    states = torch.randn(5, 8, requires_grad=True)
    found = pool(model_of(), Encoded(batch, states))
    torch.testing.assert_close(found, one_by_one(pool, batch, states))
    found.sum().backward()
    assert states.grad.isfinite().all() and pool.query.grad.isfinite().all()


def test_settings_that_are_no_pool():
    with pytest.raises(
        ValueError, match="interests must be at least 2, got 1: one is the pool att"
    ):
        Interests(1)
    with pytest.raises(
        ValueError, match=r"pool must be one of .*'attention'\) or Interests, got 'a'"
    ):
        Pool("a", 8)
    encoded = Encoded(from_sequences([[1]]), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="has parameters, or is none"):
        model_of().pool(encoded, Interests(2))


def test_the_maximum_gets_the_gradient_and_of_equal_ones_the_first():
    batch = from_sequences([[CLS, 3, 4, 5, SEP], [CLS, SEP]])
    states = torch.tensor([[9.0, 9], [1, 5], [2, -5], [2, 5], [7, 7], [8, 8], [8, 8]])
    states.requires_grad_(True)
    pooled = max_pool(states, batch, num_items=20)
    assert pooled.tolist() == [[2, 5], [0, 0]]
    pooled.sum().backward()
    assert states.grad.nonzero().tolist() == [[1, 1], [2, 0]]


def test_bfloat16_states_are_summed_in_float32():
    batch = from_sequences([[1] * 1000])
    states = torch.full((1000, 8), 1.01, dtype=torch.bfloat16)
    for how in ("mean", "attention"):
        found = Pool(how, 8).bfloat16()(model_of(), Encoded(batch, states))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), states[:1].float(), rtol=2**-7, atol=0)


def test_pooled_vectors_are_computed_once_and_by_name():
    model = model_of(tokens=["cls"])
    encoded = model.encode(framed(from_sequences([[1, 2], [3]]), [CLS]))
    assert model.pool(encoded, "max") is Pool("max", 8)(model, encoded)
    assert not torch.equal(model.pool(encoded, "max"), model.pool(encoded, "mean"))
    with pytest.raises(ValueError, match=r"pool 'ur' needs ur in model\.tokens, \['cls'\]"):
        model.pool(encoded, "ur")
    with pytest.raises(ValueError, match="pool 'attention' has parameters, or is none"):
        model.pool(encoded, "attention")
