"""Training steps of BERT4Rec on one file in fastrec, RecTools and RecBole, what an epoch takes and
what the model has learnt.

    python benchmarks/epoch.py fastrec  --source Yelp.txt --steps 20 [--evaluate]
    python benchmarks/epoch.py rectools --source Yelp.txt --steps 5
    python benchmarks/epoch.py recbole  --source Yelp.txt --steps 5

The libraries cannot share an environment: run each with the Python that has it; no other is
imported. The same model everywhere: 2 layers, 2 heads, D = 64, the last 30 items, dropout 0.5, a
fifth of the items masked, softmax over all items, Adam, 256 sequences a step. What is an epoch is
the library's choice: fastrec and RecTools see every user once, RecBole one sequence for every
prefix. Prints the median time of a step (batch, forward, backward, optimiser) without the first.
With `--evaluate`, also HR@10 and NDCG@10 of every user's last item among all items, those of the
user's history included, after these steps.

`source`: a line a user, `user item item ...`, oldest first; the last two items are held out.
"""

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

BATCH, LENGTH, WIDTH, MASKED, DROPOUT = 256, 30, 64, 0.2, 0.5


def read(source: Path) -> Iterator[tuple[str, list[str]]]:
    with open(source) as lines:
        for line in lines:
            user, *items = line.split()
            yield user, items


class Clock:
    """Wall and process seconds of steps that follow one another."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.last = (time.perf_counter(), time.process_time())

    def tick(self) -> None:
        now = (time.perf_counter(), time.process_time())
        self.steps.append((now[0] - self.last[0], now[1] - self.last[1]))
        self.last = now


class Trained(NamedTuple):
    """`ranks` gives the place of each user's last item, from 1; one below 10 may be infinite."""

    clock: Clock
    batches: int
    ranks: Callable[[], Iterable[float]]


def fastrec(source: Path, steps: int, folder: Path) -> Trained:
    import torch

    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.loader import SequenceLoader
    from fastrec.data.prepare import prepare
    from fastrec.data.side import SideData
    from fastrec.data.steps.mask import Mask
    from fastrec.data.views import Views
    from fastrec.evaluation.next_item import NextItemJudge, Protocol
    from fastrec.nn.user_model import ModelConfig, UserModel
    from fastrec.objectives.item import Item
    from fastrec.objectives.joint import JointObjective, total_loss
    from fastrec.random import Rng

    prepare(source, folder / "data", format="s3rec")
    dataset = SequenceDataset.load(folder / "data")
    config = ModelConfig(width=WIDTH, max_len=LENGTH, dropout=DROPOUT)
    torch.manual_seed(0)
    model, side = UserModel(dataset.num_items, config, dataset.num_users), SideData(dataset)
    joint = JointObjective({"item": Item()}, model, side)
    views = Views({"main": [Mask(share=MASKED)]}, model.frame, side, LENGTH)
    loader = SequenceLoader(views, batch_size=BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    clock = Clock()
    for step in range(steps):
        batch = loader.batch_at(step)
        optimizer.zero_grad(set_to_none=True)
        total_loss(joint(model, batch, Rng(0, step))).backward()
        optimizer.step()
        clock.tick()

    def ranks() -> Iterable[float]:
        users = torch.arange(dataset.num_users)
        found = NextItemJudge(dataset, users, "test", Protocol(candidates="full"))
        return found.ranks(model.eval()).tolist()

    return Trained(clock, len(loader), ranks)


def rectools(source: Path, steps: int, folder: Path) -> Trained:
    import pandas as pd
    import pytorch_lightning as pl
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]

    def dataset(held_out: int) -> Dataset:
        rows = [
            (user, item, 1.0, place)
            for user, items in read(source)
            for place, item in enumerate(items[:-held_out])
        ]
        frame = pd.DataFrame(rows, columns=names)
        days = pd.to_timedelta(frame[Columns.Datetime], unit="D")
        frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + days
        return Dataset.construct(frame)

    clock = Clock()

    class Tick(pl.Callback):
        def on_train_start(self, *args):
            clock.last = (time.perf_counter(), time.process_time())

        def on_train_batch_end(self, *args):
            clock.tick()

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[Tick()], logger=False,
            enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip

    train = dataset(held_out=2)
    model = BERT4RecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=WIDTH,
        session_max_len=LENGTH,
        batch_size=BATCH,
        mask_prob=MASKED,
        dropout_rate=DROPOUT,
        loss="softmax",
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer,
    ).fit(train)

    def ranks() -> Iterable[float]:
        last = {user: items[-1] for user, items in read(source)}
        lists = model.recommend(list(last), dataset(held_out=1), k=10, filter_viewed=False)
        hits = lists[lists[Columns.Item] == lists[Columns.User].map(last)]
        found = dict(zip(hits[Columns.User], hits[Columns.Rank], strict=True))
        return [found.get(user, math.inf) for user in last]

    return Trained(clock, -(-train.user_id_map.size // BATCH), ranks)


def recbole(source: Path, steps: int, folder: Path) -> Trained:
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import BERT4Rec

    (folder / "yelp").mkdir()
    with open(folder / "yelp" / "yelp.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, items in read(source):
            file.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(items))
    options = dict(
        data_path=str(folder), USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id",
        TIME_FIELD="timestamp", load_col={"inter": ["user_id", "item_id", "timestamp"]},
        MAX_ITEM_LIST_LENGTH=LENGTH, train_batch_size=BATCH, n_layers=2, n_heads=2,
        hidden_size=WIDTH, inner_size=4 * WIDTH, hidden_dropout_prob=DROPOUT,
        attn_dropout_prob=DROPOUT, mask_ratio=MASKED, loss_type="CE", train_neg_sample_args=None,
        use_gpu=False, eval_args=dict(split={"LS": "valid_and_test"}, order="TO", mode="full"),
    )  # fmt: skip
    config = Config(model="BERT4Rec", dataset="yelp", config_dict=options)
    train, _, test = data_preparation(config, create_dataset(config))
    model = BERT4Rec(config, train.dataset).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    clock = Clock()
    epochs = itertools.chain.from_iterable(itertools.repeat(train))
    for batch in itertools.islice(epochs, steps):
        optimizer.zero_grad(set_to_none=True)
        model.calculate_loss(batch).backward()
        optimizer.step()
        clock.tick()

    def ranks() -> Iterable[float]:
        model.eval()
        for batch, _, _, last in test:
            with torch.no_grad():
                scores = model.full_sort_predict(batch)
            scores[:, 0] = -math.inf  # padding
            yield from ((scores > scores.gather(1, last[:, None])).sum(1) + 1.0).tolist()

    return Trained(clock, len(train), ranks)


def ranking(ranks: list[float]) -> str:
    gains = [1 / math.log2(rank + 1) if rank <= 10 else 0.0 for rank in ranks]
    hits = sum(gain > 0 for gain in gains)
    return f"HR@10 {hits / len(ranks):.4f}, NDCG@10 {sum(gains) / len(ranks):.4f}"


def main() -> None:
    packages = {"fastrec": fastrec, "rectools": rectools, "recbole": recbole}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=packages)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    source = options.source.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # RecBole writes logs where it stands
        clock, batches, ranks = packages[options.package](source, options.steps, Path(folder))
        wall, process = (median(times) for times in zip(*clock.steps[1:], strict=True))
        print(
            f"{options.package}: {wall:.3f} s a step ({process:.3f} s of CPU), {batches} steps an"
            f" epoch, {batches * wall:,.0f} s an epoch"
        )
        if options.evaluate:
            total, busy = (sum(times) for times in zip(*clock.steps, strict=True))
            spent = f"{options.steps} steps, {total:,.0f} s ({busy:,.0f} s of CPU)"
            print(f"after {spent}: {ranking(list(ranks()))}")


if __name__ == "__main__":
    main()
