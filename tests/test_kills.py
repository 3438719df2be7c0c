# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, or meets a full disk, at any of its writes goes on or starts again, and
ends with the bits of one that was not."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from builders import assert_same_weights, recipe, run, synthetic

from fastrec.data import output
from fastrec.data.steps.mask import MaskLast
from fastrec.nn.user_model import UserModel
from fastrec.training.checkpoint import read_checkpoint, write_checkpoint

FILL = ("rename", "replace", "mkdir", "fsync")  # what may find the disk full
CALLS = (*FILL, "unlink", "rmdir")
ANY = [pytest.mark.slow, pytest.mark.exhaustive]


class Dead(BaseException):
    """No handler of the library sees it: what has died tidies nothing."""


class Writes:
    """Counts the calls that change a folder or wait for the disk. The `last`-th and those after it
    raise `Dead`; or that one alone raises that the disk is full."""

    def __init__(self, monkeypatch, last: int | None = None, full: bool = False):
        self.count, self.last, self.full = 0, last, full
        for name in FILL if full else CALLS:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(output, "_exchange", self.counted(output._exchange))

    def counted(self, function):
        def call(*arguments, **options):
            self.count += 1
            if self.full and self.count == self.last:
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.last is not None and self.count >= self.last and not self.full:
                raise Dead
            return function(*arguments, **options)

        return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"), num_users=60, num_items=30)


@pytest.fixture(scope="module")
def initial(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial") / "run"
    run(data, folder, recipe(steps=1))
    return folder / "model"


# Two validations, the first of which is better than the start, and a checkpoint between them.
TUNE = recipe(
    views={"main": [MaskLast()]}, steps=4, validate_every=2, checkpoint_every=3, learning_rate=0.1
)


def tune(data, initial, folder, **kwargs):
    model = None if initial is None else UserModel.from_pretrained(initial)
    return run(data, folder, TUNE, model=model, initial_folder=initial, **kwargs)


def left(folder: Path) -> list[str]:
    """What is only there while something is written."""
    names = [path.name for where in (folder, folder.parent) for path in where.iterdir()]
    return [name for name in names if re.match(r"\.(new|old)\.|.*\.lock$", name)]


def writes_of(monkeypatch, full: bool, work) -> int:
    with monkeypatch.context() as patch:
        counter = Writes(patch, full=full)
        work()
    return counter.count


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    file = tmp_path / "last.ckpt"
    state = {"global_step": 1, "run": {}, "kept": False, "weights": torch.ones(100_000)}
    write_checkpoint(state, file)
    (tmp_path / ".new.last.ckpt").symlink_to("/dev/full")  # takes no byte
    with pytest.raises(OSError, match="last.ckpt cannot be written: .*No space left on device"):
        write_checkpoint({**state, "global_step": 2}, file)
    assert read_checkpoint(file)["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("started", "full", "every"),
    [
        pytest.param(True, False, 1, id="killed_at_any", marks=ANY),
        pytest.param(True, False, 4, id="killed"),
        pytest.param(False, False, 3, id="killed_without_a_model"),
        pytest.param(True, True, 5, id="disk_full"),
    ],
)
def test_every_write_may_be_the_last(data, initial, tmp_path, monkeypatch, started, full, every):
    start, whole = initial if started else None, tmp_path / "whole"
    count = writes_of(monkeypatch, full, lambda: tune(data, start, whole))
    assert count > 40
    ways = []
    for last in range(every, count + 1, every):
        folder = tmp_path / f"{last}" / "run"
        folder.parent.mkdir()
        with monkeypatch.context() as patch:
            Writes(patch, last, full)
            try:
                tune(data, start, folder)
            except (Dead, OSError):
                ended = True
            else:
                ended = False  # what was not done is done by the next run
        if full and folder.exists():
            assert not left(folder), last
        resume = (folder / "last.ckpt").exists()
        ways.append((ended, resume))
        tune(data, start, folder, resume=resume)
        assert not left(folder), last
        assert_same_weights(whole, folder)
        assert (folder / "summary.json").exists()
    assert (True, False) in ways and (True, True) in ways
