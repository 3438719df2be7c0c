# SPDX-License-Identifier: Apache-2.0
"""User attributes as training targets: numbers standardised, categories as class indices.

Legend: U users.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastrec.data.errors import DataError

FEW = 50  # an integer column with at most so many values is a category, unless it is said to be not
MANY = 1000  # more classes than this must be asked for


@dataclass(frozen=True)
class Attribute:
    """A column of users.parquet that a model predicts.

    Attributes:
        name: of the column.
        kind: "numeric" or "discrete"; None takes floats as numeric, text as discrete, integers as
            discrete up to 50 distinct values.
        log: predict log(1 + x) of a number.
        bins: ascending edges that make classes of a number: x is in class #(edges <= x).
        top: keep the most frequent values as classes, all others are one class more.
        range: (low, high) of a number, with `log` still of the column itself: squared errors are
            reported as if what is predicted went from 0 to 1 there.
    """

    name: str
    kind: Literal["numeric", "discrete"] | None = None
    log: bool = False
    bins: list[float] | None = None
    top: int | None = None
    range: tuple[float, float] | None = None

    def __post_init__(self):
        if self.range is not None and not _ascend(self.range):
            raise ValueError(f"attribute {self.name!r}: range must ascend, got {self.range}")
        if self.bins is not None and (not self.bins or not _ascend(self.bins)):
            raise ValueError(f"attribute {self.name!r}: bins must ascend, got {self.bins}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"attribute {self.name!r}: top must be at least 1, got {self.top}")
        classes = "bins" if self.bins is not None else "top" if self.top is not None else None
        classes = "kind: discrete" if self.kind == "discrete" and classes is None else classes
        for key, on in (("log", self.log), ("range", self.range is not None)):
            if on and classes:
                raise ValueError(f"attribute {self.name!r}: {key} has no effect beside {classes}")
        if self.bins is not None and self.top is not None:
            raise ValueError(f"attribute {self.name!r}: top has no effect beside bins")
        if self.log and self.range is not None and self.range[0] <= -1:
            raise ValueError(
                f"attribute {self.name!r}: with log its range must begin above -1, got {self.range}"
            )


def _ascend(numbers) -> bool:
    return bool(np.isfinite(numbers).all()) and all(low < high for low, high in pairwise(numbers))


@dataclass(frozen=True, eq=False)
class EncodedAttribute:
    """Targets of one attribute for all users.

    values: float32 [U] with mean 0 and variance 1 over the training users, NaN where missing; or
        int64 [U] class indices, -1 where missing.
    labels: the classes; empty for a numeric attribute.
    mean, std: what was subtracted and divided by.
    unit: a squared error of `values` times unit^2 is the one that is reported.
    """

    name: str
    values: Tensor
    labels: tuple = ()
    mean: float = 0.0
    std: float = 1.0
    unit: float = 1.0

    @property
    def scale(self) -> dict:
        """What a prediction stands for, as it is stored beside trained heads."""
        labels = [str(label) for label in self.labels]
        return {"name": self.name, "labels": labels, "mean": self.mean, "std": self.std}

    @property
    def outputs(self) -> int:
        """Width of the prediction: 1, or the number of classes."""
        return len(self.labels) or 1

    def without(self, users: Tensor) -> "EncodedAttribute":
        """The same with the values of these users missing."""
        return replace(self, values=self.values.index_fill(0, users, missing_value(self.values)))

    def known(self, users) -> Tensor:
        """bool [N]: which of the users have a value."""
        values = self.values[torch.as_tensor(users, device="cpu")]
        return values >= 0 if self.labels else ~values.isnan()


def missing_value(values: Tensor) -> float:
    """What stands in a column of encoded values where a user has none."""
    return float("nan") if values.is_floating_point() else -1


def encode_attributes(dataset, attributes, users) -> list[EncodedAttribute]:
    """Encode columns of users.parquet; classes, means and deviations come from `users` alone.

    attributes: list of Attribute; an empty one takes every column with a kind (see Attribute).
    users: int64, the training users. A category that none of them has is missing for the others.

    Raises DataError that names the column: missing, of an unusable type, infinite, constant or
    empty over `users`, too many classes.
    """
    frame, file = dataset.user_attributes(), dataset.path / "users.parquet"
    columns = [name for name in frame.columns if name not in ("user", "user_id")]
    chosen = list(attributes) or [Attribute(name) for name in columns]
    if not chosen:
        raise DataError(
            file, "has no attributes: prepare the data set with --user_attributes, or leave out"
            " the objective user_attributes",
        )  # fmt: skip
    users = np.asarray(users)
    encoded = []
    for attribute in chosen:
        name = attribute.name
        if name not in columns:
            raise DataError(file, f"column is missing; the attributes are {columns}", column=name)
        column = frame[name]
        if _kind(attribute, column, file) == "numeric" or attribute.bins is not None:
            numbers = _numbers(column, attribute, file)
            if attribute.bins is None:
                encoded.append(_standardised(numbers, attribute, users, file))
            else:
                encoded.append(_binned(numbers, attribute))
        else:
            if attribute.range is not None:
                raise DataError(
                    file, "holds classes, for which range has no effect: kind: numeric",
                    column=name,
                )  # fmt: skip
            encoded.append(_classes(column, attribute, users, file))
    return encoded


def profile_ids(attributes: list[EncodedAttribute]) -> np.ndarray | None:
    """int64 [U]: equal for users with the same classes in every discrete attribute, -1 for users
    who miss one; None without discrete attributes."""
    discrete = [attribute.values.numpy() for attribute in attributes if attribute.labels]
    if not discrete:
        return None
    rows = np.stack(discrete, axis=1)
    _, ids = np.unique(rows, axis=0, return_inverse=True)
    return np.where((rows >= 0).all(axis=1), ids.reshape(-1), -1)


def _kind(attribute: Attribute, column, file) -> str:
    numeric = column.dtype.is_numeric()
    if column.dtype.is_nested():
        raise DataError(
            file, f"{column.dtype} cannot be predicted; list the attributes that can",
            column=attribute.name,
        )  # fmt: skip
    if attribute.kind is not None:
        if attribute.kind == "numeric" and not numeric:
            raise DataError(file, f"is {column.dtype}, not numeric", column=attribute.name)
        return attribute.kind
    if attribute.top is not None:
        return "discrete"
    if column.dtype.is_float() or attribute.log:
        return "numeric"
    return "numeric" if numeric and column.drop_nulls().n_unique() > FEW else "discrete"


def _numbers(column, attribute: Attribute, file) -> np.ndarray:
    """float64 [U], NaN where missing."""
    import polars as pl

    if not column.dtype.is_numeric():
        raise DataError(file, f"is {column.dtype}, not numeric", column=attribute.name)
    numbers = column.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy()
    wrong = np.isinf(numbers) | (attribute.log & (numbers <= -1))
    if wrong.any():
        where = int(wrong.argmax())
        what = f"log(1 + {numbers[where]:g})" if attribute.log else f"{numbers[where]:g}"
        raise DataError(file, f"{what} is not finite", column=attribute.name, row=where + 1)
    return np.log1p(numbers) if attribute.log else numbers


def _standardised(numbers, attribute: Attribute, users, file) -> EncodedAttribute:
    training = numbers[users]
    training = training[~np.isnan(training)]
    # The standard deviation of equal numbers is rounding noise: 2.8e-17 of fifty times 0.1.
    if len(training) == 0 or np.ptp(training) <= 1e-12 * np.abs(training).max():
        what = "constant" if len(training) else "missing"
        raise DataError(file, f"is {what} for all training users", column=attribute.name)
    mean, std = training.mean(), training.std()
    low, high = attribute.range or (0.0, 1.0)
    if attribute.log and attribute.range:
        low, high = np.log1p((low, high))
    values = torch.from_numpy(((numbers - mean) / std).astype(np.float32))
    return EncodedAttribute(
        attribute.name, values, mean=float(mean), std=float(std), unit=float(std / (high - low))
    )


def _binned(numbers, attribute: Attribute) -> EncodedAttribute:
    bins = np.asarray(attribute.bins, dtype=np.float64)
    index = np.where(np.isnan(numbers), -1, np.searchsorted(bins, numbers, side="right"))
    edges = [f"{edge:g}" for edge in bins]
    inner = [f"{low} - {high}" for low, high in pairwise(edges)]
    labels = (f"< {edges[0]}", *inner, f">= {edges[-1]}")
    return EncodedAttribute(attribute.name, torch.from_numpy(index.astype(np.int64)), labels)


def _classes(column, attribute: Attribute, users, file) -> EncodedAttribute:
    import polars as pl

    if column.dtype.is_float():
        column = column.fill_nan(None)
    column = column.alias("value")  # an attribute may be called "count"
    counts = column.gather(users).drop_nulls().value_counts(name="count")
    counts = counts.sort(["count", "value"], descending=[True, False])
    if attribute.top is not None:
        counts = counts.head(attribute.top)
    elif counts.height > MANY:
        raise DataError(
            file, f"has {counts.height} different values; `top` keeps the most frequent ones",
            column=attribute.name,
        )  # fmt: skip
    labels = counts["value"].sort()
    table = pl.DataFrame({"value": labels, "class": np.arange(len(labels))})
    index = column.to_frame("value").join(table, on="value", how="left", maintain_order="left")
    other = len(labels) if attribute.top is not None else -1
    classes = index["class"].fill_null(other).to_numpy().copy()
    classes[column.is_null().to_numpy()] = -1
    names = (*labels.to_list(), "other") if attribute.top is not None else tuple(labels.to_list())
    if len(names) < 2:
        raise DataError(
            file, "has fewer than two classes among the training users", column=attribute.name
        )
    return EncodedAttribute(attribute.name, torch.from_numpy(classes.astype(np.int64)), names)
