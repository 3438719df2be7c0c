"""Training steps of BERT4Rec on one file in fastrec, RecTools and RecBole, and what an epoch takes.

    python benchmarks/epoch.py fastrec  --source Yelp.txt --steps 20
    python benchmarks/epoch.py rectools --source Yelp.txt --steps 5
    python benchmarks/epoch.py recbole  --source Yelp.txt --steps 5

The libraries cannot share an environment: run each with the Python that has it; no other is
imported. The same model everywhere: 2 layers, 2 heads, D = 64, the last 30 items, dropout 0.5, a
fifth of the items masked, softmax over all items, Adam, 256 sequences a step. What is an epoch is
the library's choice: fastrec and RecTools see every user once, RecBole one sequence for every
prefix. Prints the median time of a step (batch, forward, backward, optimiser) without the first.

`source`: a line a user, `user item item ...`, oldest first; the last two items are held out.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

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


def fastrec(source: Path, steps: int, folder: Path) -> tuple[Clock, int]:
    import torch

    from fastrec.data.dataset import SequenceDataset
    from fastrec.data.loader import SequenceLoader
    from fastrec.data.prepare import prepare
    from fastrec.nn.user_model import ModelConfig, UserModel
    from fastrec.objectives.joint import JointObjective, Objectives, total_loss
    from fastrec.objectives.masked_item import Masking

    prepare(source, folder / "data", format="s3rec")
    dataset = SequenceDataset.load(folder / "data")
    config = ModelConfig(width=WIDTH, max_len=LENGTH, dropout=DROPOUT, use_cls=False, use_sep=False)
    model = UserModel(dataset.num_items, config)
    joint, masking = JointObjective(Objectives(), model, []), Masking(probability=MASKED)
    loader = SequenceLoader(dataset, "train", batch_size=BATCH, max_len=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    clock = Clock()
    for step in range(steps):
        batch = loader.batch_at(step)
        optimizer.zero_grad(set_to_none=True)
        total_loss(joint(model, batch, masking, 0, step)).backward()
        optimizer.step()
        clock.tick()
    return clock, len(loader)


def rectools(source: Path, steps: int, folder: Path) -> tuple[Clock, int]:
    import pandas as pd
    import pytorch_lightning as pl
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    rows = [
        (user, item, 1.0, place)
        for user, items in read(source)
        for place, item in enumerate(items[:-2])
    ]
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    frame = pd.DataFrame(rows, columns=names)
    days = pd.to_timedelta(frame[Columns.Datetime], unit="D")
    frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + days
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

    BERT4RecModel(
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
    ).fit(Dataset.construct(frame))
    return clock, -(-frame[Columns.User].nunique() // BATCH)


def recbole(source: Path, steps: int, folder: Path) -> tuple[Clock, int]:
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
    train, *_ = data_preparation(config, create_dataset(config))
    model = BERT4Rec(config, train.dataset).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    clock = Clock()
    for _, batch in zip(range(steps), train, strict=False):
        optimizer.zero_grad(set_to_none=True)
        model.calculate_loss(batch).backward()
        optimizer.step()
        clock.tick()
    return clock, len(train)


def main() -> None:
    packages = {"fastrec": fastrec, "rectools": rectools, "recbole": recbole}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=packages)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    source = options.source.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # RecBole writes logs where it stands
        clock, batches = packages[options.package](source, options.steps, Path(folder))
    wall, process = (median(times) for times in zip(*clock.steps[1:], strict=True))
    print(
        f"{options.package}: {wall:.3f} s a step ({process:.3f} s of CPU), {batches} steps an"
        f" epoch, {batches * wall:,.0f} s an epoch"
    )


if __name__ == "__main__":
    main()
