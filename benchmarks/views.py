# SPDX-License-Identifier: Apache-2.0
"""What the two contrasted views of a step take beside a loop over its users, and of a whole step.

    python -m benchmarks.views --data data        # a folder of `fastrec prepare`, Beauty for one
    python -m benchmarks.views --data data --smoke

For 256 users of cl4srec, duorec and coserec: the jagged views, and lists that are changed user by
user with `random`, padded to `max_len` and stacked, the form of the public programs. Both know the
most similar items and the prefixes with the same target beforehand; what that takes is printed.
Process CPU time on one thread, in turn; minimum and median in ms. A step is the whole of it: views,
forward, backward, optimiser. That the views are right is in tests/test_steps.py.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.side import SideData
from fastrec.data.views import Views
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.training.config import Recipe

NAMES = ("cl4srec", "duorec", "coserec")


class Loops:
    """The views of one user after the other, of lists."""

    def __init__(self, sequences: list[list[int]], similar: list[int], mask: int, length: int):
        self.sequences, self.similar, self.mask, self.length = sequences, similar, mask, length
        self.same: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for user, items in enumerate(sequences):
            for place in range(1, len(items)):
                self.same[items[place]].append((user, place))

    def crop(self, items: list[int], keep: float) -> list[int]:
        count = max(1, int(keep * len(items)))
        start = random.randint(0, len(items) - count)
        return items[start : start + count]

    def masked(self, items: list[int], share: float) -> list[int]:
        out = list(items)
        for place in random.sample(range(len(items)), max(1, int(share * len(items)))):
            out[place] = self.mask
        return out

    def reorder(self, items: list[int], share: float) -> list[int]:
        count = max(1, int(share * len(items)))
        start = random.randint(0, len(items) - count)
        run = items[start : start + count]
        random.shuffle(run)
        return items[:start] + run + items[start + count :]

    def substitute(self, items: list[int]) -> list[int]:
        out = list(items)
        for place in random.sample(range(len(items)), max(1, int(0.1 * len(items)))):
            out[place] = self.similar[items[place]]
        return out

    def insert(self, items: list[int]) -> list[int]:
        chosen, out = random.sample(range(len(items)), max(1, int(0.4 * len(items)))), []
        for place, item in enumerate(items):
            if place in chosen:
                out.append(self.similar[item])
            out.append(item)
        return out

    def cl4srec(self, user: int) -> list[list[int]]:
        items = self.sequences[user]
        ways = [
            lambda: self.crop(items, 0.6),
            lambda: self.masked(items, 0.3),
            lambda: self.reorder(items, 0.6),
        ]
        return [way() for way in random.sample(ways, 2)]

    def coserec(self, user: int) -> list[list[int]]:
        items = self.sequences[user]
        ways = [
            lambda: self.substitute(items),
            lambda: self.insert(items),
            lambda: self.masked(items, 0.7),
        ]
        if len(items) > 4:
            ways += [lambda: self.crop(items, 0.2), lambda: self.reorder(items, 0.2)]
        return [random.choice(ways)() for _ in range(2)]

    def duorec(self, user: int) -> list[list[int]]:
        items = self.sequences[user]
        others = [each for each in self.same[items[-1]] if each != (user, len(items) - 1)]
        other, place = random.choice(others) if others else (user, len(items) - 1)
        return [items[:-1], self.sequences[other][:place]]

    def batch(self, name: str, users: list[int]) -> list[Tensor]:
        rows = [getattr(self, name)(user) for user in users]
        return [torch.stack([self.padded(pair[view]) for pair in rows]) for view in range(2)]

    def padded(self, items: list[int]) -> Tensor:
        items = items[-self.length :]
        return torch.tensor([0] * (self.length - len(items)) + items)


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def report(name: str, dataset: SequenceDataset, side: SideData, loops: Loops, options) -> None:
    recipe = Recipe.load(name)
    stage, length = recipe.stage("pretraining"), recipe.model.max_len
    torch.manual_seed(0)
    model = UserModel(dataset.num_items, recipe.model)
    joint = JointObjective(stage.parts, model, side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loader(views: dict) -> SequenceLoader:
        made = Views(views, model.frame, side, length)
        return SequenceLoader(made, batch_size=options.batch_size)

    everything, first = loader(stage.views), loader({"main": stage.views["main"]})

    def train(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        total_loss(joint(model, everything.batch_at(step), Rng(0, step))).backward()
        optimizer.step()

    times: dict[str, list[float]] = defaultdict(list)
    for step in range(options.rounds + 1):
        users = everything._users_of_all_ranks(step).tolist()
        times["all views"].append(timed(lambda step=step: everything.batch_at(step)))
        times["main"].append(timed(lambda step=step: first.batch_at(step)))
        times["loop over users"].append(timed(lambda users=users: loops.batch(name, users)))
        if step <= options.steps:
            times["whole step"].append(timed(lambda step=step: train(step)))
    print(name)
    found = {what: (min(each[1:]), median(each[1:])) for what, each in times.items()}
    views, alone = found.pop("all views"), found.pop("main")
    two = views[0] - alone[0], views[1] - alone[1]
    for what, (low, middle) in {"two views": two, **found}.items():
        ratios = f"{low / two[0]:.1f}, {middle / two[1]:.1f}"
        print(f"  {what:<20}{low:9.2f}, {middle:.2f} ms   {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6, help="at least 1")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps, options.batch_size = 2, 1, 20
    torch.set_num_threads(1)
    random.seed(0)
    dataset = SequenceDataset.load(options.data)
    side = SideData(dataset)
    similar = timed(lambda: side.similar_items)
    prefixes = timed(lambda: side.target_index)
    size = side.target_index.places.nbytes + side.target_index.offsets.nbytes
    print(f"similar items {similar:,.0f} ms; prefixes {prefixes:,.0f} ms, {size:,} bytes")
    batch = dataset.gather(range(dataset.num_users), "train")
    bounds = batch.offsets.tolist()
    sequences = [batch.values[a:b].tolist() for a, b in pairwise(bounds)]
    loops = Loops(sequences, side.similar_items.tolist(), dataset.num_items, 50)
    for name in NAMES:
        report(name, dataset, side, loops, options)


if __name__ == "__main__":
    main()
