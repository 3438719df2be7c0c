# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of a training step as CUDA graphs, for batches of any size.

A graph replays kernels of fixed shapes. So every view is padded to a capacity, a budget of events,
sequences, predicted events, queries and candidates, in a way that changes no loss: further
sequences of special tokens, which are pooled and predicted nowhere and not `real`. The capacity has
room for batches a tenth larger than those seen; one that does not fit is captured anew.

Legend: S sequences, T events, N predicted events, Q queries, C candidates, E exclusions.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.data.attributes import missing_value
from fastrec.data.batch import FILL, JaggedBatch
from fastrec.data.pairs import Pairs
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, Term
from fastrec.random import Rng

MARGIN = 1.1


class Capacity(NamedTuple):
    """Sizes that padded batches have, but for the sequences that hold the padding."""

    sequences: int
    events: int
    rows: int
    queries: int = 0
    candidates: int = 0
    excluded: int = 0

    @classmethod
    def of(cls, batch: JaggedBatch) -> "Capacity":
        """What a view needs: an event more than it has, so that no sequence begins after the end,
        a query more, which has the spare exclusions, and a candidate where there is none."""
        pairs, rows = batch.pairs, 0 if batch.scored is None else len(batch.scored)
        own = (len(batch), len(batch.values) + 1, rows)
        if pairs is None:
            return cls(*own)
        candidates = max(len(pairs.candidate_rows), 1)
        return cls(*own, len(pairs.positive) + 1, candidates, len(pairs.exclude[0]))

    def holds(self, other: "Capacity") -> bool:
        return all(a >= b for a, b in zip(self, other, strict=True))

    def with_room_for(self, other: "Capacity") -> "Capacity":
        pairs = zip(self, other, strict=True)
        return Capacity(*(max(a, int(b * MARGIN)) for a, b in pairs))


def _to(tensor: Tensor, size: int, value: float) -> Tensor:
    ends = (0, 0) * (tensor.dim() - 1) + (0, size - len(tensor))
    return F.pad(tensor, ends, value=value)


def spare_sequences(events: int, length: int) -> int:
    """That hold any padding of up to `events`: whole ones, and one of what is left over."""
    return events // length + 1


def padded(
    batch: JaggedBatch, capacity: Capacity, spare: int, length: int, filler: int
) -> JaggedBatch:
    """The view in the sizes of `capacity`: same losses, same gradients.

    spare: sequences that hold the padding, `spare_sequences` of capacity.events. length: of the
    longest sequence that the encoder takes. filler: a special token. The view is on the host and of
    one process.
    """
    events = len(batch.values)
    full, rest = divmod(capacity.events - events, length)
    sequences = capacity.sequences + spare
    real = batch.real
    if real is None:
        real = torch.ones(len(batch), dtype=torch.bool, device="cpu")
    added = batch.offsets.new_zeros(sequences - len(batch))
    added[len(added) - full :] = length  # empty ones first: none begins where the events end
    added[len(added) - full - 1] = rest
    return JaggedBatch(
        _to(batch.values, capacity.events, filler),
        torch.cat([batch.offsets, events + added.cumsum(0)]),
        _to(batch.keys, sequences, 0),
        length,
        {n: _to(c, capacity.events, FILL.get(n, 0)) for n, c in batch.events.items()},
        {n: _to(c, sequences, missing_value(c)) for n, c in batch.users.items()},
        pairs=None if batch.pairs is None else _padded_pairs(batch.pairs, capacity),
        # The last event is padding and has no target.
        scored=None
        if batch.scored is None
        else _to(batch.scored, capacity.rows, capacity.events - 1),
        real=_to(real, sequences, 0),
    )


def _padded_pairs(pairs: Pairs, capacity: Capacity) -> Pairs:
    queries, candidates = len(pairs.positive), max(len(pairs.candidate_rows), 1)
    listed, offsets = pairs.exclude
    # The spare exclusions are shared by the padding, and name all candidates in turn: one long list
    # of a query, and in backward of a candidate, would be walked by one program.
    padding, spare = capacity.queries - queries, capacity.excluded - len(listed)
    share = torch.linspace(0, spare, padding + 1, dtype=torch.float64, device="cpu").long()
    place = torch.arange(spare, device="cpu")
    owner = torch.repeat_interleave(share.diff(), output_size=spare)
    named = (owner * capacity.candidates + place % capacity.candidates).sort().values

    def profiles(ids: Tensor | None, size: int) -> Tensor | None:
        return None if ids is None else _to(ids, size, -1)

    return Pairs(
        query_rows=_to(pairs.query_rows, capacity.queries, 0),
        candidate_rows=_to(pairs.candidate_rows, capacity.candidates, 0),
        positive=_to(pairs.positive, capacity.queries, 0),
        candidates_per_rank=(capacity.candidates,),
        query_profile=profiles(pairs.query_profile, capacity.queries),
        candidate_profile=profiles(pairs.candidate_profile, capacity.candidates),
        exclude=(
            torch.cat([listed, named % capacity.candidates]),  # rising in every list
            torch.cat([offsets[:-1], len(listed) + share]),
        ),
        negatives=0.0,  # of the batch; one number would be captured
        # Candidate 0 is the friend of all padding, so it exists.
        real=(
            torch.arange(capacity.queries, device="cpu") < queries,
            torch.arange(capacity.candidates, device="cpu") < candidates,
        ),
    )


def _leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in dataclasses, dicts and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, (dict, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


def _with_leaves(value: Any, leaves: Iterator[Tensor]) -> Any:
    """`value` with its tensors taken from `leaves`."""
    if isinstance(value, Tensor):
        return next(leaves)
    if is_dataclass(value):
        parts = {f.name: _with_leaves(getattr(value, f.name), leaves) for f in fields(value)}
        return replace(value, **parts)  # type: ignore[type-var]
    if isinstance(value, dict):
        return {name: _with_leaves(part, leaves) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_with_leaves(part, leaves) for part in value)
    return value


def _packed(inputs: Any) -> list[Tensor]:
    """One vector per dtype: few copies to the device."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for leaf in _leaves(inputs):
        by_type.setdefault(leaf.dtype, []).append(leaf.flatten())
    return [torch.cat(parts) for parts in by_type.values()]


def _unpacked(template: Any, packs: tuple[Tensor, ...]) -> Any:
    """Inverse of `_packed`, as views; shapes and what is no tensor are those of `template`."""
    by_type = {pack.dtype: pack for pack in packs}
    begin = dict.fromkeys(by_type, 0)

    def parts() -> Iterator[Tensor]:
        for leaf in _leaves(template):
            at = begin[leaf.dtype]
            begin[leaf.dtype] = at + leaf.numel()
            yield by_type[leaf.dtype][at : at + leaf.numel()].view(leaf.shape)

    return _with_leaves(template, parts())


class _Losses(nn.Module):
    """The losses as a function of tensors: what is captured."""

    def __init__(self, model: UserModel, objective: JointObjective, template: tuple):
        super().__init__()
        self.model, self.objective, self.template = model, objective, template
        self.terms: list[Term] = []

    def forward(self, *packs: Tensor) -> Tensor:
        views, (seed, step) = _unpacked(self.template, packs)
        terms = self.objective(self.model, views, Rng(seed, step))
        # A value to look at may be one of the host, which would be captured.
        terms = [term for term in terms if term.number is not None]
        self.terms = [term._replace(loss=term.loss.detach(), number=1) for term in terms]
        return torch.stack([term.loss.float() for term in terms])


def cuda_graph(losses: _Losses, packs: list[Tensor]) -> Callable:
    """`losses` as a pair of graphs, forward and backward."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # What autocast keeps between calls would be gone when the graph is replayed.
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        return torch.cuda.make_graphed_callables(losses, tuple(packs), allow_unused_input=True)


class GraphedObjective:
    """`JointObjective` with forward and backward replayed from CUDA graphs.

    Views are made on the host, where nothing waits for the device, and seed and step are inputs of
    the graph: a replay draws the dropout of its step. Gradients are those of the same batch without
    padding, up to the order of sums.

    Args:
        model, objective: on a CUDA device. Their parameters may be updated in place.
        seed: of the run.
        capture: makes the callable that is kept while batches fit; another one than `cuda_graph`
            in tests.
    """

    def __init__(
        self,
        model: UserModel,
        objective: JointObjective,
        seed: int,
        capture: Callable[[_Losses, list[Tensor]], Callable] = cuda_graph,
    ):
        self.model, self.objective, self.seed, self.capture = model, objective, seed, capture
        self.capacities: dict[str, Capacity] = {}
        self._captured: tuple[_Losses, Callable] | None = None

    def __call__(self, views: dict[str, JaggedBatch], step: int) -> list[Term]:
        """The terms of views on the host. Call backward of their sum before the next call."""
        none, needs = Capacity(0, 0, 0), {name: Capacity.of(view) for name, view in views.items()}
        before = {name: self.capacities.get(name, none) for name in views}
        if not all(before[name].holds(need) for name, need in needs.items()):
            # All views at once and with as many spare sequences: those of the same users, which an
            # objective may compare, keep the same number of sequences.
            self.capacities = {n: before[n].with_room_for(need) for n, need in needs.items()}
            self._captured = None  # frees the memory of the old graph
        length, filler = self.model.max_positions, self.model.token("sep")
        spare = spare_sequences(max(c.events for c in self.capacities.values()), length)
        inputs = (
            {n: padded(v, self.capacities[n], spare, length, filler) for n, v in views.items()},
            (torch.tensor(self.seed, device="cpu"), torch.tensor(step, device="cpu")),
        )
        device = self.model.device
        packs = _packed(inputs)
        if device.type == "cuda":
            packs = [pack.pin_memory().to(device, non_blocking=True) for pack in packs]
        if self._captured is None:
            losses = _Losses(self.model, self.objective, inputs)
            self._captured = losses, self.capture(losses, packs)
        losses, call = self._captured
        values = call(*packs)
        return [term._replace(loss=loss) for term, loss in zip(losses.terms, values, strict=True)]
