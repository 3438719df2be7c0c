# SPDX-License-Identifier: Apache-2.0
"""Training steps of one model on one file in fastrec, RecTools and RecBole, what an epoch takes and
what the model has learnt.

    python benchmarks/epoch.py fastrec  --source Yelp.txt --steps 20 [--evaluate]
    python benchmarks/epoch.py rectools --source Yelp.txt --steps 5
    python benchmarks/epoch.py recbole  --source Yelp.txt --steps 5
    python benchmarks/epoch.py fastrec  --source Beauty.txt --model sasrec --length 50 --steps 20

The libraries cannot share an environment: run each with the Python that has it; no other is
imported. The same model everywhere, D = 64, softmax over all items, Adam at 1e-3 (RecTools': its
default); seed 0 in fastrec, no fixed one in the others. What is an epoch is the library's choice:
fastrec and RecTools see every user once, RecBole one sequence for every prefix, of which SASRec and
GRU4Rec predict the last item alone. Prints the median time of a step (batch, forward, backward,
optimiser) without the first. With `--evaluate`, also HR@10 and NDCG@10 of every user's last item
among all items after these steps, those of the user's history included, or not with `--seen
exclude` (not RecBole). `--negatives N` is a softmax over N sampled items and the target (RecTools
alone).

    bert4rec    2 layers, 2 heads, a fifth of the items masked
    sasrec      2 layers, 1 head
    gru4rec     1 layer of 128; not in RecTools
    cl4srec     SASRec and two augmented views contrasted, as the recipe; RecBole-DA alone
    duorec      the same with a second dropout and a sequence with the same target

RecBole-DA is a copy of RecBole 0.2.1 with these two: `recbole`, its folder in PYTHONPATH, NumPy
1.23, without `--evaluate`.

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

WIDTH, MASKED, HIDDEN = 64, 0.2, 128
MODELS = {  # and their names in RecBole
    "bert4rec": "BERT4Rec", "sasrec": "SASRec", "gru4rec": "GRU4Rec", "cl4srec": "CL4SRec",
    "duorec": "DuoRec",
}  # fmt: skip
CONTRASTED = ("cl4srec", "duorec")


class Task(NamedTuple):
    source: Path
    model: str
    steps: int
    batch: int
    length: int
    dropout: float
    negatives: int
    seen: str


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


def fastrec(task: Task, folder: Path) -> Trained:
    import torch

    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.loader import SequenceLoader
    from fastrec.data.prepare import prepare
    from fastrec.data.side import SideData
    from fastrec.data.steps.mask import Mask
    from fastrec.data.steps.next_item import NextItem
    from fastrec.data.views import Views
    from fastrec.evaluation.next_item import NextItemJudge
    from fastrec.evaluation.protocol import Protocol
    from fastrec.nn.encoders.gru import Gru
    from fastrec.nn.encoders.transformer import Transformer
    from fastrec.nn.model_config import ModelConfig
    from fastrec.nn.user_model import UserModel
    from fastrec.objectives.item import Item
    from fastrec.objectives.joint import JointObjective, total_loss
    from fastrec.random import Rng
    from fastrec.training.config import Recipe

    encoder, view = {
        "bert4rec": (Transformer(heads=2), Mask(share=MASKED)),
        "gru4rec": (Gru(hidden=HIDDEN), NextItem()),
    }.get(task.model, (Transformer(heads=1, causal=True, pre_norm=True), NextItem()))
    parts, made = {"item": Item()}, {"main": [view]}
    if task.model in CONTRASTED:
        stage = Recipe.load(task.model).stage("pretraining")
        parts, made = stage.parts, stage.views
    prepare(task.source, folder / "data", format="s3rec")
    dataset = SequenceDataset.load(folder / "data")
    config = ModelConfig(
        width=WIDTH, max_len=task.length, dropout=task.dropout, encoder=encoder,
        head_transform=task.model == "bert4rec",
    )  # fmt: skip
    torch.manual_seed(0)
    model, side = UserModel(dataset.num_items, config, dataset.num_users), SideData(dataset)
    joint = JointObjective(parts, model, side)
    views = Views(made, model.frame, side, task.length)
    loader = SequenceLoader(views, batch_size=task.batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    clock = Clock()
    for step in range(task.steps):
        batch = loader.batch_at(step)
        optimizer.zero_grad(set_to_none=True)
        total_loss(joint(model, batch, Rng(0, step))).backward()
        optimizer.step()
        clock.tick()

    def ranks() -> Iterable[float]:
        users = torch.arange(dataset.num_users)
        found = NextItemJudge(dataset, users, "test", Protocol(candidates="full", seen=task.seen))
        return found.ranks(model.eval()).tolist()

    return Trained(clock, len(loader), ranks)


def rectools(task: Task, folder: Path) -> Trained:
    import pandas as pd
    import pytorch_lightning as pl
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel, SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]

    def dataset(held_out: int) -> Dataset:
        rows = [
            (user, item, 1.0, place)
            for user, items in read(task.source)
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
            max_steps=task.steps, accelerator="cpu", callbacks=[Tick()], logger=False,
            enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip

    train = dataset(held_out=2)
    options = dict(
        n_blocks=2, n_factors=WIDTH, session_max_len=task.length, batch_size=task.batch,
        dropout_rate=task.dropout, loss="softmax", item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer,
    )  # fmt: skip
    if task.negatives:
        options |= dict(loss="sampled_softmax", n_negatives=task.negatives)
    if task.model == "bert4rec":
        model = BERT4RecModel(n_heads=2, mask_prob=MASKED, **options).fit(train)
    elif task.model == "sasrec":
        model = SASRecModel(n_heads=1, **options).fit(train)
    else:
        raise SystemExit(f"RecTools has no {task.model}")

    def ranks() -> Iterable[float]:
        last = {user: items[-1] for user, items in read(task.source)}
        lists = model.recommend(
            list(last), dataset(held_out=1), k=10, filter_viewed=task.seen == "exclude"
        )
        hits = lists[lists[Columns.Item] == lists[Columns.User].map(last)]
        found = dict(zip(hits[Columns.User], hits[Columns.Rank], strict=True))
        return [found.get(user, math.inf) for user in last]

    return Trained(clock, -(-train.user_id_map.size // task.batch), ranks)


def recbole(task: Task, folder: Path) -> Trained:
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model

    name = MODELS[task.model]
    if task.model == "gru4rec":
        sizes = dict(embedding_size=WIDTH, hidden_size=HIDDEN, num_layers=1)
        sizes |= dict(dropout_prob=task.dropout)
    else:
        sizes = dict(n_layers=2, n_heads=1 + (task.model == "bert4rec"), hidden_size=WIDTH)
        sizes |= dict(inner_size=4 * WIDTH, mask_ratio=MASKED)
        sizes |= dict(hidden_dropout_prob=task.dropout, attn_dropout_prob=task.dropout)
    if task.model in CONTRASTED:
        sizes |= dict(contrast="us_x", sim="dot", tau=1.0, lmd=0.1, lmd_sem=0.1, neg_sampling=None)
        sizes |= dict(training_neg_sample_num=0, hidden_act="gelu", layer_norm_eps=1e-12)
        sizes |= dict(initializer_range=0.02)
    (folder / "file").mkdir()
    with open(folder / "file" / "file.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, items in read(task.source):
            file.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(items))
    options = dict(
        data_path=str(folder), USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id",
        TIME_FIELD="timestamp", load_col={"inter": ["user_id", "item_id", "timestamp"]},
        MAX_ITEM_LIST_LENGTH=task.length, train_batch_size=task.batch, loss_type="CE",
        train_neg_sample_args=None, use_gpu=False,
        eval_args=dict(split={"LS": "valid_and_test"}, order="TO", mode="full"), **sizes,
    )  # fmt: skip
    config = Config(model=name, dataset="file", config_dict=options)
    train, _, test = data_preparation(config, create_dataset(config))
    model = get_model(name)(config, train.dataset).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    clock = Clock()
    epochs = itertools.chain.from_iterable(itertools.repeat(train))
    for batch in itertools.islice(epochs, task.steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model.calculate_loss(batch)  # RecBole-DA: and what it logs
        (loss[0] if isinstance(loss, tuple) else loss).backward()
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
    parser.add_argument("--model", choices=MODELS, default="bert4rec")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--length", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--negatives", type=int, default=0)
    parser.add_argument("--seen", choices=("none", "exclude"), default="none")
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps 2 at least: the first step is not counted")
    if options.negatives and options.package != "rectools":
        parser.error("--negatives is for rectools alone")
    if options.seen == "exclude" and options.package == "recbole":
        parser.error("--seen exclude is not for recbole")
    if options.evaluate and options.package == "recbole" and options.model in CONTRASTED:
        parser.error("--evaluate is not for RecBole-DA")
    task = Task(
        options.source.resolve(), options.model, options.steps, options.batch, options.length,
        options.dropout, options.negatives, options.seen,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # RecBole writes logs where it stands
        clock, batches, ranks = packages[options.package](task, Path(folder))
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
