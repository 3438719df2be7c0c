# SPDX-License-Identifier: Apache-2.0
"""`fastrec demo`: from nothing to a table that shows what pre-training gives."""

import time
from pathlib import Path

from fastrec.bench import bench
from fastrec.data.dataset import SequenceDataset
from fastrec.data.output import locked, remove_folder
from fastrec.data.steps.mask import Mask, MaskLast
from fastrec.data.steps.parts import Step
from fastrec.evaluation.metrics import ranking_metrics
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.report import plot_by_length, plot_losses, print_metrics
from fastrec.nn.model_config import ModelConfig
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.training.config import Recipe
from fastrec.training.stage import Stage
from fastrec.training.stage_data import select_users

# Full ranking: on synthetic data there is no published table of sampled metrics to compare with.
RECIPE = Recipe(
    model=ModelConfig(dropout=0.2, tokens=["cls", "sep"]),
    pretraining=Stage(
        views={"main": [Step(mask=Mask(share=0.3))]},
        objectives=Objectives(item=Item()),
        steps=800,
        batch_size=256,
        learning_rate=3e-3,
        schedule="linear",
        warmup_steps=50,
        validate_every=200,
        devices=1,  # the plots and the table are made once
    ),
    recommendation=Stage(
        views={"main": [Step(mask_last=MaskLast())]},
        objectives=Objectives(item=Item()),
        steps=500,
        batch_size=256,
        learning_rate=2e-3,
        schedule="linear",
        validate_every=100,
        devices=1,
    ),
)


def demo(output: Path = Path("demo"), users: int = 10000, items: int = 5000, seed: int = 0):
    """Generate a data set, pre-train, fine-tune, evaluate; print one table and write plots.

    Args:
        output: folder for the data set, the runs and the plots; its content is replaced.
        users: number of synthetic users.
        items: number of synthetic items.
        seed: of the generator.
    """
    with locked(output):
        _demo(output, users, items, seed)


def _demo(output: Path, users: int, items: int, seed: int) -> None:
    from fastrec.data.prepare.synthetic import generate  # polars: other commands begin without it
    from fastrec.training.fit import fit  # Lightning, 3 s: `fastrec --help` does without it

    start = time.perf_counter()
    _replace(output)
    print(f"1/5 synthetic data set: {users} users, {items} items")
    generate(output / "data", num_users=users, num_items=items, seed=seed)
    dataset = SequenceDataset.load(output / "data")

    print("2/5 pre-training: masked item prediction")
    pretrained = fit(dataset, recipe=RECIPE, output=output / "pretrain")
    print("3/5 fine-tuning the pre-trained model: the last item masked")
    finetuned = fit(
        dataset, pretrained, output=output / "finetune", recipe=RECIPE, stage="recommendation"
    )
    print("4/5 the same fine-tuning from random weights")
    scratch = fit(dataset, recipe=RECIPE, stage="recommendation", output=output / "scratch")

    print("5/5 evaluation on the last item of each user, all items ranked")
    chosen = select_users(dataset, RECIPE.users)
    judge = NextItemJudge(dataset, chosen, "test", RECIPE.evaluation)
    ranks = {
        "popularity": judge.popularity_ranks(),
        "fine-tuned from scratch": judge.ranks(scratch),
        "pre-trained + fine-tuned": judge.ranks(finetuned),
    }
    print_metrics({name: ranking_metrics(values) for name, values in ranks.items()})
    bench(rounds=2)
    plot_losses(
        {
            "pre-training": output / "pretrain",
            "fine-tuning": output / "finetune",
            "from scratch": output / "scratch",
        },
        output / "loss.png",
    )
    lengths = dataset.split_lengths("test")[chosen.numpy()]
    plot_by_length(
        lengths, {name: values.numpy() for name, values in ranks.items()}, output / "length.png"
    )
    print(f"plots: {output / 'loss.png'}, {output / 'length.png'}")
    print(f"total {time.perf_counter() - start:.0f} s")


def _replace(output: Path) -> None:
    marker = output / ".fastrec-demo"
    if output.is_dir() and any(output.iterdir()) and not marker.exists():
        raise FileExistsError(f"{output} holds something else; choose another folder")
    if output.is_dir():
        remove_folder(output)
    output.mkdir(parents=True)
    marker.touch()
