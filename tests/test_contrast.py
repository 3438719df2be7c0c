# SPDX-License-Identifier: Apache-2.0
"""Contrast of two views (NT-Xent) against dense PyTorch in float64, on one process and on two."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import backends
from builders import Known, dataset_of, jagged, lists_of, loader_of, model_of, six_users

from fastrec.data.steps.crop import Crop
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.next_item import NextItem
from fastrec.nn.pool import Encoded
from fastrec.objectives.contrast import Contrast, ViewContrast, last_target
from fastrec.objectives.joint import JointObjective, Term, of_all_ranks, total_loss
from fastrec.random import Rng

WIDTH = 8


def shares_an_id(one: list[int], other: list[int]) -> bool:
    return any(x == y and x >= 0 for x, y in zip(one, other, strict=True))


def nt_xent(a, b, ids, settings: Contrast, real=None):
    """(mean loss, number of anchors): all 2B x 2B similarities, an anchor at a time. Users with an
    id in common in a column of `ids` are no negatives of each other."""
    vectors = torch.cat([a, b])
    owner = torch.cat([ids, ids]).view(len(vectors), -1).tolist()
    real = torch.cat([torch.ones(len(ids), dtype=torch.bool) if real is None else real] * 2)
    if settings.similarity == "cosine":
        vectors = F.normalize(vectors, dim=1)
    scores = vectors @ vectors.T / settings.temperature
    users, losses = len(ids), []
    for i in range(2 * users if settings.anchors == "both" else users):
        if not real[i]:
            continue
        partner = (i + users) % (2 * users)
        others = [j for j in range(2 * users) if real[j] and not shares_an_id(owner[i], owner[j])]
        if settings.candidates == "other":
            others = [j for j in others if j // users != i // users]
        losses.append(scores[i, [partner, *others]].logsumexp(0) - scores[i, partner])
    return torch.stack(losses).mean(), len(losses)


def part_of(backend=None, **settings) -> ViewContrast:
    part = Contrast(["a", "b"], **settings).build(model_of(), None)
    part.backend = backend
    return part


def assert_same(part, a, b, ids, real=None):
    (found, count), (expected, number) = (
        part.loss(a, b, ids, real),
        nt_xent(a, b, ids, part.settings, real),
    )
    assert int(count) == number
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(found, [a, b]), torch.autograd.grad(expected, [a, b]), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def vectors(users: int) -> list[torch.Tensor]:
    return [torch.randn(users, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@backends("in_batch_cross_entropy", "reference", "cpp")
@pytest.mark.parametrize("anchors", ["both", "first"])
@pytest.mark.parametrize("candidates", ["both", "other"])
@pytest.mark.parametrize("similarity, temperature", [("dot", 1.0), ("dot", 0.3), ("cosine", 0.1)])
@pytest.mark.parametrize(
    "ids",
    [[4, 0, 9, 2, 7], [4, 0, 4, 2, 4], [[4, 8, 1], [0, 3, -1], [9, 8, -1], [2, -1, 1], [7, -1, 2]]],
    ids=["distinct_users", "repeated_users", "columns"],
)
@pytest.mark.parametrize("padding", [False, True])
def test_equals_dense_pytorch(backend, anchors, candidates, similarity, temperature, ids, padding):
    """Of padding nothing is seen: neither as anchor nor as candidate, whatever stands there."""
    how = {"similarity": similarity, "temperature": temperature, "candidates": candidates}
    part = part_of(backend, anchors=anchors, **how)
    a, b = vectors(7 if padding else 5)
    real = None
    if padding:
        real = torch.arange(7) < 5
        # Padding has the key 0, that of a user, and no other id.
        ids = [*ids, *([[0, -1, -1]] * 2 if isinstance(ids[0], list) else [0, 0])]
    assert_same(part, a, b, torch.tensor(ids), real)


def test_by_hand():
    """Two users in one dimension: each anchor has its partner and both vectors of the other."""
    part = part_of()
    a, b = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [3.0]])
    # The partner, then the vectors of the other user, of a0, a1, b0 and b1.
    rows = torch.tensor([[2.0, 0, 3], [0, 0, 0], [2, 0, 6], [0, 3, 6]])
    expected = (rows.logsumexp(1) - rows[:, 0]).mean()
    loss, count = part.loss(a, b, torch.tensor([5, 6]))
    torch.testing.assert_close(loss, expected)
    assert count == 4
    first, count = part_of(anchors="first").loss(a, b, torch.tensor([5, 6]))
    torch.testing.assert_close(first, (rows.logsumexp(1) - rows[:, 0])[:2].mean())
    assert count == 2


@pytest.mark.parametrize("ids", [[], [3], [3, 3]])
def test_a_user_alone_gives_zero_with_a_live_graph(ids):
    a, b = vectors(len(ids))
    loss, count = part_of().loss(a, b, torch.tensor(ids, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and count == 2 * len(ids)
    assert not a.grad.any() and not b.grad.any()


def test_a_user_without_items_under_cosine_has_finite_gradients():
    """A pooled vector of zeros has no direction."""
    a, b = vectors(3)
    with torch.no_grad():
        a[1] = b[1] = 0
    loss, _ = part_of(similarity="cosine").loss(a, b, torch.arange(3))
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()


@pytest.mark.parametrize("names", [["target"], ["profile"], ["target", "profile"]])
@pytest.mark.parametrize(
    ("first", "causal", "tokens"),
    [
        ([NextItem()], True, []),
        ([NextItem(ahead=2)], True, ["ur"]),
        ([MaskLast()], False, ["cls", "sep"]),
        ([Mask(0.5)], False, []),
    ],
)
def test_users_with_the_same_target_or_profile_are_no_negatives(names, first, causal, tokens):
    """Three of six users end with item 5, three with 7, one of which has no item before it: where
    the next item is predicted that user is left out."""
    histories = [[1, 2, 5], [3, 5], [4, 6, 7], [9, 5], [7], [8, 7]]
    profiles = [2, 0, 2, -1, 0, -1]
    side = Known(dataset_of(histories, 20), profiles=np.array(profiles), split="all")
    model = model_of(dropout=0.4, causal=causal, tokens=tokens)
    joint = JointObjective({"contrast": Contrast(["a", "b"], false_negatives=names)}, model, side)
    loader = loader_of(model, {"a": first, "b": [Crop()]}, side, shuffle=False)
    views = loader.batch_at(0)
    (term,) = joint(model, views, Rng(3, 4))
    encoded, part = model.encode_views(views, Rng(3, 4)), joint.parts["contrast"]
    a, b = (part.pool(model, encoded[name]) for name in "ab")
    target = views["a"].events["target"]
    target = target[:, 0] if target.dim() > 1 else target
    said = [[item for item in row if item >= 0] for row in lists_of(views["a"], target)]
    lasts = [row[-1] if row else -1 for row in said]
    columns = {"target": lasts, "profile": profiles}
    ids = torch.tensor([list(range(6)), *(columns[name] for name in names)]).T
    real = torch.tensor([len(history) > causal for history in histories])
    expected, number = nt_xent(a, b, ids, part.settings, real)
    torch.testing.assert_close(term.loss, expected)
    assert term.number == number == (10 if causal else 12)
    if not isinstance(first[0], Mask):
        assert lasts.count(5) == 3 and lasts.count(7) == (2 if causal else 3)
    without, _ = nt_xent(a, b, ids[:, :1], part.settings, real)
    assert not torch.isclose(term.loss, without, rtol=1e-3)


def test_nothing_is_predicted_in_a_batch_without_events():
    batch = jagged([0, 0])
    empty = replace(batch, events={"target": torch.empty(0, dtype=torch.int64)})
    assert last_target(empty).tolist() == [-1, -1]
    assert last_target(replace(jagged([]), events=empty.events)).tolist() == []
    some = replace(jagged([0, 3, 2, 0]), events={"target": torch.tensor([4, 6, -100, -100, -100])})
    assert last_target(some).tolist() == [-1, 6, -1, -1]


@pytest.mark.parametrize("pool", ["last", "mean", "attention"])
def test_user_vectors_are_those_of_the_pool(pool):
    model, side = model_of(dropout=0.4), Known(six_users())
    joint = JointObjective({"contrast": Contrast(["b", "a"], pool=pool)}, model, side)
    views = loader_of(model, {"a": [Crop()], "b": [Mask()]}, side).batch_at(0)
    (term,) = joint(model, views, Rng(3, 4))
    encoded = model.encode_views(views, Rng(3, 4))
    part = joint.parts["contrast"]
    a, b = (part.pool(model, encoded[name]) for name in "ab")
    expected, number = nt_xent(b, a, views["a"].sample_ids, part.settings)
    torch.testing.assert_close(term.loss, expected)
    assert term.number == number == 12
    term.loss.backward()
    assert all(p.grad is not None for p in part.parameters())


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match=r"contrast compares two views, got \['a'\]"):
        Contrast(["a"])
    with pytest.raises(ValueError, match=r"contrast\.temperature must be above 0, got 0"):
        Contrast(["a", "b"], temperature=0.0)
    with pytest.raises(ValueError, match="similarity must be one of .*, got 'l2'"):
        Contrast(["a", "b"], similarity="l2")
    with pytest.raises(ValueError, match="anchors must be one of .*, got 'second'"):
        Contrast(["a", "b"], anchors="second")
    with pytest.raises(ValueError, match="candidates must be one of .*, got 'first'"):
        Contrast(["a", "b"], candidates="first")
    with pytest.raises(ValueError, match="false_negatives must be one of .*, got 'item'"):
        Contrast(["a", "b"], false_negatives=["target", "item"])
    with pytest.raises(ValueError, match="profile has no effect, no attribute is discrete"):
        part = Contrast(["a", "b"], false_negatives=["profile"])
        part.build(model_of(), Known(six_users()))
    with pytest.raises(ValueError, match="target needs targets in the first view"):
        last_target(jagged([2]))
    model = model_of()
    three, two = (Encoded(batch, torch.zeros(len(batch.values), WIDTH)) for batch in map(
        jagged, ([1, 1, 1], [2, 1])
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"views of the same users have \[3, 2\] sequences"):
        part_of()(model, Rng(0, 0), three, two)


# User 4 is on both ranks of two.
IDS = [4, 0, 9, 4, 7]


def group_losses(group, ids=IDS, **settings):
    """(loss of all ranks, gradients of both views' vectors), averaged like DDP does."""
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    torch.manual_seed(0)
    a, b = vectors(len(IDS))
    mine = torch.arange(rank, len(IDS), world)  # three users and two
    loss, count = part_of(**settings).loss(a[mine], b[mine], torch.tensor(ids)[mine])
    total = total_loss(of_all_ranks([Term("contrast", 0.5, loss, count)], world))
    total.backward()
    found = [total.detach(), a.grad, b.grad]
    if group is not None:
        for value in found:
            dist.all_reduce(value)
    return [value / world for value in found]


SETTINGS = [
    {},
    {"anchors": "first", "temperature": 0.5},
    {"similarity": "cosine", "temperature": 0.2},
    {"candidates": "other"},
    {"candidates": "other", "anchors": "first"},
]
# User 4 and user 9 have the same target, user 0 has none.
COLUMNS = [[4, 3], [0, -1], [9, 3], [4, 3], [7, -1]]


def all_settings(group):
    return [group_losses(group, ids, **how) for how in SETTINGS for ids in (IDS, COLUMNS)]


def test_two_processes_are_one_with_all_users(ranks):
    for found in ranks(2, all_settings):
        for got, whole in zip(found, all_settings(None), strict=True):
            for value, expected in zip(got, whole, strict=True):
                torch.testing.assert_close(value, expected)


def test_the_users_of_the_other_process_matter():
    """Two processes that did not tell each other of their users would find another loss."""
    torch.manual_seed(0)
    (a, b), part = vectors(len(IDS)), part_of()
    alone = [part.loss(a[rank::2], b[rank::2], torch.tensor(IDS)[rank::2])[0] for rank in range(2)]
    mean = (6 * alone[0] + 4 * alone[1]) / 10
    assert not torch.isclose(0.5 * mean, group_losses(None)[0], rtol=1e-3)
