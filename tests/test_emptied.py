# SPDX-License-Identifier: Apache-2.0
"""Of users whose sequence a step has emptied nothing is learnt: what a loss says of them beside
others is what it says of the others alone."""

import numpy as np
import pytest
import torch
from builders import Known, dataset_of, model_of

from fastrec.data.attributes import EncodedAttribute
from fastrec.data.side import Shard
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views
from fastrec.objectives.align import Align
from fastrec.objectives.contrast import Contrast
from fastrec.objectives.rank import Rank
from fastrec.objectives.segments import Segments
from fastrec.objectives.user_attributes import UserAttributePrediction
from fastrec.random import Rng

V, LENGTH = 20, 6
LONG = [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [3, 2, 1, 0, 5]]
SHORT = [[7, 8, 9]]  # one event to train on, which `next_item` takes as a target
USERS = [*SHORT, LONG[0], *SHORT, *SHORT, *LONG[1:], *SHORT]
ATTRIBUTE = EncodedAttribute("city", torch.arange(len(USERS)) % 3, ["a", "b", "c"])
RNG = Rng(0, 0)


def attributes(model) -> UserAttributePrediction:
    return UserAttributePrediction(model.config.width, [ATTRIBUTE], "max", {}, 0)


PARTS = {
    "contrast": (Contrast(["a", "b"]), 2),
    "contrast-first": (Contrast(["a", "b"], similarity="cosine", anchors="first"), 2),
    "align": (Align(["a", "b"], pool="max"), 2),
    "rank": (Rank(["a", "b", "c", "d"], pool="max"), 4),
    "segments": (Segments(["a", "b"]), 2),
    "segments-next": (Segments(["a", "b"], negatives="next"), 2),
    "user_attributes": (attributes, 1),
}


@pytest.mark.parametrize("name", PARTS)
def test_they_count_for_nothing(name):
    settings, number = PARTS[name]
    side = Known(dataset_of(USERS, V))
    side.user_columns["city"] = ATTRIBUTE.values
    model = model_of(causal=True, pre_norm=True)
    views = Views({view: [NextItem()] for view in "abcd"[:number]}, model.frame, side, LENGTH)
    part = settings(model) if callable(settings) else settings.build(model, side)
    part.eval()

    def losses(users: list[int]) -> dict:
        made = views(side.gather(users), RNG, Shard(np.array(users)))
        encoded = model.encode_views(made, RNG)
        found = part(model, RNG, *encoded.values())
        return {name: (loss.item(), count) for name, (loss, count) in found.items()}

    alone, beside = losses([1, 4, 5]), losses(list(range(7)))
    assert alone.keys() == beside.keys()
    for name, (loss, count) in alone.items():
        assert beside[name][0] == pytest.approx(loss, rel=1e-5), name
        assert count is None or int(beside[name][1]) == int(count), name
