# SPDX-License-Identifier: Apache-2.0
"""What tests build: small data sets, batches, models, loaders and recipes."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastrec.data.attributes import EncodedAttribute
from fastrec.data.batch import JaggedBatch, from_sequences
from fastrec.data.dataset import SequenceDataset
from fastrec.data.graph import SocialGraph
from fastrec.data.loader import SequenceLoader
from fastrec.data.pairs import Pairs
from fastrec.data.prepare.synthetic import generate
from fastrec.data.side import SideData
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask
from fastrec.data.views import Views
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.config import Recipe
from fastrec.training.fit import fit
from fastrec.training.module import StageModule
from fastrec.training.stage import Stage

AGE = EncodedAttribute("age", torch.tensor([0.5, -3.0, float("nan"), 1.0, 0.0, 0.25]))
CITY = EncodedAttribute("city", torch.tensor([0, 2, 1, -1, 2, 0]), ("a", "b", "c"))
#   0 - 1 - 2    3 - 4    5
GRAPH = SocialGraph.from_pairs(np.array([[0, 1], [1, 2], [3, 4]]), 6)


def dataset_of(sequences: list[list[int]], num_items: int) -> SequenceDataset:
    """A data set in memory, without user or item tables."""
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
    values = np.concatenate([np.array(s, dtype=np.int32) for s in sequences])
    schema = {
        "num_users": len(sequences),
        "num_items": num_items,
        "num_interactions": len(values),
    }
    dataset = SequenceDataset(Path("memory"), schema, values, offsets)
    dataset.__dict__["items_hash"] = "memory"  # there are no ids to hash
    return dataset


def jagged(lengths: list[int], num_items: int = 50, first_id: int = 0) -> JaggedBatch:
    """Random items in sequences of these lengths, keys from `first_id`."""
    values = iter(torch.randint(num_items, (sum(lengths),)).tolist())
    sequences = [[next(values) for _ in range(length)] for length in lengths]
    return from_sequences(sequences, range(first_id, first_id + len(lengths)))


def lists_of(batch: JaggedBatch, column: Tensor | None = None) -> list[list]:
    """The items of each sequence, or its part of a column of events."""
    rows = batch.values if column is None else column
    return [rows[a:b].tolist() for a, b in pairwise(batch.offsets.tolist())]


def tensors_of(batch: JaggedBatch) -> dict[str, Tensor]:
    """Every tensor of a batch by its name, those of columns and pairs too."""
    found: dict[str, Tensor] = {}

    def visit(name: str, value) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                visit(f"{name}.{key}", part)
        elif isinstance(value, tuple):
            for place, part in enumerate(value):
                visit(f"{name}.{place}", part)
        elif isinstance(value, Pairs):
            visit(name, vars(value))

    visit("batch", vars(batch))
    return found


def same(one: JaggedBatch, other: JaggedBatch) -> bool:
    """Whether two batches are equal in everything."""
    ours, theirs = tensors_of(one), tensors_of(other)
    return (
        ours.keys() == theirs.keys()
        and one.max_seq_len == other.max_seq_len
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def six_users() -> SequenceDataset:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(20, size=n).tolist() for n in (5, 9, 6, 7, 12, 3)]
    return dataset_of(sequences, 20)


class Known(SideData):
    """Side data whose attributes and friendships are given."""

    def __init__(self, dataset, attributes=(), graph=None, split: str = "train", profiles=None):
        super().__init__(dataset, split)
        self.attributes, self.encoded = list(attributes), list(attributes)
        self.graph, self.profile_ids = graph, profiles


def model_of(dropout: float = 0.3, num_items: int = 20, num_users: int = 0, **config) -> UserModel:
    """A tiny model; `layers`, `heads`, `causal`, `pre_norm`, `layer` are the transformer's."""
    torch.manual_seed(1)
    names = ("layers", "heads", "causal", "pre_norm", "ffn_width", "norm_eps", "layer")
    names += ("patch", "patch_form")
    inner = {name: config.pop(name) for name in names if name in config}
    settings = {"width": 8, "max_len": 10, **config}
    return UserModel(
        num_items,
        ModelConfig(dropout=dropout, encoder=Transformer(**{"layers": 1, **inner}), **settings),
        num_users,
    )


# The forms of a transformer.
FORMS = {
    "post_norm": {},
    "pre_norm": {"pre_norm": True},
    "sasrec": {"pre_norm": True, "layer": "sasrec"},
    "ligr": {"pre_norm": True, "layer": "ligr"},
}


def social_side(split: str = "train") -> Known:
    """Six users with age, city and three friendships."""
    return Known(six_users(), [AGE, CITY], GRAPH, split)


# UPRec's pre-training: the views of `social_side` and what reads them.
SOCIAL_VIEWS = {"main": [Friend(hops=2, same_profile=False), Mask()]}
JOINT = {
    "item": Item(),
    "user_attributes": UserAttributes(weight=0.3),
    "friends": Friends(weight=0.5),
}


def loader_of(model: UserModel, views: dict[str, list], side: SideData, **changes):
    """The loader of a model over `side`'s data set, six users a batch."""
    made = Views(views, model.frame, side, model.config.max_len)
    return SequenceLoader(made, **{"batch_size": 6, **changes})


MODEL = ModelConfig(
    width=16,
    dropout=0.3,
    max_len=12,
    tokens=["cls", "sep"],
    encoder=Transformer(layers=1),
)


def recipe(**stage) -> Recipe:
    """A short pre-training on masked items, all items ranked."""
    defaults = dict(
        views={"main": [Mask()]},
        objectives=Objectives(item=Item()),
        steps=30,
        batch_size=64,
        validate_every=10,
        checkpoint_every=7,
    )
    return Recipe(model=MODEL, pretraining=Stage(**{**defaults, **stage}))


def run(data: Path, output: Path, chosen: Recipe | None = None, **kwargs) -> UserModel:
    """Train a stage of a recipe on the data set in `data`."""
    dataset = SequenceDataset.load(data)
    return fit(dataset, recipe=chosen or recipe(), output=output, progress=False, **kwargs)


def cold_stage(**settings) -> Stage:
    """A stage that trains for items of another catalogue."""
    return Stage(
        **{
            "views": {"main": []},
            "objectives": Objectives(cold_start=ColdStart(pool="max")),
            "judge": "cold_start",
            "steps": 6, "batch_size": 100, "validate_every": 3, "checkpoint_every": 2,
            **settings,
        }
    )  # fmt: skip


def synthetic(folder: Path, **changes) -> Path:
    """Writes a small data set with attributes and relations into `folder`/data."""
    generate(folder / "data", **{"num_users": 400, "num_items": 150, "seed": 3, **changes})
    return folder / "data"


def command(*arguments) -> list[str]:
    """The command line of a process that runs `fastrec`."""
    return [sys.executable, "-m", "fastrec", *map(str, arguments)]


# `recipe()` with the three objectives of UPRec, as flags, for runs that are killed.
FLAGS = [
    "--config=uprec", "--model.width=16", "--model.encoder.transformer.layers=1",
    "--model.dropout=0.3", "--model.max_len=12", "--pretraining.steps=300",
    "--pretraining.batch_size=64", "--pretraining.validate_every=100",
    "--pretraining.checkpoint_every=20", "--evaluation.candidates=full",
]  # fmt: skip


class Killed(Exception):
    pass


def killed_at(monkeypatch, hook: str, step: int) -> None:
    """Every later call of `hook` of the training module raises from this global step on."""
    original = getattr(StageModule, hook)

    def dies(self, *args):
        if self.global_step >= step:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(StageModule, hook, dies)


def assert_same_weights(first: Path, second: Path) -> None:
    """The last steps of two runs have the same weights, bit for bit, and so have their models."""
    expected, other = trained_weights(first), trained_weights(second)
    assert expected.keys() == other.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
    best, again = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert best.keys() == again.keys()
    for name, value in best.items():
        assert torch.equal(value, again[name]), name


def trained_weights(folder: Path) -> dict[str, Tensor | int]:
    """The weights after the last step of a run, from the checkpoint to resume from."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    return {"step": state["global_step"], **state["state_dict"]}
