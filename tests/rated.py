# SPDX-License-Identifier: Apache-2.0
"""A small data set of rated items, its batches and a model of them."""

from dataclasses import replace

import numpy as np
from builders import dataset_of, model_of

from fastrec.data.dataset import SequenceDataset
from fastrec.nn.item_parts import Rating as Levels
from fastrec.nn.items import Items
from fastrec.nn.user_model import UserModel

V = 20
LENGTHS = (5, 9, 6, 7, 12, 3)


def rated(lengths=LENGTHS, missing: float = 0.2, seed: int = 0) -> SequenceDataset:
    """A data set in memory with ratings 1 to 5, some missing; of user 2 all."""
    generator = np.random.default_rng(seed)
    dataset = dataset_of([generator.integers(V, size=n).tolist() for n in lengths], V)
    ratings = generator.integers(1, 6, size=sum(lengths)).astype(np.float32)
    ratings[generator.random(len(ratings)) < missing] = np.nan
    if missing and len(lengths) > 2:
        ratings[dataset.offsets[2] : dataset.offsets[3]] = np.nan
    dataset._event_columns["rating"] = ratings
    return dataset


def rating_model(**config) -> UserModel:
    settings = {"dropout": 0.0, "items": Items(rating=Levels(width=4)), **config}
    return model_of(num_items=V, **settings)


def batch_of(dataset, users=(0, 1, 2, 3, 4, 5), view: int = 0):
    batch = dataset.gather(list(users), "all", columns=["rating"])
    return replace(batch, keys=batch.keys | view << 32)
