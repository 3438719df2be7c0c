# SPDX-License-Identifier: Apache-2.0
"""The objectives that a recipe can name: a field each."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import nn

from fastrec.objectives.align import Align
from fastrec.objectives.click import Click
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.follows import Follows
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.item_attributes import ItemAttributes
from fastrec.objectives.rank import Rank
from fastrec.objectives.rating import Rating
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributes


@dataclass(frozen=True)
class Objectives:
    """What a stage trains together, each with a `weight` and the `views` that it reads.

    Attributes:
        item: prediction of the targets of events.
        user_attributes: prediction of user attributes.
        friends: social relation detection.
        contrast: two views of a user are near each other.
        follows: whether a second basket is the next one.
        align: two views of a user predict each other, without negatives.
        cold_start: prediction of items of another catalogue.
        rank: a view is nearest to itself, then to the other view, then to other users.
        item_attributes: prediction of the attributes of items.
        segments: a run of items and the sequence without it are near each other.
        rating: regression to ratings of events.
        click: whether items are clicked, from user vector and item content.
    """

    item: Item | None = None
    user_attributes: UserAttributes | None = None
    friends: Friends | None = None
    contrast: Contrast | None = None
    follows: Follows | None = None
    align: Align | None = None
    cold_start: ColdStart | None = None
    rank: Rank | None = None
    item_attributes: ItemAttributes | None = None
    segments: Segments | None = None
    rating: Rating | None = None
    click: Click | None = None

    def named(self) -> dict[str, object]:
        """Those that are set."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


def check_objectives(objectives) -> None:
    """Raise TypeError for objectives in Python that cannot be any."""
    if isinstance(objectives, Objectives):
        return
    if not isinstance(objectives, Mapping):
        raise TypeError(f"objectives must be named, {{'item': Item()}}, got {objectives!r:.60}")
    for name, part in objectives.items():
        if not (isinstance(part, nn.Module | type) or hasattr(part, "build")):
            raise TypeError(
                f"objectives.{name}: {part!r:.60} is no objective: Item(), or a module with `views`"
            )
