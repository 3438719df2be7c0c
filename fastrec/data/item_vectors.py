# SPDX-License-Identifier: Apache-2.0
"""Vectors of items in a data set: features.NAME.npy, float32 [V, F], 0 for items without one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastrec.data.dataset_files import features_file, read_array
from fastrec.data.errors import DataError


def item_vectors(dataset, names: Iterable[str]) -> dict[str, Tensor]:
    """float32 [V, F] by name, copies on the CPU.

    Raises DataError for a name that the data set has not, and for a file of another shape.
    """
    found = {}
    for name in names:
        there = list(dataset.schema.get("item_features", {}))
        file = dataset.path / features_file(name)
        if name not in there:
            raise DataError(
                dataset.path, f"has no item features {name!r}, only {there}: prepare"
                " --item_features FILE",
            )  # fmt: skip
        array = read_array(file, ("float32",))
        if array.ndim != 2 or array.shape[0] != dataset.num_items or array.shape[1] < 1:
            raise DataError(
                file, f"must be [{dataset.num_items}, F], the file has {list(array.shape)}"
            )
        found[name] = torch.tensor(array, device="cpu")
    return found
