# SPDX-License-Identifier: Apache-2.0
"""A pre-training step of S3-Rec against plain padded PyTorch, on a prepared data set.

python -m benchmarks.s3rec_step data/yelp --steps 9

The plain step is written as the public program does it: sequences padded to L, four encoder passes,
attributes of every event as a dense [B L, A] matrix, losses of every position times a mask. Both
take the same views and the gradients and the optimiser; process time on one thread, medians.

Legend: B users, L length, D width, V items, A attributes.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.views import Views
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.stage_data import stage_data


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(0.5)
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        users, length, width = x.shape
        q, k, v = (
            linear(x).view(users, length, self.heads, -1).transpose(1, 2)
            for linear in list(self.maps)[:3]
        )
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5 + mask
        mixed = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(x.shape)
        x = self.norms[0](x + self.drop(self.maps[3](mixed)))
        return self.norms[1](x + self.drop(self.outer(F.gelu(self.inner(x)))))


class Padded(nn.Module):
    """Ids V are padding, V + 1 is [MASK]. hot: [V + 1, A], the attributes of items."""

    def __init__(self, items: int, hot: Tensor, length: int, width: int = 64):
        super().__init__()
        self.items, self.hot = items, hot
        self.table, self.places = nn.Embedding(items + 2, width), nn.Embedding(length, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.5)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.attributes = nn.Embedding(hot.shape[1], width)
        self.tasks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def encode(self, ids: Tensor) -> Tensor:
        mask = ((ids == self.items).float() * -1e4)[:, None, None, :]
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.drop(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return x

    def forward(self, masked, true, negative, context, run, other) -> Tensor:
        states, real = self.encode(masked), true != self.items
        chosen = (masked == self.items + 1) & real
        aap, mip, map_, sp = self.tasks
        hot = self.hot[true].flatten(0, 1)  # [B L, A]
        loss = torch.zeros(())
        for weight, task, kept in ((0.2, aap, real & ~chosen), (1.0, map_, chosen)):
            p = (task(states).flatten(0, 1) @ self.attributes.weight.T).sigmoid()
            losses = F.binary_cross_entropy(p, hot, reduction="none")
            loss = loss + weight * (losses * kept.flatten()[:, None]).sum()
        query = mip(states)
        own, drawn = ((query * self.table(ids)).sum(-1).sigmoid() for ids in (true, negative))
        loss = loss - (F.logsigmoid(own - drawn) * chosen).sum()
        a, c, d = (self.encode(ids)[:, -1] for ids in (context, run, other))
        own, drawn = ((sp(a) * vector).sum(-1).sigmoid() for vector in (c, d))
        return loss - 0.5 * F.logsigmoid(own - drawn).sum()


def padded(batch, values: Tensor, items: int, length: int) -> Tensor:
    """[B, L] with the padding in front."""
    out, owner = torch.full((len(batch), length), items), batch.segment_ids()
    out[owner, length - batch.lengths[owner] + batch.positions()] = values.clamp_max(items + 1)
    return out


def padded_inputs(views: dict, items: int, length: int) -> list[Tensor]:
    main, context, run = (views[name] for name in ("main", "context", "run"))

    def ids(batch, values: Tensor) -> Tensor:
        return padded(batch, torch.where(values >= items, items + 1, values), items, length)

    target = main.events["target"]
    true = padded(main, torch.where(target >= 0, target, main.values), items, length)
    drawn = torch.randint(items, true.shape)
    runs = ids(run, run.values)
    return [
        ids(main, main.values),
        true,
        drawn,
        ids(context, context.values),
        runs,
        runs.roll(1, 0),
    ]


def timed(optimizer, loss_of) -> float:
    start = time.process_time()
    optimizer.zero_grad(set_to_none=True)
    loss_of().backward()
    optimizer.step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="folder of `fastrec prepare` with --item_attributes")
    parser.add_argument("--steps", type=int, default=9, help="of fastrec; a third of them padded")
    parser.add_argument("--batch_size", type=int, default=256, help="users")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset, recipe = SequenceDataset.load(arguments.data), Recipe.load("s3rec")
    stage, length = recipe.pretraining, recipe.model.max_len
    assert stage is not None
    model = UserModel(dataset.num_items, recipe.model)
    found = stage_data(dataset, recipe, stage)
    objective = JointObjective(stage.parts, model, found.side)
    lists = objective.parts["item_attributes"]
    hot = torch.zeros(dataset.num_items + 1, lists.table.num_embeddings)
    hot[torch.repeat_interleave(lists.offsets.diff()), lists.values] = 1
    plain = Padded(dataset.num_items, hot, length)
    ours = torch.optim.Adam([*model.parameters(), *objective.parameters()])
    theirs = torch.optim.Adam(plain.parameters())
    views = Views(stage.views, model.frame, found.side, length)
    loader = SequenceLoader(views, batch_size=arguments.batch_size, users=found.users)
    seconds: dict[str, list[float]] = {"fastrec": [], "padded": []}
    for step in range(arguments.steps):
        start = time.process_time()
        batch = loader.batch_at(step)
        made = time.process_time() - start
        terms = timed(ours, lambda: total_loss(objective(model, batch, Rng(0, step))))  # noqa: B023
        seconds["fastrec"].append(made + terms)
        if step % 3 == 0:
            inputs = padded_inputs(batch, dataset.num_items, length)
            seconds["padded"].append(timed(theirs, lambda: plain(*inputs)))  # noqa: B023
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    events = sum(len(view.values) for view in batch.values())
    sizes = f"B={arguments.batch_size} L={length} V={dataset.num_items} A={hot.shape[1]}"
    print(f"{sizes}, {events} events")
    for name, value in medians.items():
        print(f"{name}: {1e3 * value:,.0f} ms, {value / medians['fastrec']:.1f}x")


if __name__ == "__main__":
    main()
