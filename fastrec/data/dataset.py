# SPDX-License-Identifier: Apache-2.0
"""The canonical dataset: a directory of Parquet tables and the memory-mapped jagged form.

    interactions.parquet  user, item: int64 from 0; timestamp: int64; optional rating, event_type;
                          sorted by user, then in time order
    users.parquet         user: int64 0..U-1, user_id: the original id, attributes
    items.parquet         item: int64 0..V-1, item_id: the original id, attributes
    relations.parquet     user, friend: int64 (optional)
    cold_items.parquet    user, item: int64 and item_id, of another catalogue (optional)
    schema.json           format version, counts, columns, tie rule, source, what filters removed,
                          a digest of every file
    values.npy            int32 or int64 [E], the items of all users end to end, in time order
    offsets.npy           int64 [U + 1], the events of user u are values[offsets[u]:offsets[u + 1]]
    features.NAME.npy     float32 [V, F], vectors of the items (optional), see `item_vectors`
    splits.npy            int64 [U, 2], where training and validation of a user end; absent for
                          leave-one-out

Training reads the arrays only, and of interactions.parquet the columns that a model reads
beside the items. Letters: U users, V items, E events, B sequences, T events of a batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from fastrec.data.batch import JaggedBatch, np_spans
from fastrec.data.dataset_files import (
    COLD_ITEMS_FILE,
    check_contents,
    check_digest,
    check_digests,
    check_sizes,
    read_array,
    read_schema,
)
from fastrec.data.errors import DataError, reading
from fastrec.data.event_columns import read_event_column
from fastrec.data.splits import MIN_EVENTS, SPLITS_FILE, TARGETS, boundaries


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """Views of the sequences of a canonical dataset for training, validation and test; `load` opens
    one. `splits` is None for leave-one-out; others are made by `prepare`, see `data.splits`.

    Leave-one-out of a user with n >= 3 events:

        train  input: all but the last two events
        valid  input: all but the last two events      target: the second last
        test   input: all but the last event           target: the last
        all    input: every event (to serve, or to pre-train without evaluation)

    A user with n < 3 events (`num_short_users` counts them) has no target: all n events stay in
    `train` and `all`, and the user is not in `users("valid")` and `users("test")`. In other splits
    a user may have several targets, and is in `valid` or `test` with at least one of them and at
    least one event before it.
    """

    path: Path
    schema: dict
    values: np.ndarray
    offsets: np.ndarray
    splits: np.ndarray | None = None

    @classmethod
    def load(cls, path, *, validate: bool = True) -> "SequenceDataset":
        """Open the directory `path`. The arrays are memory-mapped, read-only.

        `validate=False` skips the checks that read whole files.
        Raises DataError that names the file: missing, truncated or corrupt file, unknown format
        version, sizes that disagree with schema.json, offsets not monotone, items out of range,
        boundaries of a split out of order, a file of another data set.
        """
        path = Path(path)
        schema = read_schema(path / "schema.json")
        values = read_array(path / "values.npy", ("int32", "int64"))
        offsets = read_array(path / "offsets.npy", ("int64",))
        splits = read_array(path / SPLITS_FILE, ("int64",)) if "split" in schema else None
        dataset = cls(path, schema, values, offsets, splits)
        check_sizes(dataset)
        if validate:
            check_contents(dataset)
            check_digests(path, schema)
        return dataset

    @property
    def num_users(self) -> int:
        return self.schema["num_users"]

    @property
    def num_items(self) -> int:
        return self.schema["num_items"]

    @property
    def num_events(self) -> int:
        return self.schema["num_interactions"]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [U]: number of events of each user."""
        return np.diff(self.offsets)

    @property
    def num_short_users(self) -> int:
        """Users whose events are all for training: in leave-one-out, those with fewer than 3."""
        return int((self._boundaries("train")[0] == self.lengths).sum())

    def split_lengths(self, split: str) -> np.ndarray:
        """int64 [U]: length of the input of each user; 0 where a user is not in the split."""
        inputs, targets = self._boundaries(split)
        return np.where(inputs < targets, inputs, 0) if split in TARGETS else inputs

    def users(self, split: str) -> np.ndarray:
        """int64: ascending indices of the users whose input in `split` holds at least one event;
        for "valid" and "test" of those who also have a target."""
        return np.flatnonzero(self.split_lengths(split) > 0)

    def targets(self, split: str) -> torch.Tensor:
        """int64 [U]: the held-out item of each user, -1 for users who are not in the split.

        split: "valid" or "test"; of leave-one-out the second last event, or the last.
        Raises ValueError where a user has several targets: see `held_out`.
        """
        _check_held_out(split)
        users = self.users(split)
        inputs, ends = (part[users] for part in self._boundaries(split))
        if (ends - inputs > 1).any():
            bad = users[(ends - inputs).argmax()]
            raise ValueError(
                f"user {bad} has {(ends - inputs).max()} targets in split {split!r}: `held_out`"
                " gives them all"
            )
        targets = np.full(self.num_users, -1, dtype=np.int64)
        targets[users] = self.values[self.offsets[users] + inputs]
        return torch.from_numpy(targets)

    def held_out(self, users, split: str) -> JaggedBatch:
        """One sequence a user: all targets in "valid" or "test", in the order of the events.

        users: int64 [B] of `users(split)`. Raises as `gather` does.
        """
        _check_held_out(split)
        users = indices(users)
        inputs, ends = self._checked(users, split)
        starts = self.offsets[users]
        return self.between(users, starts + inputs, starts + ends)

    def item_counts(self, split: str = "train") -> torch.Tensor:
        """int64 [V]: how often each item occurs in the inputs of `split`."""
        lengths = self.split_lengths(split)
        if split == "all":
            events = self.values
        else:
            first = self.offsets[:-1]
            events = self.values[self.events_between(first, first + lengths)]
        return torch.from_numpy(np.bincount(events, minlength=self.num_items))

    def events_between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """bool [E]: the events from starts[i] to ends[i], of runs that do not overlap, int64 [N].
        An eighth of the memory of their places."""
        edges = np.zeros(self.num_events + 1, dtype=np.int8)
        some = ends > starts
        edges[starts[some]] += 1
        edges[ends[some]] -= 1
        return np.cumsum(edges[:-1], dtype=np.int8).view(bool)

    def gather(
        self, users, split: str, max_len: int | None = None, columns: Sequence[str] = ()
    ) -> JaggedBatch:
        """One batch: the inputs of `users` in `split`.

        users: int64 [B] tensor, array or list of user indices; they may repeat.
        max_len: the most recent max_len items are kept.
        columns: of events, see `event_column`; they are in `events` of the batch.
        Keys of the batch are the user indices; max_seq_len is the longest sequence in it. The
        tensors are on the CPU. A user without events in `split` gives an empty sequence in "train"
        and "all"; in "valid" and "test" it has no target and raises ValueError.
        """
        users = indices(users)
        ends = self.input_ends(users, split)
        kept = ends - self.offsets[users]
        if max_len is not None:
            if max_len < 0:
                raise ValueError(f"max_len must not be negative, got {max_len}")
            kept = np.minimum(kept, max_len)
        return self.between(users, ends - kept, ends, columns)

    def input_ends(self, users, split: str) -> np.ndarray:
        """int64 [B]: where the inputs of `users` in `split` end, places among all events. Raises as
        `gather` does."""
        users = indices(users)
        return self.offsets[users] + self._checked(users, split)[0]

    def between(
        self, users, starts: np.ndarray, ends: np.ndarray, columns: Sequence[str] = ()
    ) -> JaggedBatch:
        """One batch: sequence b is the events from starts[b] to ends[b], places among all events of
        the data set, int64 [B]; its key is users[b]. `columns` as in `gather`."""
        kept = ends - starts
        offsets = np.concatenate(([0], np.cumsum(kept)))
        place = np_spans(starts, kept)
        return JaggedBatch(
            values=torch.from_numpy(self.values[place].astype(np.int64)),
            offsets=torch.from_numpy(offsets),
            keys=torch.from_numpy(indices(users).copy()),
            max_seq_len=int(kept.max(initial=0)),
            events={name: torch.from_numpy(self.event_column(name)[place]) for name in columns},
        )

    def event_column(self, name: str) -> np.ndarray:
        """[E]: "rating" (float32) or "time_gap" (float64 seconds since the event before, in the
        whole sequence of the user), NaN where there is none; read once from interactions.parquet.

        Raises ValueError for another name, DataError where the data set has no ratings or times.
        """
        if name not in self._event_columns:
            self._event_columns[name] = read_event_column(self, name)
        return self._event_columns[name]

    @cached_property
    def _event_columns(self) -> dict[str, np.ndarray]:
        return {}

    def user_ids(self) -> np.ndarray:
        """[U]: the original user ids (int64, or object array of str), read from users.parquet."""
        return self._column("users.parquet", "user_id")

    def item_ids(self) -> np.ndarray:
        """[V]: the original item ids (int64, or object array of str), read from items.parquet."""
        return self._column("items.parquet", "item_id")

    @cached_property
    def items_hash(self) -> str:
        """Of the original item ids in their order: what the rows of a trained item table mean."""
        return hash_of(self.item_ids())

    @cached_property
    def users_hash(self) -> str:
        """Of the original user ids in their order: whom the rows of trained user vectors mean."""
        return hash_of(self.user_ids())

    @cached_property
    def events_hash(self) -> str:
        """Of the events of all users in their order, and of the split unless it is leave-one-out:
        what a run is resumed on."""
        digest = hashlib.sha256(self.offsets.tobytes())
        for start in range(0, self.num_events, 1 << 24):
            digest.update(self.values[start : start + (1 << 24)].tobytes())
        if self.splits is not None:
            digest.update(self.splits.tobytes())
        return digest.hexdigest()[:16]

    def column_hash(self, name: str) -> str:
        """Of an `event_column`."""
        return hashlib.sha256(self.event_column(name).tobytes()).hexdigest()[:16]

    def user_attributes(self):
        """polars.DataFrame of users.parquet: user, user_id and the attributes, one row per user."""
        return self._table("users.parquet", self.num_users)

    def item_attributes(self):
        """polars.DataFrame of items.parquet: item, item_id and the attributes, one row per item."""
        return self._table("items.parquet", self.num_items)

    def relations(self) -> np.ndarray | None:
        """int64 [R, 2]: (user, friend) pairs as they are stored; None if there are none."""
        if not (self.path / "relations.parquet").exists():
            return None
        pairs = self._table("relations.parquet").select("user", "friend").to_numpy()
        if pairs.size and (pairs.min() < 0 or pairs.max() >= self.num_users):
            raise DataError(self.path / "relations.parquet", f"user out of [0, {self.num_users})")
        return pairs

    def cold_items(self):
        """polars.DataFrame: user, item (from 0, of another catalogue) and item_id, its original id,
        a row for each item that a user took there; None if there are none."""
        if not (self.path / COLD_ITEMS_FILE).exists():
            return None
        table = self._table(COLD_ITEMS_FILE)
        if not table.height or not 0 <= table["user"].min() <= table["user"].max() < self.num_users:
            raise DataError(
                self.path / COLD_ITEMS_FILE, f"user out of [0, {self.num_users})", column="user"
            )
        return table

    def _boundaries(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return boundaries(split, self.lengths, self.splits)

    def _checked(self, users: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
        """`boundaries` of users who are in the split."""
        if users.ndim != 1:
            raise ValueError(f"users must have one dimension, got shape {tuple(users.shape)}")
        if users.size and (users.min() < 0 or users.max() >= self.num_users):
            bad = users[(users < 0) | (users >= self.num_users)][0]
            raise IndexError(f"user {bad} is out of [0, {self.num_users})")
        lengths = self.offsets[users + 1] - self.offsets[users]
        splits = None if self.splits is None else self.splits[users]
        inputs, ends = boundaries(split, lengths, splits)
        if split in TARGETS and (absent := (inputs == 0) | (inputs >= ends)).any():
            what = "no target, or no event before it,"
            if self.splits is None:
                what = f"fewer than {MIN_EVENTS} events"
            raise ValueError(
                f"user {users[absent][0]} has {what} and is not in split {split!r}; "
                f"take users from dataset.users({split!r})"
            )
        return inputs, ends

    def _table(self, name: str, rows: int | None = None):
        import polars as pl

        file = self.path / name
        if not file.exists():
            raise DataError(file, "file is missing")
        # The bytes: a name in brackets would be a pattern.
        content = file.read_bytes()
        # Ids of another day would name the users and items of the arrays that are mapped.
        check_digest(file, hashlib.sha256(content).hexdigest(), self.schema)
        with reading(file, "cannot be read as Parquet"):
            frame = pl.read_parquet(BytesIO(content))
        if rows is not None and frame.height != rows:
            raise DataError(file, f"schema.json says {rows} rows, the file has {frame.height}")
        return frame

    def _column(self, name: str, column: str) -> np.ndarray:
        frame = self._table(name, self.num_users if name == "users.parquet" else self.num_items)
        if column not in frame.columns:
            raise DataError(self.path / name, "column is missing", column=column)
        return frame[column].to_numpy()


def hash_of(ids: np.ndarray) -> str:
    return hashlib.sha256("\n".join(map(str, ids.tolist())).encode()).hexdigest()[:16]


def indices(users) -> np.ndarray:
    """int64 [N] of users that are given as numbers. Raises TypeError for others, such as a mask of
    users, which would be read as the users 0 and 1."""
    try:
        given = torch.as_tensor(users, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # ids that are texts, for some
        raise TypeError(f"users must be whole numbers, places in the data set: {error}") from error
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"users must be whole numbers, places in the data set, got {given.dtype}")
    return np.ascontiguousarray(given.to(torch.int64).numpy())


def _check_held_out(split: str) -> None:
    if split not in TARGETS:
        raise ValueError(f"split must be one of {list(TARGETS)} for targets, got {split!r}")
