# SPDX-License-Identifier: Apache-2.0
"""Cold-start rows: what users of a data set took of another catalogue. A user with g items there
has g rows, each the whole history here and one item there (CLUE, Cheng et al., 2021, section V-A).

Legend: R rows, U users, V items of the other catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastrec.data.batch import JaggedBatch
from fastrec.data.dataset import SequenceDataset, hash_of
from fastrec.data.dataset_files import COLD_ITEMS_FILE
from fastrec.data.errors import DataError
from fastrec.data.settings import check_fields


@dataclass(frozen=True)
class ColdItems:
    """Which rows (user, item of another catalogue) train, validate and test.

    Attributes:
        valid, test: shares of the rows, drawn at random; the rest trains.
        by: "row" draws rows: a user may train and test; "user" draws users with all their rows.
        fraction: of the training rows that are used. The rows of a fraction are among those of
            every larger one; validation and test stay.
        seed: of the draw.
    """

    valid: float = 0.05
    test: float = 0.15
    by: Literal["row", "user"] = "row"
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        for name in ("valid", "test"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"cold_items.{name} must be in (0, 1), got {getattr(self, name)}")
        if self.valid + self.test >= 1:
            raise ValueError(
                f"cold_items.valid + cold_items.test must be below 1, got {self.valid} +"
                f" {self.test}: no row would train"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"cold_items.fraction must be in (0, 1], got {self.fraction}")

    @property
    def held_out(self) -> dict:
        """What decides which rows test."""
        return {"valid": self.valid, "test": self.test, "by": self.by, "seed": self.seed}


class ColdRows:
    """The cold-start rows of a data set, as a data set whose "users" are the rows: a loader gives
    each row once an epoch, with a key and so with a dropout of its own.

    owners, items: int64 [R], the user of each row, and its item of the other catalogue.
    ids: [V], the original ids of that catalogue.

    Raises DataError for a data set without such rows.
    """

    def __init__(self, dataset: SequenceDataset):
        table = dataset.cold_items()
        if table is None:
            raise DataError(
                dataset.path / COLD_ITEMS_FILE, "file is missing: prepare the data set with"
                " --cold_items FILE, user and item of the other catalogue",
            )  # fmt: skip
        self.dataset, self.path = dataset, dataset.path
        columns = (table[name].to_numpy() for name in ("user", "item"))
        self.owners, self.items = (torch.tensor(column, device="cpu") for column in columns)
        listed = table.unique("item").sort("item")
        if not np.array_equal(listed["item"].to_numpy(), np.arange(listed.height)):
            raise DataError(
                dataset.path / COLD_ITEMS_FILE, "items do not count from 0", column="item"
            )
        self.ids = listed["item_id"].to_numpy()
        self.ids_hash = hash_of(self.ids)

    @property
    def num_users(self) -> int:
        """R."""
        return len(self.owners)

    @property
    def num_items(self) -> int:
        """Of the data set, which are the input."""
        return self.dataset.num_items

    @property
    def num_cold_items(self) -> int:
        """V."""
        return len(self.ids)

    def gather(
        self, rows, split: str, max_len: int | None = None, columns: Sequence[str] = ()
    ) -> JaggedBatch:
        """The histories of the users of `rows`, int64 [B], whose keys are the rows."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
        batch = self.dataset.gather(self.owners[rows], split, max_len, columns)
        return replace(batch, keys=rows.clone())

    def users(self, split: str) -> np.ndarray:
        """int64: the rows whose user has an event in `split`."""
        return np.flatnonzero(np.isin(self.owners.numpy(), self.dataset.users(split)))

    def split(self, how: ColdItems) -> dict[str, Tensor]:
        """int64, ascending: the rows of "train", "valid" and "test".

        Raises ValueError where one of them is empty.
        """
        generator = torch.Generator().manual_seed(how.seed)
        people, owner = self.owners.unique(return_inverse=True)
        units = len(self.owners) if how.by == "row" else len(people)
        order = torch.randperm(units, generator=generator, device="cpu")
        tested, validated = round(units * how.test), round(units * how.valid)
        rest = order[tested + validated :]
        chosen = {
            "train": rest[: round(len(rest) * how.fraction)],
            "valid": order[tested : tested + validated],
            "test": order[:tested],
        }
        parts = {}
        for name, drawn in chosen.items():
            rows = drawn if how.by == "row" else torch.isin(owner, drawn).nonzero().squeeze(1)
            if len(rows) == 0:
                raise ValueError(
                    f"cold_items leaves no row for {name}: there are {len(self.owners)} rows of"
                    f" {len(people)} users"
                )
            parts[name] = rows.sort().values
        return parts
