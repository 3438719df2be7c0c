# SPDX-License-Identifier: Apache-2.0
"""What a reader returns."""

from dataclasses import dataclass, field

import polars as pl

from fastrec.data.event_columns import SOURCE


@dataclass
class RawData:
    """Events in original ids, in the order of the source.

    interactions: user_id, item_id (Int64 or String), and timestamp (Int64), rating (Float32),
    event_type where the source has them. users: user_id, attributes. items: item_id, attributes.
    relations: user_id, friend_id. ordered: each user's rows are oldest first and must not be
    sorted. time: what a timestamp counts. removed: how many rows an option of the reader dropped,
    by reason. inferred: the settings that were not given but recognised, such as
    {"user_column": "userId"}.
    """

    source: str
    interactions: pl.DataFrame
    users: pl.DataFrame | None = None
    items: pl.DataFrame | None = None
    relations: pl.DataFrame | None = None
    ordered: bool = False
    time: str = SOURCE
    removed: dict[str, int] = field(default_factory=dict)
    inferred: dict[str, str] = field(default_factory=dict)
