# SPDX-License-Identifier: Apache-2.0
"""The jagged batch that every step, op, encoder and objective receives.

Legend: B sequences, T events, V items.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastrec.data.pairs import Pairs

# Special tokens are the ids V, V + 1, ... after the items.
SPECIAL_TOKENS = ("mask", "cls", "sep", "ur")
NO_TARGET = -100  # of an event that predicts nothing, as in torch.nn.functional.cross_entropy
# What an event that holds no item has in a column, by name; 0 in the others.
FILL = {
    "target": NO_TARGET,
    "rating": float("nan"),
    "rating_target": float("nan"),
    "click": -1,
    "time_gap": float("nan"),
    "segment": -1,
    "item_place": -1,
}
OWN = ("user", "profile", "follows", "cold_item")  # user columns that no attribute can have
_IDS = 0xFFFFFFFF


def has_target(target: Tensor) -> Tensor:
    """bool [T]: the events that have a target, or one of several."""
    known = target != NO_TARGET
    return known.any(1) if known.dim() > 1 else known


def columns_of(column: Tensor) -> int:
    """A of a column of events [T, A], 0 of one that is [T]."""
    return column.shape[1] if column.dim() > 1 else 0


def widened(column: Tensor, columns: int, name: str) -> Tensor:
    """A column of events [T] or [T, A], such as the targets, as [T, columns], with `FILL` in the
    further ones; as it is where it has as many."""
    if columns_of(column) == columns:
        return column
    column = column if column.dim() > 1 else column.unsqueeze(1)
    return F.pad(column, (0, columns - column.shape[1]), value=FILL.get(name, 0))


@dataclass(frozen=True)
class JaggedBatch:
    """A batch of sequences laid end to end; sequence b is `values[offsets[b]:offsets[b + 1]]`.

    values: int64 [T] item ids in [0, V), special tokens in [V, V + 4).
    offsets: int64 [B + 1], offsets[0] = 0, offsets[B] = T.
    keys: int64 [B], view << 32 | sample id: what the randomness of a sequence depends on besides
        seed and step. Sequences with the same events and different views are dropout views.
    max_seq_len: upper bound of the sequence lengths, known on the host.
    events: columns with one row per event, [T, ...]; `target` ([T] or [T, A]) is the item that an
        event predicts, -100 for none; `rating` and `time_gap` are those of
        `SequenceDataset.event_column`, NaN for none; `position`, int64, is the place that an
        encoder shall see instead of its own; `segment`, int64, is that of two texts, -1 for none;
        `rating_target` is the rating that an event predicts, NaN for none; `click`, int64, is
        whether its item, or behind `next_item` its target, is a click, -1 unknown; `item_place`,
        int64, is the item of a token, from the latest on, -1 for none.
    users: columns with one row per sequence, [B, ...]: attributes, labels.
    pairs: who belongs to whom among the sequences.
    scored: int64 [N], the events that have a target, ascending; `with_scored` finds them on the
        host, so that nothing waits for a device to know N.
    real: bool [B], the sequences that count: neither padding nor left without an event by a step;
        None: all.
    """

    values: Tensor
    offsets: Tensor
    keys: Tensor
    max_seq_len: int
    events: dict[str, Tensor] = field(default_factory=dict)
    users: dict[str, Tensor] = field(default_factory=dict)
    pairs: Pairs | None = None
    scored: Tensor | None = None
    real: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]."""
        return self.offsets.diff()

    @property
    def sample_ids(self) -> Tensor:
        """int64 [B]: the global ids of the sequences, users in training."""
        return self.keys & _IDS

    def positions(self) -> Tensor:
        """int64 [T]: the place of each event inside its sequence, from 0."""
        if not torch.compiler.is_compiling() and len(self) == 1:
            return torch.arange(self.values.shape[0], device=self.values.device)
        starts = torch.repeat_interleave(
            self.offsets[:-1], self.lengths, output_size=self.values.shape[0]
        )
        return torch.arange(self.values.shape[0], device=self.values.device) - starts

    def places(self) -> Tensor:
        """int64 [T]: the positions that an encoder sees, the column `position` if there is one."""
        given = self.events.get("position")
        return self.positions() if given is None else given

    def segment_ids(self) -> Tensor:
        """int64 [T]: the index in the batch of the sequence that each event belongs to."""
        # Not len(self), which must be a number: a size of an exported program is none yet.
        index = torch.arange(self.keys.shape[0], device=self.values.device)
        return torch.repeat_interleave(index, self.lengths, output_size=self.values.shape[0])

    def as_view(self, view: int) -> "JaggedBatch":
        """The same sequences as view `view` in [0, 65535): other masks, other dropout."""
        if not 0 <= view < 65535:
            raise ValueError(f"a view is a number in [0, 65535), got {view}")
        return replace(self, keys=self.sample_ids | view << 32)

    def as_views(self, number: int) -> "JaggedBatch":
        """`number` dropout views end to end: copy i is view i."""
        return JaggedBatch.cat([self.as_view(view) for view in range(number)])

    def with_events(self, index: Tensor, offsets: Tensor, max_seq_len: int) -> "JaggedBatch":
        """Sequences whose event t is event `index[t]` of this batch: values and columns follow."""
        return replace(
            self,
            values=self.values[index],
            offsets=offsets,
            max_seq_len=max_seq_len,
            events={name: column[index] for name, column in self.events.items()},
            scored=None,
        )

    def with_items(self, values: Tensor, changed: Tensor, asked: bool = False) -> "JaggedBatch":
        """The batch with `values` [T], which stand for others in the events that are `changed`,
        bool [T]. A rating says something of its item, and so does a click: those are hidden, and
        nobody is asked for a rating of what stands there now. The time since the event before does
        not: gaps stay. `asked`: the items are what is predicted, and whether they are clicks
        stays."""
        hidden = ["rating", "rating_target"] if asked else ["rating", "rating_target", "click"]
        events = {
            name: column.masked_fill(changed, FILL[name]) if name in hidden else column
            for name, column in self.events.items()
        }
        return replace(self, values=values, events=events)

    def with_token(self, token: int, at: Tensor) -> "JaggedBatch":
        """The batch with a special token in the events `at`, bool [T]: it is no item and predicts
        nothing, and event columns have `FILL` there."""
        events = {
            name: column.masked_fill(at.view(-1, *[1] * (column.dim() - 1)), FILL.get(name, 0))
            for name, column in self.events.items()
        }
        return replace(self, values=self.values.masked_fill(at, token), events=events)

    def where(self, kept: Tensor) -> "JaggedBatch":
        """The events that are `kept`, bool [T], on the host."""
        offsets = offsets_of(kept.long())[self.offsets]
        longest = int(offsets.diff().max()) if len(self) else 0
        return self.with_events(kept.nonzero().squeeze(1), offsets, longest)

    def runs(self, start: Tensor, length: Tensor) -> "JaggedBatch":
        """`length` events of each sequence from its place `start` on, int64 [B], on the host."""
        offsets = offsets_of(length)
        index = spans(self.offsets[:-1] + start, length, offsets)
        return self.with_events(index, offsets, int(length.max()) if len(self) else 0)

    def select(self, rows: Tensor) -> "JaggedBatch":
        """The sequences `rows`, int64, in that order. `pairs` and `scored` are left out."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        part = self.with_events(
            spans(self.offsets[:-1][rows], lengths, offsets), offsets, self.max_seq_len
        )
        users = {name: column[rows] for name, column in self.users.items()}
        real = None if self.real is None else self.real[rows]
        return replace(part, keys=self.keys[rows], users=users, pairs=None, real=real)

    def last(self, number: int) -> "JaggedBatch":
        """The `number` most recent events of each sequence."""
        if self.max_seq_len <= number:
            return self
        kept = self.lengths.clamp_max(number)
        offsets = offsets_of(kept)
        return self.with_events(spans(self.offsets[1:] - kept, kept, offsets), offsets, number)

    def with_scored(self) -> "JaggedBatch":
        """The same with `scored` set, where there are targets."""
        target = self.events.get("target")
        if target is None:
            return self
        return replace(self, scored=has_target(target).nonzero().squeeze(1))

    @staticmethod
    def cat(batches: "Sequence[JaggedBatch]") -> "JaggedBatch":
        """Batches end to end: the event columns of any of them, with `FILL` where another has them
        not (in `position` the place of the event), and the user columns that all of them have.
        `pairs`, `scored` and `real` speak of one batch and are left out."""
        if len(batches) == 1:
            return batches[0]
        ends, events = [batches[0].offsets[:1]], 0
        for batch in batches:
            ends.append(batch.offsets[1:] + events)
            events += batch.values.shape[0]

        def column(batch: JaggedBatch, name: str, like: Tensor) -> Tensor:
            if name in batch.events:
                return widened(batch.events[name], columns_of(like), name)
            if name == "position":
                return batch.positions()
            return like.new_full((batch.values.shape[0], *like.shape[1:]), FILL.get(name, 0))

        made: dict[str, Tensor] = {}
        for name, each in ((n, each) for batch in batches for n, each in batch.events.items()):
            made[name] = max(made.get(name, each), each, key=columns_of)
        first, *rest = (batch.users for batch in batches)
        shared = [name for name in first if all(name in other for other in rest)]
        return JaggedBatch(
            values=torch.cat([batch.values for batch in batches]),
            offsets=torch.cat(ends),
            keys=torch.cat([batch.keys for batch in batches]),
            max_seq_len=max(batch.max_seq_len for batch in batches),
            events={
                n: torch.cat([column(b, n, like) for b in batches]) for n, like in made.items()
            },
            users={name: torch.cat([batch.users[name] for batch in batches]) for name in shared},
        )

    def to(self, device) -> "JaggedBatch":
        def move(tensor):
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            values=move(self.values),
            offsets=move(self.offsets),
            keys=move(self.keys),
            events={name: move(column) for name, column in self.events.items()},
            users={name: move(column) for name, column in self.users.items()},
            pairs=None if self.pairs is None else self.pairs.to(device),
            scored=move(self.scored),
            real=move(self.real),
        )


def offsets_of(lengths: Tensor) -> Tensor:
    """int64 [B + 1] from lengths [B]."""
    offsets = lengths.new_zeros(lengths.shape[0] + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def spans(starts: Tensor, lengths: Tensor, offsets: Tensor) -> Tensor:
    """int64 [T]: starts[0], starts[0] + 1, .. (lengths[0] of them), then those from starts[1], ..;
    offsets are those of the lengths."""
    total = int(offsets[-1])
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift


def np_spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: starts[0], starts[0] + 1, .. (counts[0] of them), then the same from starts[1], .. As
    `spans`, in a fifth of its time."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


def from_sequences(sequences: Sequence[Sequence[int]], sample_ids=None) -> JaggedBatch:
    """A batch of lists of item ids; sample ids 0, 1, .. unless given."""
    lengths = torch.tensor(
        [len(sequence) for sequence in sequences], dtype=torch.int64, device="cpu"
    )
    values = torch.tensor(
        [item for sequence in sequences for item in sequence], dtype=torch.int64, device="cpu"
    )
    ids = range(len(sequences)) if sample_ids is None else sample_ids
    return JaggedBatch(
        values=values,
        offsets=offsets_of(lengths),
        keys=torch.tensor(list(ids), dtype=torch.int64, device="cpu"),
        max_seq_len=int(lengths.max()) if len(lengths) else 0,
    )


def with_gaps(
    batch: JaggedBatch, place: Tensor, offsets: Tensor, size: int, max_seq_len: int
) -> JaggedBatch:
    """Longer sequences, `size` events together: event t stands at `place[t]`. What is new between
    is no item yet, with value 0 and `FILL` in the event columns."""

    def moved(column: Tensor, fill: float) -> Tensor:
        out = column.new_full((size, *column.shape[1:]), fill)
        return out.index_copy_(0, place, column)

    return replace(
        batch,
        values=moved(batch.values, 0),
        offsets=offsets,
        max_seq_len=max_seq_len,
        events={name: moved(column, FILL.get(name, 0)) for name, column in batch.events.items()},
        scored=None,
    )


def framed(
    batch: JaggedBatch, before: Sequence[int] = (), after: Sequence[int] = ()
) -> JaggedBatch:
    """The batch with the tokens `before` and `after` around each sequence. They are no items and
    predict nothing: event columns have `FILL` there."""
    extra = len(before) + len(after)
    if extra == 0:
        return batch
    shift = torch.arange(len(batch) + 1, device=batch.offsets.device) * extra
    offsets = batch.offsets + shift
    events = batch.values.shape[0]
    place = torch.arange(events, device=batch.offsets.device) + torch.repeat_interleave(
        shift[:-1] + len(before), batch.lengths, output_size=events
    )
    size = events + len(batch) * extra
    made = with_gaps(batch, place, offsets, size, batch.max_seq_len + extra)
    for i, token in enumerate(before):
        made.values[offsets[:-1] + i] = token
    for i, token in enumerate(after):
        made.values[offsets[1:] - len(after) + i] = token
    if "position" in made.events:  # tokens have their own, items stand behind those before them
        inside = torch.zeros_like(made.values, dtype=torch.bool).index_fill_(0, place, True)
        given = made.events["position"] + len(before)
        made.events["position"] = torch.where(inside, given, made.positions())
    return made
