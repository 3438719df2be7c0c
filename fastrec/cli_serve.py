# SPDX-License-Identifier: Apache-2.0
"""The commands that ask a trained model: `recommend` and `similar`; the lists that they read."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from fastrec.backend import device_of
from fastrec.data.dataset import SequenceDataset
from fastrec.data.errors import DataError, EmptyFile
from fastrec.data.output import (
    check_table_path,
    locked_file,
    write_parts,
    write_table,
)
from fastrec.data.text_files import read_lines
from fastrec.evaluation.blocks import row_blocks
from fastrec.serve import Recommender
from fastrec.serve_cold import other_catalogue
from fastrec.training.model_folder import load_model

USERS = 1 << 16  # whose recommendations are in memory at a time


def recommend(
    data: Path,
    pretrained: Path,
    output: Path,
    users: Path | None = None,
    histories: Path | None = None,
    part: str | None = None,
    k: int = 10,
    seen: Literal["exclude", "none"] = "exclude",
    logit_adjustment: float = 0.0,
    allowed: Path | None = None,
    blocked: Path | None = None,
    adapter: Path | None = None,
    new_items_like: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Write the k best next items of each user, in the ids of the original data; of a model that
    was trained for cold start, items of the other catalogue.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .csv or .parquet file with columns user_id, rank, item_id, score.
        users: text file with one original user id a line; all users without it.
        histories: JSON lines in place of users of the data set: a list of original item ids a line,
            oldest first; their user_id is the number of the line, from 0. Items that the model does
            not know are left out and counted.
        part: 2/8 for the second eighth of the users, in their order: each of several processes or
            machines writes a file of its own.
        k: items a user.
        seen: leave out or keep the items that a user already has, in the other catalogue if these
            are recommended.
        logit_adjustment: what is taken from a score is this times the log of the item's share of
            the training events; with 1, items are ranked by how much likelier the user makes them.
        allowed: text file with one original item id a line; only these are scored.
        blocked: the same; these are never recommended.
        adapter: folder of `fastrec adapter`: patches and heads that the model gets.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        overwrite: replace a file `output`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    check_table_path(output)
    if users is not None and histories is not None:
        raise ValueError("recommend takes --users or --histories, not both")
    if part is not None and histories is not None:
        raise ValueError("--part is of users, not of --histories")
    with locked_file(output, overwrite):
        dataset = SequenceDataset.load(data)
        asked, given = read_ids(users), read_histories(histories)
        some, never = read_ids(allowed), _blocked(blocked)
        model = load_model(
            pretrained, dataset, same_users=histories is None, new_items_like=new_items_like,
            adapter=adapter,
        ).to(device_of(device))  # fmt: skip
        other = other_catalogue(model, dataset, adapter or pretrained)
        recommender = Recommender(model, dataset, other=other)
        ask = partial(
            recommender.recommend, k, seen=seen, logit_adjustment=logit_adjustment, allowed=some,
            blocked=never,
        )  # fmt: skip
        parts: Iterable
        if given is None:
            recommender.check_users(asked)  # of all parts, before any work
            everyone = _part_of(dataset.user_ids().tolist() if asked is None else asked, part)
            blocks = row_blocks(len(everyone), USERS)
            parts = (ask(everyone[block]) for block in blocks)
            if not blocks:  # a part without users is a table without rows
                parts = [ask(dataset.user_ids()[:1].tolist()).clear()]
        else:
            everyone, parts = given, [ask(histories=given)]
        counts: list[tuple[int, int]] = []
        write_parts(_counted(parts, counts), output, overwrite)
    rows, found = map(sum, zip(*counts, strict=True))
    who = "users" if histories is None else "histories"
    said = f"items of {'their history' if who == 'users' else 'the history'} "
    said = said if other is None else "of the other catalogue, those that they have there "
    said += "left out" if seen == "exclude" else "included"
    if some is not None:
        said += f", {len(set(some)):,} items allowed"
    if never is not None:
        said += f", {len(set(never)):,} blocked"
    print(
        f"{output}: {rows:,} rows, the {k} best items of {found:,} of {len(everyone):,} {who},"
        f" {said}"
    )


def _counted(frames: Iterable, counts: list[tuple[int, int]]) -> Iterator:
    """The frames, after (rows, users) of each was appended to `counts`."""
    for frame in frames:
        counts.append((len(frame), frame["user_id"].n_unique()))
        yield frame


def _part_of(users: Sequence, part: str | None) -> Sequence:
    """Those of `users` that are meant by "2/8"."""
    if part is None:
        return users
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"part must be like 2/8, from 1/8 to 8/8, got {part!r}")
    return users[len(users) * (number - 1) // of : len(users) * number // of]


def similar(
    data: Path,
    pretrained: Path,
    output: Path,
    items: Path | None = None,
    k: int = 10,
    adapter: Path | None = None,
    new_items_like: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
):
    """Write the k most similar items of each item: the cosine of item vectors.

    Args:
        data: folder written by `fastrec prepare`.
        pretrained: folder of a model (`RUN/model`).
        output: .csv or .parquet file with columns item_id, rank, similar_item_id, score.
        items: text file with one original item id a line; all items without it.
        k: similar items of an item, which is none of its own.
        adapter: folder of `fastrec adapter`: patches and heads that the model gets.
        new_items_like: column of item attributes: items that the model does not know begin as the
            mean of known ones of the same category; without it as the mean of all.
        overwrite: replace a file `output`.
        device: cpu, cuda or cuda:N; auto is a GPU, or the CPU.
    """
    check_table_path(output)
    with locked_file(output, overwrite):
        dataset = SequenceDataset.load(data)
        asked = read_ids(items)
        model = load_model(
            pretrained, dataset, same_users=False, new_items_like=new_items_like, adapter=adapter
        ).to(device_of(device))
        best = Recommender(model, dataset).similar(asked, k)
        write_table(best, output, overwrite)
    count = dataset.num_items if asked is None else len(asked)
    print(f"{output}: {len(best):,} rows, the {k} most similar items of {count:,} items")


def read_ids(path: Path | None) -> list[str] | None:
    """The ids of a text file, one a line as it stands, blanks included, without empty lines; None
    for no file."""
    if path is None:
        return None
    return [line.removesuffix("\r") for line in read_lines(path) if line.strip()]


def _blocked(path: Path | None) -> list[str] | None:
    """`read_ids` of a file that may be empty: then nothing is blocked."""
    try:
        return read_ids(path)
    except EmptyFile:
        return []


def read_histories(path: Path | None) -> Sequence[Sequence[int | str]] | None:
    """The lists of a file of JSON lines; None for no file. Raises DataError that names the line
    that is no list of texts and integers."""
    if path is None:
        return None
    histories = []
    for row, line in enumerate(read_lines(path), 1):
        try:
            history = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(path, f"no JSON: {error}", row=row) from None
        if not isinstance(history, list) or not all(type(each) in (int, str) for each in history):
            raise DataError(path, f"expected a list of item ids, got {line}", row=row)
        histories.append(history)
    return histories
