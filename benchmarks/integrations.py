# SPDX-License-Identifier: Apache-2.0
"""Training steps and evaluation of other libraries without and with `fastrec.patch`.

    python benchmarks/integrations.py recbole --model sasrec --source Beauty.txt
    python benchmarks/integrations.py rectools --model sasrec --source Beauty.txt
    python benchmarks/integrations.py replay --source Beauty.txt
    python benchmarks/integrations.py transformers

Run each with the Python that has the library. Original and patched steps alternate in one process,
from batches that follow one another. Prints medians, in seconds of CPU time: a step is the batch,
forward, backward and optimiser, an epoch that times the number of steps.

    recbole         2 layers, 2 heads, D = 64, F = 256, dropout 0.5, length 50, batch 2048 (its
                    defaults); evaluation: 4,096 users, all items ranked, the best 10 found
    rectools        2 layers, 2 heads, D = 64, dropout 0.2, length 50, batch 256
    replay          2 layers, 2 heads, D = 64, dropout 0.3, length 50, batch 256; evaluation: 4,096
                    users, the best 10 items that they have not seen, metrics of these
    transformers    BertForMaskedLM of 2 layers and D = 128, 16 texts of 128 tokens; of 4 layers
                    and D = 256; 15 % of 30,522 tokens masked

`source`: a line a user, `user item item ...`, oldest first; the last two items are held out.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import fastrec


def alternate(library: str, work: Callable[[], object], rounds: int) -> dict[bool, list[float]]:
    """CPU seconds of `work` without and with the patch, one round more than `rounds`."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds + 1):
        for patched, times in spent.items():
            with fastrec.patch(library) if patched else contextlib.nullcontext():
                start = time.process_time()
                work()
                times.append(time.process_time() - start)
    return spent


def alternate_steps(library: str, base: type) -> tuple[object, dict[bool, list[float]]]:
    """A Lightning callback that patches every second step of a training, and the CPU seconds of
    the steps without and with the patch. A step is all from the end of the one before, as its batch
    is fetched before Lightning says that the step starts."""
    spent: dict[bool, list[float]] = {False: [], True: []}

    class Alternate(base):
        def on_train_start(self, trainer, module):
            self.begin()

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            spent[self.patched].append(time.process_time() - self.start)
            self.begin()

        def begin(self):
            self.patched = len(spent[False]) > len(spent[True])
            (fastrec.patch if self.patched else fastrec.unpatch)(library)
            self.start = time.process_time()

    return Alternate(), spent


def say(what: str, spent: dict[bool, list[float]], times: int) -> None:
    """Medians without the first round, `times` of them."""
    plain, fused = (times * median(seconds[1:]) for seconds in spent.values())
    print(f"{what}: {plain:.3g} s, patched {fused:.3g} s, {plain / fused:.1f} times", flush=True)


def show(what: str, library: str, work: Callable[[], object], rounds: int, times: int = 1) -> None:
    say(what, alternate(library, work, rounds), times)


def recbole(options: argparse.Namespace) -> None:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model import sequential_recommender
    from recbole.trainer import Trainer

    folder = Path.cwd()
    (folder / "file").mkdir()
    with open(folder / "file" / "file.inter", "w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for line in options.source.open():
            user, *items = line.split()
            file.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(items))
    settings = dict(
        data_path=str(folder), USER_ID_FIELD="user_id", ITEM_ID_FIELD="item_id",
        TIME_FIELD="timestamp", load_col={"inter": ["user_id", "item_id", "timestamp"]},
        MAX_ITEM_LIST_LENGTH=options.length, train_batch_size=2048, eval_batch_size=4096,
        loss_type="CE", train_neg_sample_args=None, use_gpu=False, topk=[10],
        eval_args=dict(split={"LS": "valid_and_test"}, order="TO", mode="full"),
    )  # fmt: skip
    name = {"sasrec": "SASRec", "bert4rec": "BERT4Rec"}[options.model]
    sys.argv = sys.argv[:1]  # RecBole reads them
    config = Config(model=name, dataset="file", config_dict=settings)
    train, _, test = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, getattr(sequential_recommender, name)(config, train.dataset))
    model, optimizer = trainer.model.train(), trainer.optimizer
    batches = iter(train)

    def step() -> None:
        optimizer.zero_grad()
        model.calculate_loss(next(batches)).backward()
        optimizer.step()

    show(f"{name}, epoch", "recbole", step, options.rounds, len(train))
    model.eval()
    trainer.tot_item_num = model.n_items
    users = next(iter(test))

    @torch.no_grad()
    def evaluate() -> None:
        interaction, scores, *positive = trainer._full_sort_batch_eval(users)
        trainer.eval_collector.eval_batch_collect(scores, interaction, *positive)
        trainer.eval_collector.get_data_struct()

    show(f"{name}, evaluation of {len(users[0])} users", "recbole", evaluate, options.rounds)


def rectools(options: argparse.Namespace) -> None:
    import pandas as pd
    import pytorch_lightning as pl
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel, SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    rows = [
        (user, item, 1.0, place)
        for user, *items in map(str.split, options.source.open())
        for place, item in enumerate(items[:-2])
    ]
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    frame = pd.DataFrame(rows, columns=names)
    days = pd.to_timedelta(frame[Columns.Datetime], unit="D")
    frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + days
    dataset = Dataset.construct(frame)
    callback, spent = alternate_steps("rectools", pl.Callback)

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_steps=2 * options.rounds + 2, accelerator="cpu", callbacks=[callback],
            logger=False, enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip

    kind = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}[options.model]
    kind(
        n_blocks=2, n_heads=2, n_factors=64, session_max_len=options.length, batch_size=256,
        dropout_rate=0.2, loss="softmax", item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer,
    ).fit(dataset)  # fmt: skip
    fastrec.unpatch()
    steps = -(-dataset.user_id_map.size // 256)
    say(f"{kind.__name__.removesuffix('Model')}, epoch", spent, steps)


def replay(options: argparse.Namespace) -> None:
    import lightning
    import polars
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
    from replay.nn.lightning import LightningModule
    from replay.nn.lightning.callback import ComputeMetricsCallback
    from replay.nn.lightning.postprocessor import SeenItemsFilter
    from replay.nn.sequential import SasRec
    from replay.nn.transform.template import make_default_sasrec_transforms

    histories = [[int(item) - 1 for item in line.split()[1:]] for line in options.source.open()]
    items = 1 + max(map(max, histories))
    trained = [history[:-2] for history in histories]
    columns = {
        "item_id": trained,
        "seen_ids": trained,
        "ground_truth": [h[-2:-1] for h in histories],
    }
    polars.DataFrame(columns).write_parquet("file.parquet")
    size, longest = options.length, max(map(len, trained))
    shapes = {"item_id": size, "seen_ids": longest, "ground_truth": 1}
    schema = TensorSchema(
        TensorFeatureInfo(
            "item_id", FeatureType.CATEGORICAL, is_seq=True, feature_hint=FeatureHint.ITEM_ID,
            cardinality=items, padding_value=items, embedding_dim=64,
        )
    )  # fmt: skip
    data = ParquetModule(
        batch_size={"train": 256, "validate": 512},
        metadata={
            "train": {"item_id": {"shape": size + 1, "padding": items}},
            "validate": {n: {"shape": k, "padding": items} for n, k in shapes.items()},
        },
        transforms=make_default_sasrec_transforms(schema),
        train_path="file.parquet",
        validate_path="file.parquet",
    )
    model = LightningModule(
        SasRec.from_params(
            schema, embedding_dim=64, num_heads=2, num_blocks=2, max_sequence_length=size
        )
    )
    settings = dict(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback, spent = alternate_steps("replay", lightning.Callback)
    lightning.Trainer(
        max_steps=2 * options.rounds + 2, callbacks=[callback], limit_val_batches=0, **settings
    ).fit(model, data)
    fastrec.unpatch()
    say("SasRec, epoch", spent, -(-len(histories) // 256))

    found = []

    def evaluate() -> None:
        metrics = ComputeMetricsCallback(
            ["ndcg", "recall"], [10], postprocessors=[SeenItemsFilter(items)], verbose=False
        )
        trainer = lightning.Trainer(limit_val_batches=8, callbacks=[metrics], **settings)
        found.extend(trainer.validate(model, data, verbose=False))

    show("SasRec, evaluation of 4096 users", "replay", evaluate, options.rounds)
    print("metrics:", *found[-2:])


def transformers(options: argparse.Namespace) -> None:
    masked_language_model(2, 128, options.rounds)
    masked_language_model(4, 256, options.rounds)


def masked_language_model(layers: int, width: int, rounds: int) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # fmt: skip
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(1000, config.vocab_size, (16, 128))
    labels = ids.where(torch.rand(ids.shape) < 0.15, -100)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    show(f"BertForMaskedLM, {layers} layers of {width}, step", "transformers", step, rounds)


def main() -> None:
    libraries = {
        "recbole": recbole, "rectools": rectools, "replay": replay, "transformers": transformers
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=libraries)
    parser.add_argument("--source", type=Path, help="of all but transformers")
    parser.add_argument(
        "--model", choices=("sasrec", "bert4rec"), default="sasrec", help="replay has sasrec alone"
    )
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.package != "transformers":
        if options.source is None:
            parser.error(f"{options.package} needs --source")
        options.source = options.source.resolve()
    warnings.filterwarnings("ignore", module="(?!fastrec)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # libraries write logs where they stand
        libraries[options.package](options)


if __name__ == "__main__":
    main()
