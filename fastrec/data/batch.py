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
    sample_ids: int64 [B], the global id of each sequence, the key of its randomness.
    max_seq_len: upper bound of the sequence lengths, known on the host.
    columns: side columns by name, one row per sequence.
    own: the first `own` sequences are the users of the batch, the others drawn friends; None: all
        are users.
    pairs: who is a friend of whom among the sequences.
    """

    values: Tensor
    offsets: Tensor
    sample_ids: Tensor
    max_seq_len: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    own: int | None = None
    pairs: SocialPairs | None = None

    def __len__(self) -> int:
        return self.sample_ids.shape[0]

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

    def repeat(self, times: int) -> "JaggedBatch":
        """The batch `times` times, end to end: what `views` of an encoder belong to. `own` and
        `pairs` speak of one copy and are left out."""
        if times == 1:
            return self
        shift = self.values.shape[0] * torch.arange(times, device=self.values.device)
        ends = (self.offsets[1:] + shift.unsqueeze(1)).flatten()
        return replace(
            self,
            values=self.values.repeat(times),
            offsets=torch.cat([self.offsets[:1], ends]),
            sample_ids=self.sample_ids.repeat(times),
            columns={k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in self.columns.items()},
            own=None,
            pairs=None,
        )

    def to(self, device) -> "JaggedBatch":
        return replace(
            self,
            values=self.values.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()},
            pairs=None if self.pairs is None else self.pairs.to(device),
        )
