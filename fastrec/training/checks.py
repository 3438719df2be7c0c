# SPDX-License-Identifier: Apache-2.0
"""Whether a stage trains what its judge asks, and its views are made for its objectives. Views with
steps of somebody else are not looked at."""

from collections.abc import Iterator
from dataclasses import replace

from fastrec.data.steps.next_item import NextItem
from fastrec.data.steps.permute import Permute
from fastrec.data.steps.segment import Segment
from fastrec.data.views import parts_of, taken, unwrapped, whole
from fastrec.nn.model_config import ModelConfig
from fastrec.objectives.align import Align
from fastrec.objectives.click import Click
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.item import Item
from fastrec.objectives.item_attributes import ItemAttributes
from fastrec.objectives.rank import Rank
from fastrec.objectives.segments import Segments
from fastrec.training.stage import Stage


def check_stage(name: str, stage: Stage, config: ModelConfig) -> None:
    """Raise ValueError that names the stage where it does not train what its judge asks, or an
    objective is asked of views that were made for another one."""
    causal = config.causal if stage.init.causal is None else stage.init.causal
    if stage.judge_kind.next_item and not causal and config.max_len < 2:
        raise ValueError(
            f"{name}: model.max_len must be at least 2: a [MASK] in the place of an item asks for"
            " the next one"
        )
    for objective in stage.parts.values():
        if isinstance(objective, Item | Click):
            _check_asked(name, stage, objective, causal)
            _check_hidden(name, stage, objective, causal)
        elif isinstance(objective, ItemAttributes):
            if objective.masked:
                _check_hidden(name, stage, objective, causal)
            _check_unmasked(name, stage, objective)
        elif isinstance(objective, Segments):
            _check_runs(name, stage, objective)
        elif isinstance(objective, Rank):
            _check_again(name, stage, objective)


def _parts(stage: Stage, view: str) -> Iterator:
    """The steps that make a view, those of the view that it takes again included."""
    return parts_of(whole(stage.views, view))


def _asks(stage: Stage, view: str) -> list[str | None]:
    return [getattr(part, "asks", None) for part in _parts(stage, view)]


def _check_asked(name: str, stage: Stage, objective: Item | Click, causal: bool) -> None:
    """A model is trained for what its judge asks: a causal one at its last item, another at a
    [MASK]."""
    # A stage that keeps its last model may train something else than is asked.
    if stage.judge not in ("next_item", "click") or stage.monitor == "steps" or not causal:
        return
    asks = [_asks(stage, view) for view in objective.views]
    if all("mask" in each and "last" not in each for each in asks):
        raise ValueError(
            f"{name}: a causal encoder is asked for the next item at its last item, and trained at"
            f" [MASK] alone in {objective.views}: use next_item, or causal: false"
        )


def _check_hidden(name: str, stage: Stage, objective, causal: bool) -> None:
    for view in objective.views:
        if not causal and "last" in _asks(stage, view):
            raise ValueError(
                f"{name}: next_item needs a causal encoder: here every event of the view {view!r}"
                " would see the item that it is to predict"
            )


def _check_unmasked(name: str, stage: Stage, objective: ItemAttributes) -> None:
    """Items that are no target are left."""
    every = (
        any(
            isinstance(part, Permute) or (isinstance(part, NextItem) and part.positions == "all")
            for part in map(unwrapped, whole(stage.views, view))
        )
        for view in objective.views
    )
    if objective.unmasked and all(every):
        raise ValueError(
            f"{name}: item_attributes.unmasked has no effect: every event of {objective.views} has"
            " a target; set it to 0"
        )


def _check_runs(name: str, stage: Stage, objective: Segments) -> None:
    """Both views speak of the same runs."""
    sides = [[unwrapped(step) for step in whole(stage.views, view)] for view in objective.views]
    if not all(any(isinstance(step, Segment) for step in side) for side in sides):
        return  # the views are of somebody else
    context, run = (
        [replace(step, keep=False) if isinstance(step, Segment) else step for step in side]
        for side in sides
    )
    if context != run:
        raise ValueError(
            f"{name}: the views of segments, {objective.views}, are not of the same runs: but for"
            " segment.keep their steps must be the same"
        )


def _check_again(name: str, stage: Stage, objective: Rank) -> None:
    for view, again in zip(objective.views[:2], objective.views[2:], strict=True):
        if taken(stage.views[again]) != view and (stage.views[view] or stage.views[again]):
            raise ValueError(
                f"{name}: rank.views are [a, b, a_again, b_again]: {again!r} is not {view!r} again"
            )


def check_views(stage: Stage, dropout: float) -> None:
    """Raise ValueError for views that are compared and are the same."""
    for name, part in stage.parts.items():
        if not isinstance(part, Contrast | Align) or dropout:
            continue
        roots = [_root(stage, view) for view in part.views]
        if roots[0] == roots[1] or not any(stage.views[root] for root in roots):
            raise ValueError(
                f"{name} has no effect: without dropout and steps its views are the same"
            )


def _root(stage: Stage, view: str) -> str:
    """The view whose sequences a view has as they are."""
    steps = stage.views[view]
    source = taken(steps) if len(steps) == 1 else None
    return view if source is None else _root(stage, source)
