# SPDX-License-Identifier: Apache-2.0
"""MovieLens as the tables want it: a source and a target catalogue by genre, of the same users."""

from pathlib import Path

import polars as pl

from fastrec.cli import main

TARGET = ("Action", "Thriller", "Sci-Fi")  # genres of the target: 945 of the 3,416 items of ml-1m
KEPT = 9  # events of a user there, the latest: "less than 10"
LEFT_OUT = ("Animation", "Documentary")  # of the users of AdaptSSR's table
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War",
    "Western",
)  # fmt: skip


def ml_1m(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(user, item of the events in the order of each user; item, genres, year) of `ml-1m.txt`,
    `movies.dat` and `sas_to_original_items.txt`."""
    lines = (folder / "ml-1m.txt").read_text().splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    events = pl.DataFrame(pairs, schema=["user", "item"], orient="row")
    known = {}
    for line in (folder / "movies.dat").read_text(encoding="latin-1").splitlines():
        movie, title, genres = line.split("::")
        known[movie] = genres.split("|"), int(title[-5:-1]) if title[-5:-1].isdigit() else None
    rows = []
    for line in (folder / "sas_to_original_items.txt").read_text().splitlines():
        item, movie = line.split()
        rows.append((int(item), *known.get(movie, ([], None))))
    return events, _items(rows)


def ml_100k(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(user, item, rating, time in the order of time; item, genres, year) of the RecBole files."""
    events = pl.read_csv(folder / "ml-100k.inter", separator="\t")
    events.columns = ["user", "item", "rating", "time"]
    items = pl.read_csv(
        folder / "ml-100k.item", separator="\t", quote_char=None, infer_schema=False
    )
    items.columns = ["item", "title", "year", "genres"]
    rows = [
        (int(item), genres.split(), int(year) if year and year.isdigit() else None)
        for item, _, year, genres in items.with_columns(pl.col("genres").fill_null("")).iter_rows()
    ]
    return events.sort("time", maintain_order=True), _items(rows)


def _items(rows: list) -> pl.DataFrame:
    schema = {"item": pl.Int64, "genres": pl.List(pl.String), "year": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def split(events: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(events of the source, events of the target): items with a genre of `TARGET` are the target,
    of which the latest `KEPT` events of a user stay. Users with fewer than 3 events in the one or
    6 in the other are left out of both."""
    theirs = pl.col("genres").list.set_intersection(list(TARGET)).list.len() > 0
    target = items.filter(theirs)["item"]
    there = pl.col("item").is_in(target.implode())
    source, other = events.filter(~there), events.filter(there)
    other = other.group_by("user", maintain_order=True).tail(KEPT)
    parts = [
        part.group_by("user").len().filter(pl.col("len") >= least)["user"]
        for part, least in ((source, 3), (other, 6))
    ]
    both = set(parts[0].to_list()) & set(parts[1].to_list())
    return tuple(part.filter(pl.col("user").is_in(sorted(both))) for part in (source, other))  # type: ignore[return-value]


def meta(items: pl.DataFrame) -> pl.DataFrame:
    """item_id and `meta`, a vector: the mean of the genres, one-hot, and the decade, one-hot. What
    maps it is an embedding of each genre and decade, which goes to another catalogue."""
    decades = range(1910, 2010, 10)
    rows = []
    for item, genres, year in items.iter_rows():
        share = 1 / max(len(genres), 1)
        vector = [share * (genre in genres) for genre in GENRES]
        vector += [float(year is not None and low <= year < low + 10) for low in decades]
        rows.append((item, vector))
    return pl.DataFrame(rows, schema=["item_id", "meta"], orient="row")


def prepare_domains(folder: Path, output: Path, read) -> None:
    """Data sets `source` and `target` in `output`, of the events and items that `read` gives, if
    they are not there."""
    if all((output / name / "schema.json").is_file() for name in ("source", "target")):
        return
    events, items = read(folder)
    output.mkdir(parents=True, exist_ok=True)
    meta(items).write_parquet(output / "meta.parquet")
    for name, part in zip(("source", "target"), split(events, items), strict=True):
        file = output / f"{name}.csv"
        part.write_csv(file)
        order = ["--on_duplicate=keep"] if "time" in part.columns else ["--ordered=true"]
        main(["prepare", f"--source={file}", f"--output={output / name}", "--split=last",
              "--valid=2", "--test=3", f"--item_features={output / 'meta.parquet'}",
              "--overwrite=true", *order])  # fmt: skip


def prepare_cold(folder: Path, output: Path) -> None:
    """The data set `cold` in `output`: ml-1m's source, with the target as another catalogue."""
    if (output / "cold" / "schema.json").is_file():
        return
    source, target = split(*ml_1m(folder))
    output.mkdir(parents=True, exist_ok=True)
    source.write_csv(output / "source.csv")
    target.write_csv(output / "target.csv")
    main(["prepare", f"--source={output / 'source.csv'}", f"--output={output / 'cold'}",
          f"--cold_items={output / 'target.csv'}",
          "--ordered=true", "--overwrite=true"])  # fmt: skip


def prepare_users(folder: Path, output: Path) -> None:
    """The data set `users` in `output`: ml-1m with gender, age and occupation, and without the
    items of `LEFT_OUT`."""
    if (output / "users" / "schema.json").is_file():
        return
    events, items = ml_1m(folder)
    output.mkdir(parents=True, exist_ok=True)
    lines = (folder / "sas_to_original_users.txt").read_text().splitlines()
    own = {movielens: int(user) for user, movielens in (line.split() for line in lines)}
    rows = []
    for line in (folder / "users.dat").read_text(encoding="latin-1").splitlines():
        user, gender, age, occupation, _ = line.split("::")
        if user in own:
            rows.append((own[user], gender, int(age), int(occupation)))
    schema = ["user", "gender", "age", "occupation"]
    pl.DataFrame(rows, schema=schema, orient="row").write_csv(output / "profiles.csv")
    theirs = pl.col("genres").list.set_intersection(list(LEFT_OUT)).list.len() > 0
    there = pl.col("item").is_in(items.filter(theirs)["item"].implode())
    events.filter(~there).write_csv(output / "users.csv")
    main(["prepare", f"--source={output / 'users.csv'}", f"--output={output / 'users'}",
          f"--user_attributes={output / 'profiles.csv'}",
          "--ordered=true", "--overwrite=true"])  # fmt: skip
