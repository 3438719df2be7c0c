# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every format end in a data set that holds every row, or in one line.

FASTREC_FUZZ sets how many (`make fuzz`: 20,000); a failure names its seed.
"""

import os
import shutil
from pathlib import Path
from random import Random

import pytest
from fuzz_files import build, change_bytes, change_whole, events, links, people

from fastrec.cli_prepare import prepare
from fastrec.data.dataset import SequenceDataset
from fastrec.data.prepare.synthetic import generate

FILES = int(os.environ.get("FASTREC_FUZZ", 300))
BATCHES = 10


def read_all(output: Path) -> tuple[list[tuple[str, str]], dict]:
    """Every event in original ids, and what was removed. Reads all that a data set offers."""
    dataset = SequenceDataset.load(output)
    users, items = dataset.user_ids(), dataset.item_ids()
    dataset.user_attributes(), dataset.item_attributes(), dataset.relations()
    found = []
    for user, begin in enumerate(dataset.offsets[:-1]):
        inside = dataset.values[begin : dataset.offsets[user + 1]]
        found += [(str(users[user]), str(items[item])) for item in inside]
    return found, dataset.schema["filters"]["removed"]


def wrong_line(error: Exception, folder: Path) -> str | None:
    message = str(error)
    if "\n" in message or len(message) > 2000:
        return f"is not one line of a readable length: {message[:300]!r}"
    return None if str(folder) in message else f"names no file: {message}"


def verdict(seed: int, folder: Path) -> str | None:
    """What is wrong with how the source of a seed was taken; None if nothing."""
    source, flags = build(seed, folder)
    try:
        prepare(source, folder / "out", **flags)
    except (ValueError, OSError) as error:
        left = [path.name for path in folder.iterdir() if path.name.startswith((".", "out"))]
        return f"leaves {left}" if left else wrong_line(error, folder)
    found, removed = read_all(folder / "out")
    asked = flags["format"] == "histories"
    if not asked and any(reason.startswith("interactions") for reason in removed):
        return f"removed {removed} without being asked"
    expected = events(source, flags)
    if sorted(found) != sorted(expected):
        return f"{len(found)} events of {len(expected)}: {sorted(set(found) ^ set(expected))[:3]}"
    return wrong_sides(folder, SequenceDataset.load(folder / "out"))


def wrong_sides(folder: Path, dataset: SequenceDataset) -> str | None:
    removed = dataset.schema["filters"]["removed"]
    lost = removed.get("relations with an end without interactions", 0)
    if links(folder) not in (None, dataset.schema["num_relations"] + lost):
        return f"{links(folder)} links, {lost} lost, {dataset.schema['num_relations']} there"
    if (known := people(folder)) is None:
        return None
    column, text = known
    users = dataset.user_attributes()
    if column not in users.columns:
        return None  # the damage renamed it
    lost = removed.get("attribute rows of users without interactions", 0)
    if lost != len(text.keys() - set(users["user_id"].cast(str))):
        return f"{lost} rows of user attributes are said to be lost"
    for user, value in users.select("user_id", column).rows():
        expected = text.get(str(user)) or None
        if value != expected and (isinstance(value, str) or (value is None) != (expected is None)):
            return f"user {user} has {value!r}, not {expected!r}"
    return None


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_sources(batch, tmp_path, capsys):
    bad, taken = [], 0
    for seed in range(batch, FILES, BATCHES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            wrong = verdict(seed, folder)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        taken += (folder / "out").exists()
        shutil.rmtree(folder)
        if wrong:
            bad.append(f"seed {seed}: {wrong}")
        capsys.readouterr()
    assert not bad, f"{len(bad)} of {FILES // BATCHES}:\n" + "\n".join(bad[:20])
    assert 0 < taken < FILES // BATCHES, "the damage is too weak or too strong"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_data_sets(batch, tmp_path):
    """One file of a data set changes: it is refused when it is loaded, or no file that is read."""
    whole = tmp_path / "whole"
    generate(whole, num_users=20, num_items=10, seed=0)
    read = sorted({path.name for path in whole.iterdir()} - {"interactions.parquet"})
    good, bad = read_arrays(whole), []
    for seed in range(batch, FILES // 5, BATCHES):
        random, folder = Random(seed), tmp_path / str(seed)
        shutil.copytree(whole, folder)
        file = folder / random.choice(read)
        file.write_bytes(
            random.choice([change_bytes, change_bytes, change_whole])(random, file.read_bytes())
        )
        try:
            same = read_arrays(folder) == good
            wrong = None if same else "was accepted and is another"
        except (ValueError, OSError) as error:
            wrong = wrong_line(error, folder)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        shutil.rmtree(folder)
        if wrong:
            bad.append(f"seed {seed}, {file.name}: {wrong}")
    assert not bad, f"{len(bad)} of {FILES // 5 // BATCHES}:\n" + "\n".join(bad[:20])


def read_arrays(folder: Path) -> tuple:
    dataset = SequenceDataset.load(folder)
    tables = dataset.user_attributes().rows(), dataset.item_attributes().rows()
    return dataset.values.tolist(), dataset.offsets.tolist(), dataset.relations().tolist(), *tables
