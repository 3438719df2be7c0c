# SPDX-License-Identifier: Apache-2.0
"""Which events of a user are of training, validation and test: two boundaries a user.

    train_end <= valid_end <= n, the events of the user

    split  input                 targets
    train  events[:train_end]
    valid  events[:train_end]    events[train_end:valid_end]
    test   events[:valid_end]    events[valid_end:]
    all    events

Leave-one-out is n - 2 and n - 1, for users with fewer than 3 events n and n; it is computed, not
stored. Any other split is stored as int64 [U, 2] in splits.npy. Legend: U users, B of a batch.
"""

import numpy as np

from fastrec.data.errors import DataError

SPLITS = ("all", "test", "train", "valid")
TARGETS = ("test", "valid")
MIN_EVENTS = 3
SPLITS_FILE = "splits.npy"


def boundaries(
    split: str, lengths: np.ndarray, splits: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(where the input ends, where the targets behind it end), int64 [B] both, counted from the
    first event of a user. A user is in "valid" or "test" if 0 < the first < the second.

    lengths: int64 [B], events of the users. splits: int64 [B, 2], None for leave-one-out.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    if split == "all":
        return lengths, lengths

    def end(part: int) -> np.ndarray:
        if splits is not None:
            return splits[:, part]
        return np.where(lengths < MIN_EVENTS, lengths, lengths - 2 + part)

    if split == "test":
        return end(1), lengths
    train = end(0)
    return train, train if split == "train" else end(1)


def check_splits(file, splits: np.ndarray, lengths: np.ndarray) -> None:
    """Raise DataError that names the user whose boundaries are not in order."""
    ends = np.column_stack((np.zeros_like(lengths), splits, lengths))
    wrong = np.flatnonzero((np.diff(ends, axis=1) < 0).any(axis=1))
    if wrong.size:
        train, valid = splits[wrong[0]].tolist()
        raise DataError(
            file, f"user {wrong[0]} has {lengths[wrong[0]]} events, and boundaries {train} and"
            f" {valid}: expected 0 <= train <= valid <= events",
        )  # fmt: skip
