# SPDX-License-Identifier: Apache-2.0
"""Cost of friends in a step: `python benchmarks/relations.py [--users 1000000 --links 20000000]`.

Builds a power-law graph, then times, in CPU time of one thread: drawing a friend per user of a
batch, the in-batch exclusions for 0, 1 and 2 hops, the same by a scipy.sparse product where scipy
is there, and one training step of UPRec on sequences of the length of the synthetic data set.
--smoke is tiny.
"""

import argparse
import time
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastrec.data.attributes import EncodedAttribute
from fastrec.data.batch import JaggedBatch, offsets_of
from fastrec.data.graph import FriendSampler, SocialGraph
from fastrec.data.steps.mask import Mask
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.objectives.parts import Objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.random import Rng

UPREC = Objectives(
    item=Item(), user_attributes=UserAttributes(weight=0.3), friends=Friends(weight=0.5)
)


def power_law_graph(users: int, links: int, seed: int = 0) -> SocialGraph:
    """Both ends of every link are drawn with weight (rank + 10)^-0.7: degrees have a power law of
    exponent 2.4."""
    generator = np.random.default_rng(seed)
    cumulative = np.cumsum((np.arange(users) + 10.0) ** -0.7)
    shuffled = generator.permutation(users)
    shots = generator.random((links, 2)) * cumulative[-1]
    return SocialGraph.from_pairs(shuffled[np.searchsorted(cumulative, shots)], users)


def cpu_ms(action, rounds: int) -> float:
    """Median CPU milliseconds of `rounds` calls after a first one; `action` gets the round."""
    times = []
    for round in range(rounds + 1):
        start = time.process_time()
        action(round)
        times.append(1e3 * (time.process_time() - start))
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--links", type=int, default=20_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.users, options.links, options.batch_size, options.items = 2_000, 9_000, 64, 500
        options.rounds = 1
    torch.set_num_threads(1)
    start = time.process_time()
    graph = power_law_graph(options.users, options.links)
    degrees = np.diff(graph.offsets)
    print(
        f"{options.users:,} users, {len(graph.values) // 2:,} friendships in"
        f" {time.process_time() - start:.1f} s; degree median {np.median(degrees):.0f},"
        f" mean {degrees.mean():.1f}, of a friend {(degrees**2.0).sum() / degrees.sum():.0f},"
        f" largest {degrees.max():,}"
    )
    draws = friends_cost(graph, options)
    step = step_cost(graph, options)
    print(f"friends (2 hops) take {100 * draws / (draws + step):.1f} % of a step on one CPU core")


def friends_cost(graph: SocialGraph, options) -> float:
    generator = np.random.default_rng(0)
    batches = [
        generator.choice(graph.num_users, options.batch_size, False)
        for _ in range(options.rounds + 1)
    ]
    for hops in (0, 1, 2):
        sampler = FriendSampler(graph, hops=hops)

        def pairs(round: int, sampler=sampler) -> None:
            sampler.pairs_at(batches[round], Rng(0, round))

        cost = cpu_ms(pairs, options.rounds)
        listed = len(sampler.pairs_at(batches[0], Rng(0, 0))[1].exclude[0]) / options.batch_size
        print(f"draw, pair and exclude, {hops} hops: {cost:.1f} ms, {listed:.1f} listed a query")
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        print("scipy is not installed: no comparison")
        return cost
    ones = np.ones(len(graph.values), dtype=np.float32)
    matrix = csr_matrix((ones, graph.values, graph.offsets), shape=(graph.num_users,) * 2)

    def product(round: int) -> None:
        users = batches[round]
        rows, friends = graph.draw_friends(users, Rng(0, round))
        (matrix[users[rows]] @ matrix[friends].T).sort_indices()

    peer = cpu_ms(product, options.rounds)
    print(f"scipy.sparse product, friends of friends only: {peer:.1f} ms, {peer / cost:.1f} x")
    return cost


def side_of(model: UserModel, attributes: list[EncodedAttribute]) -> Any:
    """What the steps and objectives of this file ask of `SideData`."""
    return SimpleNamespace(
        num_items=model.num_items,
        mask_id=model.token("mask"),
        attributes=attributes,
        user_columns={},
    )


def masked_view(model: UserModel, batch: JaggedBatch, rng: Rng) -> dict[str, JaggedBatch]:
    """A batch of items as `Views` makes it: a fifth of them masked, tokens around them."""
    masked = Mask()(batch, rng, side_of(model, []))
    return {"main": model.frame(masked).with_scored()}


def item_batch(model: UserModel, users: np.ndarray, generator: np.random.Generator) -> JaggedBatch:
    """Items without order. Lengths as in the Yelp data: from 5, median 7, cut at the length of the
    model."""
    lengths = 5 + np.exp(1 + 1.2 * generator.standard_normal(len(users)))
    lengths = np.minimum(lengths, model.config.max_len).astype(np.int64)
    values = generator.integers(model.num_items, size=lengths.sum())
    offsets = offsets_of(torch.from_numpy(lengths))
    return JaggedBatch(
        torch.from_numpy(values), offsets, torch.from_numpy(users), int(lengths.max())
    )


def social_batch(
    model: UserModel,
    sampler: FriendSampler,
    attributes: list[EncodedAttribute],
    size: int,
    generator: np.random.Generator,
    step: int,
) -> JaggedBatch:
    """`size` users and their drawn friends."""
    own = generator.choice(sampler.graph.num_users, size, False)
    users, pairs = sampler.pairs_at(own, Rng(0, step))
    batch = item_batch(model, users, generator)
    columns = {attribute.name: attribute.values[batch.keys] for attribute in attributes}
    return replace(batch, users=columns, pairs=pairs)


def step_cost(graph: SocialGraph, options) -> float:
    """CPU milliseconds of forward + backward of the three objectives at D = 64, two layers."""
    model = UserModel(options.items, ModelConfig(dropout=0.3, tokens=["cls", "sep"]))
    region = EncodedAttribute("region", torch.arange(graph.num_users) % 6, tuple(range(6)))
    joint = JointObjective(UPREC.named(), model, side_of(model, [region]))
    sampler = FriendSampler(graph)

    batches = [
        social_batch(
            model, sampler, [region], options.batch_size, np.random.default_rng(round), round
        )
        for round in range(2)
    ]

    def step(round: int) -> None:
        rng = Rng(0, round)
        total_loss(joint(model, masked_view(model, batches[round % 2], rng), rng)).backward()

    cost = cpu_ms(step, min(options.rounds, 2))
    print(
        f"forward + backward of {len(batches[0])} sequences, {len(batches[0].values):,} items,"
        f" {options.items:,} items: {cost:.0f} ms"
    )
    return cost


if __name__ == "__main__":
    main()
