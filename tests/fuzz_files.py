# SPDX-License-Identifier: Apache-2.0
"""Small sources of every format, ways to damage a file, and readings by other means.

`build(seed, folder)` writes a source of which one file is damaged: the same for the same seed.
"""

import ast
import csv
import gzip
import io
import json
import re
from pathlib import Path
from random import Random

import polars as pl

SPECIAL = [
    "", " ", "NA", "nan", "null", "inf", "-inf", "-1", "007", "+7", "-0", "7.0", "1e3", "1e999",
    "0x10", "1_0", "\uff17", "9" * 25, "1" + "0" * 400, "2024-01-31", "01/05/2024", "True", '"',
    '""', "a" * 140_000, "\u00e9", "\ufeff7", "user_id", "\\N", "1 2", "-5", "1565457600.125",
    "1565457600000", "[1, 2]", "{'a': 1}", "a,,b", "::", "|", "\t", ",", ";",
]  # fmt: skip
EVENTS = [(1, 10, 5, 3), (1, 11, 4, 6), (2, 10, 3, 2), (2, 12, 5, 9), (3, 11, 1, 4), (10, 12, 2, 8)]
TABLE = {"format": "table", "timestamp_column": "t", "rating_column": "r"}
RECBOLE = "user_id:token\titem_id:token\trating:float\ttimestamp:float"


def lines(rows, separator: str, header: str | None = None) -> str:
    body = [separator.join(map(str, row)) for row in rows]
    return "\n".join(([header] if header else []) + body) + "\n"


def sources() -> dict[str, tuple[dict[str, bytes], dict]]:
    """By name: files, the source first, and flags of `prepare`."""
    named = [dict(zip(("user_id", "item_id", "r", "t"), row, strict=True)) for row in EVENTS]
    people = [{"user_id": user, "age": 20 + user} for user in (1, 2, 10)]
    text = {
        "s3rec": ({"a.txt": "1 10 11\n2 10 12\n3 11 11 10\n", "a.json": '{"10": [1, 2], "11": []}'},
                  {"format": "s3rec", "item_attributes": "a.json"}),
        "pairs": ({"a.txt": lines([row[:2] for row in EVENTS], " ")}, {"format": "pairs"}),
        "movielens-1m": (
            {"ratings.dat": lines(EVENTS, "::"),
             "users.dat": lines([(1, "F", 25, 3, "02139"), (2, "M", 35, 4, "x")], "::"),
             "movies.dat": lines([(10, "A (1995)", "Drama|War"), (12, "B", "War")], "::")},
            {"format": "movielens-1m"}),
        "movielens-100k": (
            {"u.data": lines(EVENTS, "\t"),
             "u.user": lines([(1, 24, "M", "other", "85711"), (3, 53, "F", "x", "94043")], "|"),
             "u.item": lines([(10, "A", "1-Jan-1995", "", "u", *"01" * 9, 1)], "|")},
            {"format": "movielens-100k"}),
        "recbole": (
            {"a.inter": lines(EVENTS, "\t", RECBOLE),
             "a.user": lines([(1, 2.5, "a b"), (2, 3, "c")], "\t",
                             "user_id:token\tage:float\tw:token_seq"),
             "a.item": lines([(10, "1.5 2"), (11, "3")], "\t", "item_id:token\tv:float_seq"),
             "a.net": lines([(1, 2), (3, 1)], "\t", "source_id:token\ttarget_id:token")},
            {"format": "recbole"}),
        "csv": (
            {"a.csv": lines([(f"u{u:02}", f'"i,{i}"', r, t) for u, i, r, t in EVENTS], ",",
                            "user_id,item_id,r,t"),
             "p.csv": lines([("u01", 30, "Oslo"), ("u10", "", '"Rome, x"')], ",", "user_id,age,c"),
             "i.tsv": lines([("i,10", 1.5), ("i,12", 2)], "\t", "item_id\tprice"),
             "l.csv": lines([("u01", "u02"), ("u03", "u10")], ",", "from,to")},
            TABLE | {"user_attributes": "p.csv", "item_attributes": "i.tsv", "relations": "l.csv"}),
        "dates": (
            {"a.tsv": lines([(u, i, r, f"2024-01-0{t}T00:00:00.5") for u, i, r, t in EVENTS], "\t",
                            "user_id\titem_id\tr\tt")}, TABLE),
        "jsonl": ({"a.jsonl": lines([[json.dumps(row)] for row in named], ""),
                   "p.jsonl": '{"user_id": 1, "age": 3}\n{"user_id": 2, "age": null}\n'},
                  TABLE | {"user_attributes": "p.jsonl"}),
        "headerless": ({"a.txt": lines(EVENTS, "|")},
                       {"format": "table", "separator": "|", "columns": "user,item,rating,time"}),
        "whitespace": ({"a.txt": lines(EVENTS, "  \t")}, {"format": "table", "ordered": False,
                       "separator": "whitespace", "columns": "user,item,rating,time"}),
        "epochs": ({"a.csv": lines([(u, i, f"15654576{t:02}.{r}25") for u, i, r, t in EVENTS], ",",
                                   "userId,movieId,timestamp")}, {"format": "table"}),
        "array": ({"a.json": json.dumps(named, indent=0)}, TABLE),
        "literals": ({"a.json": lines([[str(row)] for row in named], "")}, TABLE),
        "histories": ({"a.tsv": "user\titems\n1\t10 11\n2\t10 12 13\n3\t11\n1\t10\n"},
                      {"format": "histories"}),
        "json histories": ({"a.tsv": 'user\titems\n1\t[10, 11]\n2\t["10", 12]\n3\t[]\n'},
                           {"format": "histories", "on_missing": "drop"}),
        "parts": ({f"log/part-{n}.csv": lines(EVENTS[n::2], ",", "user_id,item_id,r,t")
                   for n in (0, 1)}, TABLE),
        "links": ({"a.csv": lines(EVENTS, ",", "user_id,item_id,r,t"), "l.tsv": "1\t2\n2\t10\n"},
                  TABLE | {"relations": "l.tsv"}),
    }  # fmt: skip
    made = {
        name: ({file: content.encode() for file, content in files.items()}, flags)
        for name, (files, flags) in text.items()
    }
    made["parquet"] = ({"a.parquet": _parquet(named), "p.parquet": _parquet(people)},
                       TABLE | {"user_attributes": "p.parquet"})  # fmt: skip
    packed = gzip.compress(made["links"][0]["a.csv"], mtime=0)
    made["gzip"] = ({"a.csv.gz": packed}, TABLE)
    return made


def _parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pl.DataFrame(rows).write_parquet(file)
    return file.getvalue()


def change_token(random: Random, data: bytes) -> bytes:
    """A field becomes something special."""
    rows = data.split(b"\n")
    at = random.randrange(len(rows))
    for separator in (b"::", b"\t", b"|", b",", b" "):
        if separator in rows[at]:
            fields = rows[at].split(separator)
            fields[random.randrange(len(fields))] = random.choice(SPECIAL).encode()
            rows[at] = separator.join(fields)
            return b"\n".join(rows)
    return data


def change_lines(random: Random, data: bytes) -> bytes:
    """A line goes, comes twice, is empty, loses or gains a field; or all are shuffled."""
    rows = data.split(b"\n")
    at = random.randrange(len(rows))
    how = random.randrange(7)
    if how == 0:
        del rows[at]
    elif how == 1:
        rows.insert(at, rows[at])
    elif how == 2:
        rows.insert(at, b"")
    elif how == 3:
        rows[at] = rows[at].rpartition(random.choice([b",", b"\t", b" ", b"::"]))[0]
    elif how == 4:
        rows[at] += random.choice([b",x", b"\t", b" 3", b"::1", b"\r", b"   "])
    elif how == 5:
        random.shuffle(rows)
    else:
        rows = [row.rpartition(random.choice([b",", b"\t"]))[0] for row in rows]
    return b"\n".join(rows)


def change_bytes(random: Random, data: bytes) -> bytes:
    """Bytes change, go, or come in."""
    damaged = bytearray(data)
    for _ in range(random.choice([1, 1, 3, 20])):
        at = random.randrange(len(damaged) + 1)
        new = random.choice([b"\0", b'"', b"\n", b"\r", b"\xff", bytes([random.randrange(256)])])
        damaged[at : at + random.randrange(3)] = new * random.randrange(2)
    return bytes(damaged)


def change_whole(random: Random, data: bytes) -> bytes:
    """The file is cut, empty, doubled, or written by another program."""
    cut = random.randrange(len(data) + 1)
    wrong = random.choice([(b",", b";"), (b"\t", b" "), (b"::", b":"), (b" ", b","), (b",", b"\t")])
    return random.choice([
        lambda: data[:cut], lambda: data[cut:], lambda: b"", lambda: data + data,
        lambda: b"\xef\xbb\xbf" + data, lambda: data.replace(b"\n", b"\r\n"),
        lambda: data.replace(b"\n", b"\r"), lambda: data.replace(*wrong),
        lambda: data.decode("latin-1").encode("utf-16"), lambda: data.rstrip(b"\n"),
        lambda: data + b"\n\n", lambda: b"\n" + data, lambda: data.split(b"\n", 1)[-1],
        lambda: gzip.compress(data), lambda: b"[" * 50_000 + data, lambda: data.upper(),
    ])()  # fmt: skip


def build(seed: int, folder: Path) -> tuple[Path, dict]:
    """(the source, flags) of a source with one damaged file, written to `folder`."""
    random = Random(seed)
    files, flags = random.choice(list(sources().values()))
    files = dict(files)
    victim = random.choice(list(files))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        damage = random.choice(
            [change_token, change_token, change_token, change_lines, change_bytes, change_whole]
        )
        files[victim] = damage(random, files[victim])
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    sides = ("user_attributes", "item_attributes", "relations")
    flags = {key: folder / value if key in sides else value for key, value in flags.items()}
    source = Path(next(iter(files)))
    return folder / (source.parent if source.parent.name else source), flags


def events(file: Path, flags: dict) -> list[tuple[str, str]]:
    """(user, item) of every row, as text, by the simplest reader of each format."""
    if file.is_dir():
        filled = [part for part in sorted(file.iterdir()) if len(_rows(_text(part), ",")) > 1]
        return [event for part in filled for event in events(part, flags)]
    if file.suffix == ".parquet":
        frame = pl.read_parquet(io.BytesIO(file.read_bytes()))
        return [(str(user), str(item)) for user, item in frame.select("user_id", "item_id").rows()]
    text = _text(file)
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [(str(row["user_id"]), str(row["item_id"])) for row in rows]
    if file.suffix == ".json":
        rows = _objects(text)
        return [(str(row["user_id"]), str(row["item_id"])) for row in rows]
    if flags["format"] == "histories":
        return _histories(text)
    if flags["format"] == "s3rec":
        rows = [line.split() for line in text.split("\n") if line.strip()]
        return [(row[0], item) for row in rows for item in row[1:]]
    separator = {"movielens-1m": "::", "pairs": None}.get(flags["format"], "\t")
    if "separator" in flags:
        separator = {"whitespace": None}.get(flags["separator"], flags["separator"])
    rows = _rows(text, "," if ".csv" in file.name else separator)
    if flags["format"] in ("table", "recbole") and "columns" not in flags:
        header = [_plain(name.partition(":")[0]) for name in rows.pop(0)]
        item = "movieid" if "movieid" in header else "itemid"
        places = header.index("userid"), header.index(item)
    else:
        places = 0, 1
    return [(row[places[0]], row[places[1]]) for row in rows]


def _objects(text: str) -> list[dict]:
    if text.lstrip().startswith("["):
        return json.loads(text)
    lines = [line for line in text.split("\n") if line.strip()]
    return [ast.literal_eval(line) if line[1] in "'u" else json.loads(line) for line in lines]


def _histories(text: str) -> list[tuple[str, str]]:
    """Of the longest history of each user, the last of equals, in the order of their rows."""
    rows = _rows(text, "\t")
    header = [_plain(name) for name in rows.pop(0)]
    lists = []
    texts = [row[header.index("items")].strip() for row in rows]
    filled = [each for each in texts if each]
    for each in texts:
        if all(other.startswith("[") for other in filled):
            lists.append([str(item) for item in json.loads(each or "[]")])
        elif any("," in other for other in filled):
            lists.append([item.strip() for item in each.split(",")])
        else:
            lists.append(each.split())
    users = [row[header.index("user")] for row in rows]
    best = {}
    for place, user in enumerate(users):
        if user not in best or len(lists[place]) >= len(lists[best[user]]):
            best[user] = place
    found = [(users[place], item) for place in best.values() for item in lists[place]]
    return [event for event in found if all(event)]


def _plain(name: str) -> str:
    return re.sub("[_ -]", "", name.lower()) if name == name.strip() else name


def people(folder: Path) -> tuple[str, dict[str, str]] | None:
    """(a column of user attributes, its text by user) of the formats that have one in text."""
    for name, separator, column, place in (
        ("users.dat", "::", "gender", 1), ("u.user", "\t", "gender", 2), ("p.csv", ",", "c", 2),
    ):  # fmt: skip
        if (folder / name).exists():
            rows = _rows(_text(folder / name), "|" if separator == "\t" else separator)
            header = rows.pop(0) if name == "p.csv" else ["user_id", column]
            if not {"user_id", column} <= set(header):
                return None
            key = header.index("user_id")
            return column, {row[key]: row[place] for row in rows}
    return None


def links(folder: Path) -> int | None:
    """The number of links; None where the format has none."""
    for name in ("l.csv", "l.tsv", "a.net"):
        if (folder / name).exists():
            rows = _rows(_text(folder / name), "," if name == "l.csv" else "\t")
            return len(rows) - (
                not any(re.fullmatch("[+-]?[0-9]+", field) for field in rows[0][:2])
            )
    return None


def _text(file: Path) -> str:
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    text = data.removeprefix(b"\xef\xbb\xbf")
    return text.decode("latin-1" if file.suffix == ".dat" else "utf-8").replace("\r\n", "\n")


def _rows(text: str, separator: str | None) -> list[list[str]]:
    if separator == ",":
        csv.field_size_limit(1 << 30)
        return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    return [line.split(separator) for line in text.split("\n") if line.strip()]
