# SPDX-License-Identifier: Apache-2.0
"""From the users of a step to the named views that a model encodes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import Shard, SideData
from fastrec.random import Rng


@dataclass(frozen=True)
class Again:
    """The sequences of another view as they are, with a dropout of their own: first step of its
    view.

    Attributes:
        view: must stand before this one.
    """

    view: str = ""

    def __call__(self, batch: JaggedBatch, rng: Rng, side: SideData) -> JaggedBatch:
        raise ValueError(f"the step again (of {self.view}) must be the first one of its view")


def taken(steps: list) -> str | None:
    """The view that steps start from; None: from the users' own sequences."""
    first = unwrapped(steps[0]) if steps else None
    return first.view if isinstance(first, Again) else None


def whole(views: Mapping[str, list], name: str) -> list:
    """The steps of a view behind those of the view that it takes again, which stands before it."""
    own, before = views[name], [*views][: [*views].index(name)]
    source = taken(own)
    return own if source not in before else [*whole(views, source), *own[1:]]


class Views:
    """Makes the views of a batch: each a list of steps batch -> batch.

    A step is a callable `step(batch, rng, side)` that returns a batch and leaves its input as it
    is. Every random choice is a function of (seed, step, key), so a view is the same in any batch,
    on any rank. Steps run on the host, where nothing waits for a device; view i of the list has
    number i in the keys of its sequences.

    Args:
        views: steps by the name of the view.
        frame: puts special tokens around the items of a batch: `UserModel.frame`.
        side: what steps know beyond the batch.
        max_len: items that a model reads. A step with an attribute `extra` is given as many more.
    """

    def __init__(
        self,
        views: Mapping[str, list],
        frame: Callable[[JaggedBatch], JaggedBatch],
        side: SideData,
        max_len: int,
    ):
        self.views, self.frame, self.side, self.max_len = dict(views), frame, side, max_len
        for number, (name, steps) in enumerate(self.views.items()):
            source = taken(steps)
            if source is not None and source not in list(self.views)[:number]:
                raise ValueError(
                    f"view {name!r} takes {source!r} again, which does not stand before it"
                )
            twice = _twice(steps)
            if twice is not None:
                raise ValueError(
                    f"view {name!r} has {twice.__name__} twice: both would draw the same numbers"
                )
            check_order(name, whole(self.views, name))

    def __call__(self, batch: JaggedBatch, rng: Rng, shard: Shard) -> dict[str, JaggedBatch]:
        """The views of the sequences of `batch`, this process's part of the users of a step."""
        made: dict[str, JaggedBatch] = {}
        for number, (name, steps) in enumerate(self.views.items()):
            source, room = taken(steps), self.max_len + extra(steps)
            self.side.shard = shard._replace(view=number, max_len=room)
            if source is not None:
                view, steps = made[source], steps[1:]
            else:
                view = batch.last(room)
            view = replace(view, keys=view.sample_ids | number << 32)
            for step in steps:
                view = step(view, rng, self.side)
            made[name] = view
        return {n: self.frame(_without_empty(v)).with_scored() for n, v in made.items()}

    @property
    def length(self) -> int:
        """Items of a user that the views need."""
        return self.max_len + max((extra(steps) for steps in self.views.values()), default=0)


def _without_empty(view: JaggedBatch) -> JaggedBatch:
    """Of sequences that the steps have left without an event nothing is learnt: their vectors are
    all the same."""
    there = view.lengths > 0
    if there.all():
        return view
    return replace(view, real=there if view.real is None else view.real & there)


def extra(steps: Sequence) -> int:
    """Items more than a model reads that the steps of a view, or of its choices, ask for."""
    return max((getattr(part, "extra", 0) for part in parts_of(steps)), default=0)


def unwrapped(step):
    """The step itself: one of a recipe is a field of a `Step`."""
    return getattr(step, "part", step)


def _twice(steps: list, before: frozenset[type] = frozenset()) -> type | None:
    """A kind of step that may change a sequence after another one of its kind, in `before` or in
    front of it; one's own kinds draw as they like. Of a choice a sequence takes one step."""
    for step in steps:
        part = unwrapped(step)
        kind, choices = type(part), getattr(part, "steps", [])
        if kind in before and kind.__module__.startswith("fastrec."):
            return kind
        before |= {kind}
        for choice in choices:
            if (inner := _twice([choice], before)) is not None:
                return inner
        before |= {type(each) for each in parts_of(choices)}
    return None


def check_order(name: str, steps: list) -> None:
    """Raise ValueError for a step that must stand before those that make the targets: its attribute
    `before` names what these ask."""
    earlier: list = []
    for step in steps:
        for part in parts_of([step]):
            for other in earlier:
                if getattr(other, "asks", None) in getattr(part, "before", ()):
                    wrong, first = type(part).__name__, type(other).__name__
                    raise ValueError(f"view {name!r}: {wrong} must stand before {first}")
        earlier += parts_of([step])


def parts_of(steps: Sequence) -> Iterator:
    """The steps of a view, those inside of choices included."""
    for step in steps:
        part = unwrapped(step)
        yield part
        yield from parts_of(getattr(part, "steps", []))


def check_steps(views: Mapping[str, Sequence]) -> None:
    """Raise TypeError for steps in Python that cannot be any."""
    for name, steps in views.items():
        for step in steps:
            if not callable(step) and not hasattr(step, "part"):
                raise TypeError(f"views.{name}: {step!r:.60} is no step: Mask(), or a function")
