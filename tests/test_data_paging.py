# SPDX-License-Identifier: Apache-2.0
"""Arrays larger than memory: pages are fetched before a batch needs them, and its bits stay."""

import numpy as np
import pytest
from builders import same, synthetic

from fastrec.data import paging
from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.data.side import SideData
from fastrec.data.steps.next_item import NextItem
from fastrec.data.views import Views


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("data"), num_users=300, num_items=50)


def loader_of(folder, **options):
    dataset = SequenceDataset.load(folder)
    views = Views({"main": [NextItem()]}, lambda batch: batch, SideData(dataset), 6)
    return SequenceLoader(views, batch_size=32, seed=3, **options)


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_fetched_ahead_and_their_bits_stay(folder, monkeypatch, rank):
    plain = loader_of(folder, rank=rank, world_size=2)
    monkeypatch.setattr(paging, "SHARE", 0.0)
    loader = loader_of(folder, rank=rank, world_size=2)
    values, asked, fetch = loader.side.dataset.values, [], paging.fetch

    def spy(array, starts, ends):
        fetch(array, starts, ends)  # the system takes the addresses
        asked.append([array[start:end] for start, end in zip(starts, ends, strict=True)])

    monkeypatch.setattr(paging, "fetch", spy)
    steps = [*range(len(loader) + 2), 3, 4, len(loader) - 1]
    for number, step in enumerate(steps):
        before = len(asked)
        batch, expected = loader.batch_at(step)["main"], plain.batch_at(step)["main"]
        assert same(batch, expected)
        if number in (0, len(loader)):  # an epoch begins
            assert len(asked) - before == min(5, len(loader))
        elif 0 < step < len(loader) - 5 and number < len(loader):
            assert len(asked) - before == 1, "one more with each"
    # What was asked for are the events that the batches hold: all of an epoch, each once.
    events = [np.concatenate(part) for part in asked[: len(loader)]]
    for step, found in enumerate(events):
        users = plain._users_of_all_ranks(step)[rank::2]
        assert found.tolist() == plain.side.gather(users, plain.views.length).values.tolist()
    assert isinstance(values, np.memmap)


def test_arrays_that_fit_or_are_not_mapped_are_left_alone(folder, monkeypatch):
    values = SequenceDataset.load(folder).values
    assert not paging.read_singly(values)
    monkeypatch.setattr(paging, "SHARE", 0.0)
    assert paging.read_singly(values) and not paging.read_singly(np.array(values))
