# SPDX-License-Identifier: Apache-2.0
"""The commands `prepare` and `generate`. What they call is imported with polars, 0.1 s: the others
begin without it."""

import time
from pathlib import Path
from typing import Any, Literal


def prepare(
    source: Path,
    output: Path,
    format: Literal[
        "table", "histories", "s3rec", "pairs", "movielens-1m", "movielens-100k", "recbole"
    ] = "table",
    k_core: int = 0,
    min_rating: float | None = None,
    max_users: int | None = None,
    user_attributes: Path | None = None,
    item_attributes: Path | None = None,
    item_features: Path | None = None,
    relations: Path | None = None,
    cold_items: Path | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    timestamp_column: str | None = None,
    rating_column: str | None = None,
    event_type_column: str | None = None,
    history_column: str | None = None,
    keep_events: str | None = None,
    separator: str = "auto",
    columns: str | None = None,
    encoding: str | None = None,
    time_unit: Literal["s", "ms", "us", "ns"] | None = None,
    time_format: str | None = None,
    ordered: bool = False,
    ids: Literal["auto", "int", "str"] = "auto",
    na_values: Literal["ask", "missing", "text"] = "ask",
    on_missing: Literal["error", "drop"] = "error",
    on_duplicate: Literal["error", "keep", "drop"] = "error",
    user_key: str | None = None,
    item_key: str | None = None,
    items_of: Path | None = None,
    split: Literal["leave_one_out", "last", "ratio", "time", "files"] = "leave_one_out",
    valid: str | int | float | None = None,
    test: str | int | float | None = None,
    valid_source: Path | None = None,
    test_source: Path | None = None,
    overwrite: bool = False,
):
    """Turn a raw file into a data set that the other commands read.

    Args:
        source: a file; a folder of part files, or of movielens and recbole.
        output: folder of the data set.
        format: of the source; "table" is delimited text, Parquet or JSON, one event a row;
            "histories" the same with a row per user.
        k_core: remove users and items with fewer events, again and again.
        min_rating: remove events rated below.
        max_users: keep only the first users in order of their id.
        user_attributes: file with a column of user ids, called user_id, user or as in the source.
        item_attributes: file with a column of item ids, or the attribute JSON of S3-Rec.
        item_features: file with a column of item ids and vectors: a list in each other column, or
            numbers in all of them, which are one vector named as the file.
        relations: file whose first two columns are user and friend.
        cold_items: file whose first two columns are user and item of another catalogue, for
            cold-start recommendation.
        user_column: of a table; without it a usual name is recognised, as for the next four.
        item_column: of a table.
        timestamp_column: of a table: numbers, dates or ISO times; "none" leaves it out.
        rating_column: of a table; "none" leaves it out.
        event_type_column: of a table: what kind of event it is; "none" leaves it out.
        history_column: of histories: the items, between blanks or commas, as JSON or as a list.
        keep_events: keep only events of these types, such as "buy,click".
        separator: between columns: ";", "::", whitespace, ..; "auto" is what the suffix says.
        columns: names of all columns of a file without a header, such as "user,item,rating,time".
        encoding: of a text file, such as latin-1; UTF-8 without it.
        time_unit: what times that are numbers count; without it inferred if all are in 1990-2100.
        time_format: how other times are written, such as "%m/%d/%Y" or "%d.%m.%Y %H:%M:%S".
        ordered: each user's rows are oldest first: a table or recbole file without times needs it.
        ids: take ids as integers where all are, demand it, or keep text, in table and recbole.
        na_values: whether words such as NA are missing values or text; without it they are refused.
        on_missing: what to do with rows without a user, item, time or rating.
        on_duplicate: what to do with the same user, item and time twice.
        user_key: column of user_attributes that holds the ids, if it is called otherwise.
        item_key: the same of item_attributes and item_features.
        items_of: a data set whose items come first, in their order: models of it go on here.
        split: which events are held out: of each user the last and the second last; the last ones,
            by number or by share; those from a time on; or those of files of their own.
        valid: for validation: of last a number such as 2, of ratio a share such as 0.1, of time the
            first moment, such as 2024-01-31, or a whole number as the data set counts its times
            (the line `time` of the report: ms, where a source of seconds has a fraction).
        test: the same for the test, whose events are behind those of validation.
        valid_source: of files: the events of validation, read as `source`, which is training.
        test_source: of files: the events of the test.
        overwrite: replace a data set in `output`.
    """
    from fastrec.data.prepare import prepare as prepare_dataset

    reader_options: dict[str, Any] = {
        "user": user_column,
        "item": item_column,
        "timestamp": timestamp_column,
        "rating": rating_column,
        "event_type": event_type_column,
        "history": history_column,
        "keep_events": None if keep_events is None else keep_events.split(","),
        "separator": None if separator == "auto" else separator,
        "columns": None if columns is None else columns.split(","),
        "encoding": encoding,
        "time_unit": time_unit,
        "time_format": time_format,
        "ordered": ordered or None,
        "ids": None if ids == "auto" else ids,
        "on_missing": None if on_missing == "error" else on_missing,
        "on_duplicate": None if on_duplicate == "error" else on_duplicate,
    }
    report = prepare_dataset(
        source,
        output,
        format=format,
        k_core=k_core,
        min_rating=min_rating,
        max_users=max_users,
        user_attributes=user_attributes,
        item_attributes=item_attributes,
        item_features=item_features,
        relations=relations,
        cold_items=cold_items,
        user_key=user_key,
        item_key=item_key,
        items_of=items_of,
        na_values=na_values,
        split=split,
        valid=valid,
        test=test,
        valid_source=valid_source,
        test_source=test_source,
        overwrite=overwrite,
        **{name: value for name, value in reader_options.items() if value is not None},
    )
    print(report)


def generate(
    output: Path,
    users: int = 20_000,
    items: int = 5_000,
    median_length: float = 7.7,
    max_length: int = 350,
    communities: int | None = None,
    zipf: float = 0.7,
    mean_friends: float = 8.0,
    seed: int = 0,
    overwrite: bool = False,
):
    """Write a synthetic data set of any size: communities, order, attributes, friends.

    Args:
        output: folder of the data set.
        users: number of users.
        items: number of items.
        median_length: of the sequences, above 5; their mean is about 2.2 times what is above 5.
        max_length: of the sequences.
        communities: of users and items; without it one per 100 items.
        zipf: exponent of the popularity of items.
        mean_friends: links of a user who has any.
        seed: another seed gives other data.
        overwrite: replace a data set in `output`.
    """
    from fastrec.data.prepare import synthetic
    from fastrec.data.prepare.report import peak_memory, took

    start = time.perf_counter()
    dataset = synthetic.generate(
        output, num_users=users, num_items=items, median_length=median_length,
        max_length=max_length, num_communities=communities, zipf=zipf, mean_friends=mean_friends,
        seed=seed, overwrite=overwrite,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(
        f"{output}: {dataset.num_users:,} users, {dataset.num_items:,} items,"
        f" {dataset.num_events:,} events\n{took(dataset.num_events, seconds, peak_memory())}"
    )
