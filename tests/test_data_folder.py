# SPDX-License-Identifier: Apache-2.0
"""The folder of a data set: one writer, complete or the one before, and no file of another one."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import polars as pl
import pytest

from fastrec.data import output as folder
from fastrec.data.attributes import Attribute, encode_attributes
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError
from fastrec.data.prepare import prepare
from fastrec.data.prepare.readers import RawData
from fastrec.data.prepare.writer import claim


def raw(shift: int = 0, users: int = 3) -> RawData:
    """As many users, items and events for every shift, in another order."""
    events = [(u, 10 + (u + i + shift) % 4, i) for u in range(users) for i in range(4)]
    frame = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    people = pl.DataFrame({"user_id": range(users), "age": [shift + u for u in range(users)]})
    links = pl.DataFrame({"user": [0, 1], "friend": [1, 2 if shift else 0]})
    return RawData("here", frame, users=people, relations=links)


def names(path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


# One writer


def test_the_second_of_two_writers_stops_and_names_the_first(tmp_path):
    output = tmp_path / "d"
    with claim(output, False):
        with pytest.raises(FileExistsError, match=rf"d is being written by process {os.getpid()}"):
            prepare(raw(), output)
        assert names(tmp_path) == [".d.lock"]
        prepare(raw(), tmp_path / "e")
    prepare(raw(), output)
    assert names(tmp_path) == ["d", "e"]


def _hold(path, inside, leave):
    with claim(path, True):
        inside.set()
        leave.wait()


def test_the_lock_of_another_process_ends_with_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    inside, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "d", inside, leave))
    holder.start()
    assert inside.wait(60)
    with pytest.raises(FileExistsError, match=f"process {holder.pid} on"):
        prepare(raw(), tmp_path / "d")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    prepare(raw(), tmp_path / "d")
    assert names(tmp_path) == ["d"]


# Complete, or the one before


def replace(output, text: str) -> None:
    """As `write_dataset` does, without a data set."""
    with folder.locked(output):
        work = folder.new_folder(output)
        for name in ("one", "two"):
            (work / name).write_text(text)
        folder.put(work, output)


def replaced_until(output, step: int, exchange: bool) -> bool:
    """Replace "old" by "new" in a process that is killed before its `step`-th operation; False if
    it ended before."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1000))

        def counted(function):
            def call(*args, **kwargs):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        steps = [(os, "rename"), (shutil, "rmtree"), (Path, "write_text"), (Path, "unlink")]
        for place, name in [*steps, (folder, "_sync"), (folder, "_exchange")]:
            setattr(place, name, counted(getattr(place, name)))
        if not exchange:
            folder._exchange = lambda *_: False
        replace(output, "new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_anywhere_leaves_the_old_or_the_new_one(tmp_path, exchange):
    """Killed at every step; what stays beside it goes with the next writer."""
    output, seen, step = tmp_path / "d", [], 0
    replace(output, "old")
    while replaced_until(output, step, exchange):
        if exchange:
            assert output.exists(), "it is there before the next writer comes, too"
        with folder.locked(output):
            kept = {(output / name).read_text() for name in ("one", "two")}
            assert names(tmp_path) == [".d.lock", "d"]
        assert len(kept) == 1
        seen.append(kept.pop())
        replace(output, "old")
        step += 1
    assert step > 10 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert names(tmp_path) == ["d"]


def test_with_an_exchange_there_is_always_a_data_set(tmp_path, monkeypatch):
    output = tmp_path / "d"
    prepare(raw(0), output)
    monkeypatch.setattr(folder.os, "rename", lambda *_: pytest.fail("the folder was away"))
    prepare(raw(1), output, overwrite=True)
    assert SequenceDataset.load(output).user_attributes()["age"].to_list() == [1, 2, 3]


def test_a_link_to_a_data_set_stays_a_link(tmp_path):
    prepare(raw(0), tmp_path / "real" / "d")
    (tmp_path / "d").symlink_to(tmp_path / "real" / "d")
    prepare(raw(1), tmp_path / "d", overwrite=True)
    assert (tmp_path / "d").is_symlink() and names(tmp_path) == ["d", "real"]
    dataset = SequenceDataset.load(tmp_path / "real" / "d")
    assert dataset.user_attributes()["age"].to_list() == [1, 2, 3]
    assert names(tmp_path / "real") == ["d"]


# Files of another data set


@pytest.mark.parametrize("name", ["values.npy", "users.parquet", "relations.parquet"])
def test_a_file_of_another_data_set_is_refused(tmp_path, name):
    prepare(raw(0), tmp_path / "a")
    prepare(raw(1), tmp_path / "b")
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(DataError, match=f"{name}: is not the file that was written with"):
        SequenceDataset.load(tmp_path / "a")
    SequenceDataset.load(tmp_path / "a", validate=False)


def test_a_stray_and_a_lost_file_are_refused(tmp_path):
    source = raw(0)
    prepare(source, tmp_path / "a")
    source.relations = None
    prepare(source, tmp_path / "b")
    shutil.copy(tmp_path / "a" / "relations.parquet", tmp_path / "b")
    with pytest.raises(DataError, match=r"relations.parquet: is not the file"):
        SequenceDataset.load(tmp_path / "b")
    (tmp_path / "a" / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"items.parquet: file is missing"):
        SequenceDataset.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_users": True}, "'num_users' must be a positive integer, got 'True'"),
        ({"num_users": 1e9}, "'num_users' must be a positive integer"),
        ({"num_items": 10**30}, "'num_items' must be a positive integer"),
        ({"num_items": 10**12}, "'num_items' is 1000000000000, items.parquet has 4 rows"),
        ({"num_interactions": []}, "'num_interactions' must be a positive integer"),
        ({"num_interactions": None}, "'num_interactions' must be a positive integer"),
        ({"digests": None}, "prepare the dataset again"),
        ({"digests": {"values.npy": 3}}, "prepare the dataset again"),
        ({"version": [1]}, "format version"),
        ({"version": True}, "format version True"),
        ({"format": {}}, "not a fastrec dataset"),
    ],
)
def test_wrong_types_and_absurd_sizes_in_the_schema(tmp_path, change, match):
    prepare(raw(), tmp_path / "d")
    file = tmp_path / "d" / "schema.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=match) as caught:
        SequenceDataset.load(tmp_path / "d")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 5, "1" * 5000, "[]", "\ud800", "nan"])
def test_a_schema_that_is_none(tmp_path, text):
    prepare(raw(), tmp_path / "d")
    file = tmp_path / "d" / "schema.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(DataError) as caught:
        SequenceDataset.load(tmp_path / "d")
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_array_headers_that_promise_too_much(tmp_path):
    prepare(raw(), tmp_path / "d")
    file = tmp_path / "d" / "values.npy"
    good = file.read_bytes()
    for shape in (b"(10**9,)", b"(999999999999999999999999,)", b"(-3,)", b"[12]", b"(" * 90):
        header = good[10:128].replace(b"(12,)", shape)[:117].ljust(117) + b"\n"
        file.write_bytes(good[:10] + header + good[128:])
        with pytest.raises(DataError, match="values.npy"):
            SequenceDataset.load(tmp_path / "d")


def test_a_folder_in_brackets_is_a_name(tmp_path):
    prepare(raw(0), tmp_path / "d1")
    prepare(raw(1), tmp_path / "d[1]")
    dataset = SequenceDataset.load(tmp_path / "d[1]")
    assert dataset.user_attributes()["age"].to_list() == [1, 2, 3]
    assert dataset.relations().tolist() == [[0, 1], [1, 2]]


# Settings of attributes


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("bins", [[NAN, 1.0], [1.0, NAN], [1.0, 1.0], [], [1, INFINITY]])
def test_bins_must_be_finite_and_ascend(tmp_path, bins):
    prepare(raw(), tmp_path / "d")
    dataset = SequenceDataset.load(tmp_path / "d")
    with pytest.raises(ValueError, match="bins must ascend"):
        encode_attributes(dataset, [Attribute("age", bins=bins)], [0, 1, 2])


@pytest.mark.parametrize("top", [0, -1])
def test_top_must_be_positive(top):
    with pytest.raises(ValueError, match=f"'age': top must be at least 1, got {top}"):
        Attribute("age", top=top)
    with pytest.raises(ValueError, match="'age': range must ascend"):
        Attribute("age", range=(0.0, INFINITY))
