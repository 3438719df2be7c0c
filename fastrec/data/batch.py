"""The jagged batch that every op, encoder and objective receives. B sequences, T events."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastrec.data.relations import SocialPairs


@dataclass(frozen=True)
class JaggedBatch:
    """A batch of sequences laid end to end; sequence b is `values[offsets[b]:offsets[b + 1]]`.

    values: int64 [T] item ids in [0, V), special tokens in [V, V + 4).
    offsets: int64 [B + 1], offsets[0] = 0, offsets[B] = T.
    keys: int64 [B], view << 32 | sample id of each sequence: the key of its randomness.
    max_seq_len: upper bound of the sequence lengths, known on the host.
    columns: side columns by name, one row per sequence.
    own: the first `own` sequences are the users of the batch, the others drawn friends; None: all
        are users.
    pairs: who is a friend of whom among the sequences.
    """

    values: Tensor
    offsets: Tensor
    keys: Tensor
    max_seq_len: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    own: int | None = None
    pairs: SocialPairs | None = None

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]."""
        return self.offsets.diff()

    def positions(self) -> Tensor:
        """int64 [T]: the place of each event inside its sequence, from 0."""
        starts = torch.repeat_interleave(
            self.offsets[:-1], self.lengths, output_size=self.values.shape[0]
        )
        return torch.arange(self.values.shape[0], device=self.values.device) - starts

    def segment_ids(self) -> Tensor:
        """int64 [T]: the index in the batch of the sequence that each event belongs to."""
        index = torch.arange(len(self), device=self.values.device)
        return torch.repeat_interleave(index, self.lengths, output_size=self.values.shape[0])

    def as_views(self, count: int) -> "JaggedBatch":
        """The batch `count` times, end to end, copy i as view i of it (of the view that it is, plus
        i). `own` and `pairs` speak of one copy and are left out."""
        if count == 1:
            return self
        copy = torch.arange(count, device=self.values.device).unsqueeze(1)
        ends = (self.offsets[1:] + self.values.shape[0] * copy).flatten()
        return replace(
            self,
            values=self.values.repeat(count),
            offsets=torch.cat([self.offsets[:1], ends]),
            keys=(self.keys + (copy << 32)).flatten(),
            columns={k: v.repeat(count, *[1] * (v.dim() - 1)) for k, v in self.columns.items()},
            own=None,
            pairs=None,
        )

    def to(self, device) -> "JaggedBatch":
        return replace(
            self,
            values=self.values.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
            keys=self.keys.to(device, non_blocking=True),
            columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()},
            pairs=None if self.pairs is None else self.pairs.to(device),
        )
