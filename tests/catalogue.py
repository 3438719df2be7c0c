# SPDX-License-Identifier: Apache-2.0
"""A small catalogue with attributes, ratings and times, and a model of it."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import torch

from fastrec.cli import main
from fastrec.data.item_categories import item_categories
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.item_parts import ItemAttribute, Rating, TimeGap
from fastrec.nn.items import Items
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel

V = 30
GENRES = {"drama": 0, "noir": 1, "opera": 2, "war": 3}
PARTS = Items(
    attributes={"genres": ItemAttribute(width=3, most=2), "brand": ItemAttribute(width=5, most=1)},
    rating=Rating(1, 5, 0.5, width=4),
    time_gap=TimeGap(width=6),
)
COLUMNS = ["rating", "time_gap"]


def raw_rows() -> list[tuple[int, int, int, float]]:
    """(user, item, second, rating) in no order: 61 users, gaps from 0 to months, equal times."""
    generator = np.random.default_rng(4)
    rows = []
    for user in range(60):
        second = int(generator.integers(10**9, 2 * 10**9))
        for _ in range(int(generator.integers(2, 16))):
            item = int(generator.integers(V))
            rows.append((user, item, second, float(generator.integers(2, 11)) / 2))
            second += int(2 ** generator.uniform(0, 24)) - 1
    rows += [(60, item, 7 + item, 3.0) for item in range(V)]  # every item has an event
    return [rows[place] for place in generator.permutation(len(rows))]


def raw_items() -> dict[int, tuple[list[str] | None, str | None]]:
    """(genres, brand) by item."""
    generator, found = np.random.default_rng(5), {}
    for item in range(V):
        names = generator.permutation(list(GENRES))[: generator.integers(0, 4)].tolist()
        found[item] = (names or None, [None, "acme", "zeta"][int(generator.integers(3))])
    return found


def catalogue(folder: Path) -> Path:
    """A data set with times, ratings and attributes of items, prepared from csv."""
    table = pl.DataFrame(raw_rows(), schema=["u", "i", "at", "stars"], orient="row")
    table.write_csv(folder / "log.csv")
    items = raw_items()
    pl.DataFrame(
        {
            "item_id": list(items),
            "genres": [genres for genres, _ in items.values()],
            "brand": [brand for _, brand in items.values()],
            "price": [float(item) for item in items],
        },
    ).write_parquet(folder / "items.parquet")
    main(
        ["prepare", f"--source={folder / 'log.csv'}", f"--output={folder / 'data'}",
         "--format=table", "--user_column=u", "--item_column=i", "--timestamp_column=at",
         "--rating_column=stars", f"--item_attributes={folder / 'items.parquet'}",
         "--on_duplicate=keep"]
    )  # fmt: skip
    return folder


def model_with(dataset, items: Items = PARTS, num_items: int = V, **config) -> UserModel:
    torch.manual_seed(2)
    encoder = config.pop("encoder", Transformer(layers=1))
    settings = ModelConfig(**{"width": 8, "max_len": 10, "dropout": 0.3, **config}, items=items,
                           encoder=encoder)  # fmt: skip
    return UserModel(num_items, settings, item_features=item_categories(dataset, items.most))


def events_of(user: int) -> list[tuple]:
    """(item, rating, gap) of a user, in time order, from the raw rows."""
    rows = sorted((r for r in raw_rows() if r[0] == user), key=lambda row: row[2])
    befores = [None, *rows]
    return [
        (row[1], row[3], math.nan if before is None else float(row[2] - before[2]))
        for before, row in zip(befores, rows, strict=False)
    ]


def summed(scale: bool = False) -> Items:
    return Items(
        scale=scale, combine="sum", attributes={"genres": ItemAttribute(8)}, rating=Rating(width=8),
        time_gap=TimeGap(8),
    )  # fmt: skip
